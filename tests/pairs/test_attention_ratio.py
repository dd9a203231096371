"""Which picture an answer looks at."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import checkpoints
from helpers.tiny import record

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, SamplesConfig
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs import experts
from mmalign_jax.pairs.answers import plan_answers, scorers_of
from mmalign_jax.pairs.attention_ratio import AttentionRatio
from mmalign_jax.pairs.own_answers import Own
from mmalign_jax.pairs.sampled_records import SampleStatistics, sampled_pairs
from mmalign_jax.pairs.selectors import Candidate
from mmalign_jax.types import Part, Turn


def about(target, one):
    return dataclasses.replace(one, meta={"target_image": target})


TWO = about(0, record("two", "What is in image 1?", "A cat.", images=[1, 2]))
THREE = about(1, record("three", "And in the second one, what is there?", "A dog.", images=[3, 1, 4]))
FOUR = about(3, record("four", "Last?", "A cup.", images=[5, 6, 7, 8]))
RECORDS, ANSWERS = (TWO, THREE, FOUR), (("A cat.", "A blue dog sits on the table."), ("No.",), ("There is a cup.", "Yes.", "Two birds."))
FREE = (0.0, 0.0, 0.0)




@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """The same model on one device and on eight."""
    directory = checkpoints.tiny_llava(tmp_path_factory.mktemp("attention"), seed=5)
    meshes = mesh_lib.make_mesh(devices=jax.devices()[:1]), mesh_lib.make_mesh(2, 2, 2)
    return [Pretrained.read(directory, one, "float32") for one in meshes]


@pytest.fixture(scope="module")
def ratios(policies):
    return AttentionRatio(policies[0], asked=FREE, batch_size=2)


@pytest.fixture(scope="module")
def found(ratios):
    return ratios(RECORDS, ANSWERS)


def test_shares_of_all_pictures_sum_to_one(ratios, found):
    of_targets = ratios([about(number, THREE) for number in range(3)], [ANSWERS[1]] * 3)
    assert sum(one for (one,) in of_targets) == pytest.approx(1.0, abs=1e-5) and of_targets[1] == pytest.approx(found[1])
    assert all(0 < one < 1 for each in found for one in each) and found[0][0] != pytest.approx(found[0][1], abs=1e-4)


def test_neither_batch_nor_other_answers_matter(policies, ratios, found):
    for one, texts, expected in zip(RECORDS, ANSWERS, found, strict=True):
        assert [ratios([one], [[text]])[0][0] for text in texts] == pytest.approx(expected, abs=1e-5)
    assert ratios(RECORDS, [[], *ANSWERS[1:]])[0] == []
    eight = AttentionRatio(policies[1], asked=FREE, batch_size=2)(RECORDS, ANSWERS)
    for one, other in zip(eight, found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_pixels_matter(ratios, found):
    other = dataclasses.replace(TWO, media=(TWO.media[0], FOUR.media[0]))
    assert ratios([other], ANSWERS[:1])[0] != pytest.approx(found[0], abs=1e-4)


def test_what_is_asked_goes_by_the_number_of_pictures(policies, found, tmp_path):
    config = Config(samples=SamplesConfig(scorers=("attention(2,two=0.5,three=0.25)", "missing_end")))
    scorers = experts.with_experts(scorers_of(config), policies[0], config, tmp_path / "replies.jsonl")
    got = scorers(RECORDS, [[Candidate(text, "policy") for text in texts] for texts in ANSWERS])
    for asked, each, plain in zip((0.5, 0.25, 0.6), got, found, strict=True):
        assert [one.parts["attention"] for one in each] == pytest.approx([ratio - asked for ratio in plain], abs=1e-5)
        assert [one.total for one in each] == pytest.approx([2 * (ratio - asked) for ratio in plain], abs=1e-5)


def test_no_verdict_on_an_answer_that_is_too_long(ratios):
    long = "word " * 600
    assert ratios([TWO, TWO], [[long], ["A cat.", long]])[0] == [None]
    assert ratios([TWO], [["A cat.", long]])[0][1] is None


def test_answers_that_look_elsewhere_are_rejected(policies, tmp_path):
    """At the ceiling of a half, what looks at one of two pictures does not look at the other."""
    records = [dataclasses.replace(about(number, TWO), id=str(number)) for number in range(2)]
    samples = SamplesConfig(scorers=("attention(two=0.5)",), max_tokens=3, selector="reference_against_own(ceiling=0)", batch_size=2)
    answerer, _ = plan_answers(policies[0], records, Config(samples=samples), answers=1, rows=2, replies=tmp_path / "replies.jsonl")
    answerer = dataclasses.replace(answerer, sources=(_Scripted(answerer.processor),))
    *_, (_, counts) = made = list(sampled_pairs(answerer, {}, records, samples, SampleStatistics()))
    kept = {one.id: one for pairs, _ in made for one in pairs}
    ratios = AttentionRatio(policies[0], asked=(0.5, 0.0, 0.0), batch_size=2)(records, [_Scripted.texts] * 2)
    for one, scores in zip(records, ratios, strict=True):
        low = {text for text, score in zip(_Scripted.texts, scores, strict=True) if score <= 0}
        rejected = {kept[one.id].responses[pref.lose].text for pref in kept[one.id].prefs} if one.id in kept else set()
        assert rejected == low
    assert counts.pairs == len(_Scripted.texts) and counts.paired == len(kept) and counts.records == 2


@dataclasses.dataclass(frozen=True)
class _Scripted:
    """A source of known answers."""

    processor: object
    name: str = "script"
    texts = ("A blue dog sits.", "There are two birds.", "No.")

    def __call__(self, params, prompts, draw):
        ids = [self.processor.answer_ids(text)[0] for text in self.texts]
        answers = [Own(one, np.full(len(one), np.nan, np.float32), text, True, self.name) for one, text in zip(ids, self.texts, strict=True)]
        return [answers for _ in prompts]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (record("none", "What?", "A."), "record none: its prompt shows 0 pictures"),
        (about(0, record("single", "What?", "A.", images=[1])), "record single: its prompt shows 1 pictures; the scorer attention compares"),
        (dataclasses.replace(TWO, id="bare", meta={}), r'record bare: meta\["target_image"\] is missing; .* 0 to 1'),
        (about(2, TWO), r'record two: meta\["target_image"\] is 2; .* 0 to 1'),
        (about(-1, TWO), "is -1"),
        (about(True, TWO), "is True"),
        (about("0", TWO), "is '0'"),
    ],
)
def test_records_that_cannot_be_judged_are_named(ratios, one, message):
    with pytest.raises(UserError, match=message):
        ratios.check(one)
    with pytest.raises(UserError, match=message):
        ratios([one], [["A cat."]])


def test_a_layer_that_is_not_there(policies):
    with pytest.raises(UserError, match="config.samples.scorers: attention: layer 16 of a model of 2"):
        AttentionRatio(policies[0], layer=16)


def test_a_picture_that_is_shown_twice_counts_twice(ratios):
    twice = dataclasses.replace(TWO, media=TWO.media[:1], turns=(Turn("user", (Part(media=0), Part(media=0), Part(text="Which?"))),))
    ratios.check(about(1, twice))
    (first,), (second,) = ratios([about(0, twice), about(1, twice)], [["A cat."]] * 2)
    assert np.isclose(first + second, 1.0, atol=1e-5)
