"""The ground floor: the letters of every array shape, and the records that travel through the system.

Letters used in jaxtyping annotations throughout the package:

  B  rows of a batch (one prompt, K answers)      T  tokens of a row, T = P + K R
  P  slots for the prefix (images and prompt)     R  slots for one answer
  K  answers of a row                             M  images of a row
  N  image tokens of one image                    F  image features of a row, F = M N
  D  width of the decoder                         V  vocabulary
  H  query heads      G  key/value heads          E  width of one head
  L  layers           S  decode lanes of a row    X  slots of a lane's own tail
  Y  image height     W  image width              Z  width of the vision tower, or of the features taken from it
  A  accumulation steps                           Q  patches of a row's pictures, when they have any size
  U  width of an image feature: D, or (1 + J) D with J layers of DeepStack
  I  sets of pictures, each the pictures of a row: B, or fewer where rows share theirs
  C  packed rows, which hold several of B pairs each
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8

# Roles of a token in a row. Answer k has role FIRST_ANSWER + k.
PAD, PREFIX, FIRST_ANSWER = 0, 1, 2

# Fields of a `PairBatch` whose last axis is the row's slots.
BY_SLOT = ("tokens", "role", "positions", "image_index", "token_weight", "mrope", "changed", "reference_logps", "drawn_logps", "segment")
FILLERS = {"image_index": -1, "role": PAD, "segment": -1}  # of empty slots of these; 0 for the others


@dataclasses.dataclass(frozen=True)
class Media:
    """One image or one video: encoded bytes as they were found, never decoded pixels.

    An "image" has `data`. A "video" has `frames`, encoded still pictures, and `times`, the second at which each of them is shown:
    finite and strictly increasing.

    Raises:
      ValueError: the fields do not belong to the kind, or the times break their rule.
    """

    kind: str
    data: bytes = b""
    origin: str = ""
    frames: tuple[bytes, ...] = ()
    times: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ("image", "video"):
            raise ValueError(f"unknown kind of media {self.kind!r}")
        if self.kind == "image" and (self.frames or self.times):
            raise ValueError("an image has data, no frames and no times")
        if self.kind == "video":
            if self.data or not self.frames:
                raise ValueError("a video has frames, at least one, and no data")
            if len(self.times) != len(self.frames):
                raise ValueError(f"a video of {len(self.frames)} frames has {len(self.times)} times")
            if not all(map(math.isfinite, self.times)):
                raise ValueError("the times of a video's frames must be finite")
            if any(later <= earlier for earlier, later in itertools.pairwise(self.times)):
                raise ValueError("the times of a video's frames must increase strictly")

    @property
    def pictures(self) -> tuple[bytes, ...]:
        """All encoded pictures in order: an image's one, or a video's frames."""
        return (self.data,) if self.kind == "image" else self.frames


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a turn: a text, or the index of a medium of the record. Exactly one of the two is set."""

    text: str | None = None
    media: int | None = None

    def __post_init__(self):
        if (self.text is None) == (self.media is None):
            raise ValueError("a part holds either a text or a media index")


@dataclasses.dataclass(frozen=True)
class Turn:
    role: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Response:
    text: str
    source: str = ""
    score: float | None = None
    critique: str = ""


@dataclasses.dataclass(frozen=True)
class Preference:
    """Response `win` is preferred to response `lose` (indices into the record's responses).

    Args:
      weight: of the pair in the loss.
      margin: by how much it is better, in the units of whoever judged; 0 where nobody did.
    """

    win: int
    lose: int
    weight: float = 1.0
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Label:
    """Response `answer` (an index into the record's responses) is desirable, or is not, without another one that it is compared with."""

    answer: int
    desirable: bool
    weight: float = 1.0  # in the loss


@dataclasses.dataclass(frozen=True)
class Group:
    """Responses (indices into the record's) that are ranked by their scores."""

    answers: tuple[int, ...]
    weight: float = 1.0  # in the loss


Choice = Preference | Label | Group  # which responses of a record make a row
FORMS = {"prefs": "pairs", "labels": "labelled answers", "groups": "groups"}  # fields of a record that hold rows, and what these are called


