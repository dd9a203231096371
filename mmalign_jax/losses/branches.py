"""Branches: an answer under some images. Terms name the branches that they compare, and by that what has to be computed."""

import dataclasses
import enum

from mmalign_jax.losses.stats import AnswerLogps, BranchStats


class Need(enum.Enum):
    """What an objective needs to be given beside the policy's log-probs of its answers."""

    REFERENCE = "reference"
    OTHER_IMAGE = "other_image"
    NO_IMAGE = "no_image"
    MISMATCHED = "mismatched"
    SELF_REJECTED = "self_rejected"
    TOKENS = "tokens"  # log-probs by token
    CHANGED = "changed"  # which tokens differ between the answers
    COLLISION = "collision"
    KL = "kl"
    MARGIN = "margin"
    AUXILIARY = "auxiliary_nll"
    EPOCH = "epoch"
    SAMPLED = "sampled"  # answers are samples with rewards, a group a row
    LABELS = "desirable"  # of rows of one answer
    REWARDS = "rewards"  # of a row's answers, which are a group
    SCORES = "scores"  # of whole answers, by the model's score head
    VALUES = "values"  # the same head at the state before every answer token
    BATCH = "batch"  # statistics over all rows of a step


@dataclasses.dataclass(frozen=True)
class Branch:
    """Answer `answer` of the statistics' field `images`."""

    images: str
    answer: int

    def of(self, stats: BranchStats) -> AnswerLogps:
        return getattr(stats, self.images)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.images == "answers" else frozenset({Need(self.images)})


CHOSEN, REJECTED = Branch("answers", 0), Branch("answers", 1)
CHOSEN_OTHER_IMAGE, REJECTED_OTHER_IMAGE = Branch("other_image", 0), Branch("other_image", 1)
CHOSEN_NO_IMAGE = Branch("no_image", 0)
MISMATCHED = Branch("mismatched", 0)
SELF_REJECTED = Branch("self_rejected", 0)