def answers_of(choice: Choice) -> tuple[int, ...]:
    """Indices of the responses of a row, in order."""
    if isinstance(choice, Preference):
        return choice.win, choice.lose
    return (choice.answer,) if isinstance(choice, Label) else choice.answers


@dataclasses.dataclass(frozen=True)
class PreferenceRecord:
    """What is on disk, what importers write and what pair makers write (DESIGN section 5).

    `prefs` is empty for rows that only have reference answers (SFT, or the input of a pair maker); the reference is then response 0. Answers
    that were scored and not paired are rows of `labels` or `groups`.
    `prefix`, when not empty, is text that starts every response and is conditioned on, not scored (per-sentence pairs). Responses that
    are not `complete` are cut out of a longer answer: the end-of-turn token does not follow them.
    """

    id: str
    media: tuple[Media, ...]
    turns: tuple[Turn, ...]
    responses: tuple[Response, ...]
    prefs: tuple[Preference, ...] = ()
    prefix: str = ""
    complete: bool = True
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[Label, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def reference(self) -> Response | None:
        """The answer that is taken for true: the winner of the first preference, response 0 where nobody compared answers, None where there are
        only answers that somebody scored."""
        if self.prefs:
            return self.responses[self.prefs[0].win]
        return self.responses[0] if self.responses and not (self.labels or self.groups) else None


def record_key(record_id: str) -> int:
    """The unsigned 32-bit number under which a record's random draws are made, the same on every machine."""
    return int.from_bytes(hashlib.sha256(record_id.encode()).digest()[:4], "little")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """How pictures of any size become the patches of a row, in the order in which the tower takes them.

    A row's pictures lie in the upper left corners of its canvases (`PairBatch.images`). Slots come in runs of one attention window
    (`VisionConfig.window_slots`), and within a run in squares that become one image token. B is I where rows share their pictures.
    """

    index: Int[Array, "*A B Q C"]  # which patch of the row's canvases, flat, for each of the C frames of a patch; -1 for no patch
    place: Int[Array, "*A B Q 2"]  # row and column in the picture
    grid: Int[Array, "*A B Q 2"]  # rows and columns of the picture
    segment: Int[Array, "*A B Q"]  # the picture, or pair of frames, within which attention stays; -1 for no patch
    extent: Int[Array, "*A B M 2"]  # height and width of the picture on each canvas, in pixels; 0 for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """What is known of a row's answers when they are a group of samples of the policy."""

    rewards: Float[Array, "*A B K"]
    row_tokens: Float[Array, "*A B"]  # scored tokens of a row, the mean over all rows of the step
    limit: Float[Array, "*A B"]  # most tokens that an answer could have had
    logps: Float[Array, "*A B K R"] | None = None  # by the policy that drew them, nats, 0 off the answers; None: it is the policy as it is
    values: Float[Array, "*A B K R"] | None = None  # by its score head before each token, likewise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Rows of `[images and prompt | answer 1 | ... | answer K]`, each region padded on its right to its own static length.

    Positions of every answer go on from the end of the row's prefix; `role` says which region a token belongs to, and the
    attention mask follows from `role`, `positions` and `image_index` alone.

    `images` are tiles of the size that the tower takes, or canvases that hold pictures of any size; `patches` then says where. `mrope`
    are the rotary positions of models that turn by time, row and column; other models turn by `positions`.

    `features` are what the tower makes of the pictures, where that is at hand (`data.features`); `patches` are there nevertheless.

    Where rows share their pictures, `images`, `patches` and `features` hold each set of them once, and `picture` says which one a row shows.
    Rows come in as many equal groups as `picture` has, one a device, sets of pictures likewise, and a row's is of its own group.

    Such a row is "packed" in that its regions stand in one sequence. `config.data.packed` means more:

    Where a row holds several pairs (`data.packing`), arrays by token have C rows in the place of B, and each region holds the parts of the row's
    pairs one behind the other. `segment` says which pair of its row a token belongs to; it sees no other, and positions start with each pair. What
    belongs to a pair has length B still, in `place`'s order, which `turn` leads back to that without packing; groups are as above, and a group's
    rows show one set of pictures. `longest` is then the most slots of a pair's prefix, and of one of its answers.
    """

    tokens: Int[Array, "*A B T"]
    role: Int[Array, "*A B T"]
    positions: Int[Array, "*A B T"]
    images: UInt8[Array, "*A I M Y W 3"] | None  # None where `features` stand for them
    image_index: Int[Array, "*A B T"]  # which of the row's F features lands here, -1 for none
    token_weight: Float[Array, "*A B T"]  # weight of a scored token, 0 off the answers
    record_key: UInt[Array, "*A B"]  # seed of the row's random draws
    margin: Float[Array, "*A B"]
    prefix_slots: int = dataclasses.field(metadata={"static": True})
    answer_slots: int = dataclasses.field(metadata={"static": True})
    longest: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})  # None: a row is a pair
    patches: Patches | None = None
    mrope: Int[Array, "*A B 3 T"] | None = None
    weight: Float[Array, "*A B"] | None = None  # of the pair in the loss; None: 1
    desirable: Bool[Array, "*A B"] | None = None  # of rows with one answer that has a label
    rewards: Float[Array, "*A B K"] | None = None  # of rows whose answers are ranked by them
    changed: Bool[Array, "*A B T"] | None = None  # answer tokens that differ from the row's other answer
    other_images: UInt8[Array, "*A B M Y W 3"] | None = None  # of another row, in the form of this row's
    reference_logps: Float[Array, "*A B T"] | None = None  # cached, by token, 0 off the answers
    reference_other_logps: Float[Array, "*A B _"] | None = None  # the same of the first answers under the corrupted image
    auxiliary: "PairBatch | None" = None  # as many rows of another data set, K = 1
    sampled: Sampled | None = None  # where the answers are a group of samples
    picture: Int[Array, "*A groups rows"] | None = None  # place among the sets of pictures of the row's group; None: each row has its own
    features: Float[Array, "*A I G Z"] | None = None  # of a frozen tower, in the type that it is computed in; `images` are not there then
    segment: Int[Array, "*A C T"] | None = None  # number of a token's pair within its row, -1 off all pairs; None: a row is a pair
    place: Int[Array, "*A groups pairs"] | None = None  # of each pair of a group: the number of its row there times `pairs`, plus its segment
    turn: Int[Array, "*A B"] | None = None  # of each pair: its place among the B without packing
    drawn_logps: Float[Array, "*A B T"] | None = None  # by the sampler, of tokens that were drawn for this step; NaN elsewhere

    @property
    def answers(self) -> int:
        """K, the number of answers of a row."""
        return (self.tokens.shape[-1] - self.prefix_slots) // self.answer_slots

    def first_answers(self, count: int) -> "PairBatch":
        """The same rows with only the first `count` answers; fewer than all are no whole group of samples any more."""
        stop = self.prefix_slots + count * self.answer_slots
        cut = {name: value if value is None else _cut(value, stop) for name in BY_SLOT for value in (getattr(self, name),)}
        of_all = {"sampled": self.sampled, "rewards": self.rewards}
        return dataclasses.replace(self, **cut, **(of_all if count == self.answers else dict.fromkeys(of_all)))

    def by_answer(self, values: Array) -> Array:
        """`[*A, B, T]` -> `[*A, B, K, R]`: the slots of the answers."""
        return values[..., self.prefix_slots :].reshape(*values.shape[:-1], self.answers, self.answer_slots)

    def with_images(self, images: UInt8[Array, "*A I M Y W 3"] | Float[Array, "*A I M Y W 3"]) -> "PairBatch":
        return dataclasses.replace(self, images=images, features=None)


def _cut(values: Any, stop: int) -> Any:
    """The first slots of an array, or of a shape with its sharding."""
    if isinstance(values, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*values.shape[:-1], stop), values.dtype, sharding=values.sharding)
    return values[..., :stop]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, and the frozen parameters beside it. Donated to the step as a whole."""

    step: Int[Array, ""]
    params: dict  # trainable
    frozen: dict  # the same tree's other leaves; params and frozen never share a path
    opt_state: Any
    key: Array
    objective: dict = dataclasses.field(default_factory=dict)  # what the objective carries from step to step
    reference: dict = dataclasses.field(default_factory=dict)  # where it follows the policy (TR-DPO); else {}
    sampler: dict = dataclasses.field(default_factory=dict)  # `params` as they were when they last began to make pairs; {}: as they are

