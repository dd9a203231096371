"""BDHS against the paper's pseudo code on transformers, and what its pairs look like."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from helpers import checkpoints
from helpers.paper_bdhs import Paper
from helpers.tiny import Tiny, noise_png, prompt_ids, record

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import DataConfig, PairsConfig
from mmalign_jax.data.bad_rows import place_of
from mmalign_jax.data.layout import tokenize
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.data.records import to_example
from mmalign_jax.data.validate import check_record
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.pairs import bdhs
from mmalign_jax.pairs.bdhs import BdhsSampler
from mmalign_jax.pairs.bdhs_records import Statistics, make_pairs, to_records
from mmalign_jax.pairs.feature_pool import FeaturePool
from mmalign_jax.pairs.masked_decode import usual_slots
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.pairs.similarity import ngram_cosine
from mmalign_jax.types import PREFIX, Media, Preference, Response

GREEDY = PairsConfig(maker="bdhs", rho_th=0.7, n_iter=3, eps=0.3, temperature=0.0, max_sentence_tokens=6, max_answer_tokens=20, batch_size=4, seed=6)
DRAWN = dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, eps=0.2)

# name -> the record and its sentences, written out by hand
RECORDS = {
    "cat": (["There is a red cat."], [1]),
    "long": (["A dog sits next to a blue chair, and a cup.", " The book is 3.5 wide.", " Two birds!", " A tree"], [1, 2]),
    "yes": (["Yes."], [3]),
    "no": (["No, there is not any bird!", " Yes, there are two.", " None of them.", " North"], [2]),
    "text": (["A cup stands on the left."], []),
    "space": (["  A green tree.", "\n\nThree people.", "  No. \n"], [4]),
}


def build():
    return [record(name, "What is in the picture?", "".join(sentences), images=images) for name, (sentences, images) in RECORDS.items()]




@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    loaded = Tiny.load(checkpoints.tiny_llava(tmp_path_factory.mktemp("bdhs"), seed=3))
    # random weights hardly ever write a full stop: let every sixth token end a sentence
    ids = range(5, loaded.config.decoder.vocab_size, 6)
    ends = tuple(token for token in ids if token not in loaded.processor.banned_ids)
    return dataclasses.replace(loaded, processor=dataclasses.replace(loaded.processor, sentence_end_ids=ends))


ONE = mesh_lib.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def sampler_of(tiny):
    """A sampler with parameters. Compiling one is most of these tests' time, so equal ones are the same."""
    layout = plan_rows(build(), tiny.processor, DataConfig(), answers=1).layout
    params = functools.cache(tiny.sharded)

    @functools.cache
    def make(config=GREEDY, mesh=ONE, lanes=4, **changes):
        shape = dataclasses.replace(layout, **changes)
        sampler = BdhsSampler(tiny.model, tiny.processor, mesh, config, shape, lanes)
        return Made(sampler, params(mesh))

    return make


@dataclasses.dataclass(frozen=True)
class Made:
    sampler: BdhsSampler
    params: dict

    def __call__(self, records, draw=0):
        return list(self.sampler(self.params, records, draw))


def summary(outcomes):
    return [(one.rejected, one.iteration, one.sentences, one.splits, one.swapped, one.unfinished) for one in outcomes]


@pytest.fixture(scope="module")
def outcomes(sampler_of):
    return sampler_of()(build())


def agree(tiny, config, outcomes, records, draw=0):
    paper = Paper(tiny, config, ngram_cosine)
    for one, outcome in zip(records, outcomes, strict=True):
        assert (outcome.rejected, outcome.iteration) == paper(one, RECORDS[one.id][0], draw), one.id


def test_the_paper_with_retries(tiny, outcomes):
    agree(tiny, GREEDY, outcomes, build())
    # the comparison must have met every path
    assert {outcome.iteration for outcome in outcomes} == {1, 2, 3}
    assert {outcome.sentences is None for outcome in outcomes} == {True, False}
    assert any(outcome.unfinished for outcome in outcomes)
    assert not all(outcome.unfinished == len(outcome.splits or (0,)) for outcome in outcomes)


@pytest.mark.parametrize(
    "changes",
    [{"n_iter": 1}, {"n_iter": 1, "rho_th": 0.0}, {"rho_th": 1.0, "yes_no_swap": 1.0}, {"guided": False}, {"mask_scope": "text", "n_iter": 1}],
)
def test_the_paper_in_its_special_cases(tiny, sampler_of, changes):
    config = dataclasses.replace(GREEDY, **changes)
    found = sampler_of(config)(build(), draw=2)
    agree(tiny, config, found, build(), draw=2)
    assert any(outcome.swapped for outcome in found) == config.guided
    if not config.guided:
        assert all(outcome.sentences is None for outcome in found)
    if config.n_iter == 1:
        assert all(outcome.sentences is not None and outcome.iteration == 1 for outcome in found)
        assert {outcome.accepted for outcome in found} == {True, False}


def test_pixels_matter_as_far_as_the_mask_lets_them(sampler_of):
    media = [Media("image", noise_png(seed)) for seed in (8, 9)]
    others = [dataclasses.replace(one, media=tuple(media[: len(one.media)])) for one in build()]
    differ = {}
    for rho in (0.0, 1.0):
        run = sampler_of(dataclasses.replace(GREEDY, rho_th=rho, n_iter=1))
        differ[rho] = summary(run(build())) != summary(run(others))
    assert differ == {0.0: True, 1.0: False}


def test_batch_order_and_mesh_do_not_matter(sampler_of):
    expected = summary(sampler_of(DRAWN)(build()))
    wider = sampler_of(dataclasses.replace(DRAWN, batch_size=1), lanes=6, images=3)
    assert summary(wider(build()[::-1]))[::-1] == expected
    assert summary(wider(build()[2:4])) == expected[2:4]
    assert summary(sampler_of(DRAWN, mesh_lib.make_mesh(data=2, fsdp=2, tensor=2))(build())) == expected
    assert {iteration for _, iteration, *_ in expected} == {1, 2, 3}


@pytest.mark.nightly
def test_noise_is_drawn_anew_for_every_attempt(sampler_of, monkeypatch):
    monkeypatch.setattr(bdhs, "measure_of", lambda config: lambda pairs: [1.0] * len(pairs))  # nothing is accepted before the end
    config = dataclasses.replace(GREEDY, rho_th=0.0, noise_steps=900, batch_size=8, guided=False, eps=0.5)
    put, seen = FeaturePool.put, []

    def watch(self, params, entries, seed):
        put(self, params, entries, seed)
        seen.append(np.asarray(self.features))

    monkeypatch.setattr(FeaturePool, "put", watch)
    found = sampler_of(config)(build())
    assert {one.iteration for one in found} == {3} and summary(found) != summary(sampler_of(dataclasses.replace(config, noise_steps=0))(build()))
    of_row = [features[0] for features in seen[:3]]  # three attempts at the first record
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(of_row, 2))
    alone = sampler_of(dataclasses.replace(config, batch_size=2))(build()[::-1])
    assert summary(alone)[::-1] == summary(found)


def test_draws(sampler_of):
    config = dataclasses.replace(DRAWN, n_iter=1)
    run = sampler_of(config)
    again = [summary(run(build(), draw=draw)) for draw in (0, 0, 1)]
    assert again[0] == again[1] and all(a != b for a, b in zip(again[0], again[2], strict=True))
    assert summary(sampler_of(dataclasses.replace(config, seed=7))(build())) != again[0]
    # records that differ in nothing but their id have draws of their own
    twins = [record(name, "What?", "A cup. A cup.", images=[1]) for name in "ab"]
    a, b = run(twins)
    assert a.sentences != b.sentences
    # lanes of one record too, be they in its own row or, with a swapped word, in one beside it
    answer = "Yes, a cup. Yes, a cup. Yes, a cup. Yes, a cup."
    blind = sampler_of(dataclasses.replace(config, rho_th=1.0, yes_no_swap=0.5, temperature=50.0))
    (one,) = blind([record("same", "What?", answer, images=[1])])
    tails = [sentence[split:] for sentence, split in zip(one.sentences, one.splits, strict=True)]
    assert 0 < len(one.swapped) < 4 and len(set(tails)) == 4


def test_no_special_token_is_written(tiny, sampler_of, monkeypatch):
    # a model that likes nothing more than image tokens, padding and beginnings
    head = np.array(tiny.params["decoder"]["head"]["kernel"])
    head[:, [0, 1, 3, 4]] *= 50
    run = sampler_of(dataclasses.replace(GREEDY, eps=1e-9))
    params = run.params
    kernel = jax.device_put(head, params["decoder"]["head"]["kernel"].sharding)
    params = params | {"decoder": params["decoder"] | {"head": {"kernel": kernel}}}
    seen = []
    decode = type(tiny.processor).decode
    monkeypatch.setattr(type(tiny.processor), "decode", lambda self, ids: seen.extend(map(int, ids)) or decode(self, ids))
    list(run.sampler(params, build()))
    assert len(set(seen)) > 10 and not set(seen) & set(tiny.processor.banned_ids)
    assert set(tiny.processor.banned_ids) >= {0, 1, 3, 4}


def test_what_ends_a_sentence(tiny):
    processor = dataclasses.replace(tiny.processor, sentence_end_ids=tuple(int(tiny.processor.answer(mark).ids[-2]) for mark in ".!?"))
    assert bdhs._ends(processor, "sentence") == processor.sentence_end_ids
    assert bdhs._ends(processor, "full_stop") == processor.sentence_end_ids[:1]


def test_texts_of_guided_answers(outcomes):
    for outcome in outcomes:
        reference = outcome.reference.text
        lead, tail = reference[: len(reference) - len(reference.lstrip())], reference[len(reference.rstrip()) :]
        assert outcome.rejected.startswith(lead) and outcome.rejected.endswith(tail)
        body = outcome.rejected[len(lead) : len(outcome.rejected) - len(tail)]
        assert body and body == body.strip()
        if outcome.sentences is None:
            continue
        assert outcome.rejected == lead + "".join(outcome.sentences).strip() + tail
        for number, ((start, end), written) in enumerate(zip(split_sentences(reference), outcome.sentences, strict=True)):
            clean, split = reference[start:end], outcome.splits[number]
            if number not in outcome.swapped and written:
                assert written[:split] == clean[:split]
            if written:  # the space between two sentences is the reference's
                assert written[: len(clean) - len(clean.lstrip())] == clean[: len(clean) - len(clean.lstrip())]
                assert not written.lstrip().startswith(" ") and written == written.rstrip()


def test_whole_pairs(tiny, sampler_of, outcomes):
    run = sampler_of()
    parts = list(make_pairs(run.sampler, run.params, iter(build()), GREEDY, Statistics()))
    made, statistics = [pair for pairs, _ in parts for pair in pairs], parts[-1][1]
    assert [counts.records for _, counts in parts] == list(range(1, len(build()) + 1))
    assert statistics.records == len(build()) == statistics.pairs + statistics.unchanged + statistics.unusable
    assert statistics.pairs == len(made) and sum(statistics.by_iteration.values()) == statistics.records
    assert [one.id for one in made] == [one.record.id for one in outcomes if one.changed]
    for pair in made:
        source = next(one for one in build() if one.id == pair.id)
        assert pair.responses[0] == source.responses[0] and pair.prefs == (Preference(0, 1, margin=1 - pair.meta["bdhs"]["similarity"]),)
        assert (pair.media, pair.turns, pair.prefix, pair.complete) == (source.media, source.turns, "", True)
        valid(pair, tiny)
    assert statistics.unfinished == sum(one.unfinished for one in outcomes) > 0


def valid(pair, tiny):
    limits = DataConfig()
    check_record(pair, place_of(pair), max_pixels=limits.max_image_pixels, max_bytes=limits.max_image_bytes)
    assert to_example(pair)["record"]
    tokenize(pair, pair.prefs[0], tiny.processor, 2)


def test_the_draws_are_kept_and_make_the_outcome_again(sampler_of):
    for outcome in sampler_of()(build(), draw=3):
        for pair in to_records(outcome, dataclasses.replace(GREEDY, per_sentence=True)):
            kept = json.loads(json.dumps(pair.meta["bdhs"]))
            config = PairsConfig(**kept["settings"], maker="bdhs", batch_size=1, per_sentence=True)
            (source,) = [one for one in build() if one.id == kept["record"]]
            (again,) = sampler_of(config)([source], draw=kept["draw"])
            assert pair in to_records(again, config)
            assert (again.iteration, again.similarity, again.accepted) == (kept["iteration"], kept["similarity"], kept["accepted"])
            assert list(again.splits or ()) == (kept["splits"] or []) and list(again.swapped) == kept["swapped"]
            assert kept["guided"] == (again.sentences is not None) and kept["unfinished"] == again.unfinished


def test_pairs_per_sentence(tiny, outcomes):
    config = dataclasses.replace(GREEDY, per_sentence=True)
    (long,) = [one for one in outcomes if one.record.id == "long"]
    assert long.sentences is not None
    pairs, reference = to_records(long, config), long.reference.text
    sentences = RECORDS["long"][0]
    expected = [number for number in range(4) if long.sentences[number].strip() and long.sentences[number] != sentences[number]]
    assert [pair.id for pair in pairs] == [f"long/s{number}" for number in expected] and len(pairs) >= 2
    for number, pair in zip(expected, pairs, strict=True):
        before = "".join(sentences[:number])
        assert pair.prefix == before and pair.complete == (number == 3)
        assert pair.responses[0].text == before + sentences[number] and reference.startswith(pair.responses[0].text)
        assert pair.responses[1].text == before + long.sentences[number] and "  " not in before + long.sentences[number][:2]
        valid(pair, tiny)
        # the prefix is shared and not scored; nothing ends the turn behind a sentence in the middle
        row = tokenize(pair, pair.prefs[0], tiny.processor, 2)
        prompt = prompt_ids(tiny.processor, pair.turns)
        shared = tiny.processor.answer(before).ids[:-1] if before else []
        np.testing.assert_array_equal(row.prefix, [*prompt, *shared])
        for ids, scored in row.answers:
            assert scored.all() and (ids[-1] == tiny.processor.eos_ids[0]) == pair.complete
            assert tiny.processor.eos_ids[0] not in ids[:-1]
    unguided = next(one for one in outcomes if one.sentences is None)
    (whole,) = to_records(unguided, config)
    assert whole.id == unguided.record.id and whole.prefix == "" and whole.complete


def test_white_space_and_empty_sentences_in_pairs(outcomes):
    (space,) = [one for one in outcomes if one.record.id == "space"]
    made = dataclasses.replace(space, sentences=("  A cat.", "", "  No."), rejected="  A cat.  No. \n", problem="")
    (pair,) = to_records(made, dataclasses.replace(GREEDY, per_sentence=True))
    assert pair.id == "space/s0" and pair.responses[1].text == "  A cat." and not pair.complete
    last = dataclasses.replace(made, sentences=("  A green tree.", "\n\nThree people.", "  Yes."))
    (pair,) = to_records(last, dataclasses.replace(GREEDY, per_sentence=True))
    assert pair.prefix == "  A green tree.\n\nThree people." and pair.complete
    assert pair.responses[0].text == "".join(RECORDS["space"][0]) and pair.responses[1].text == pair.prefix + "  Yes. \n"


def test_nothing_new_or_nothing_readable_gives_no_pair(tiny, sampler_of, outcomes, monkeypatch):
    one = dataclasses.replace(outcomes[0], rejected=" ".join(outcomes[0].reference.text.split()))
    assert to_records(one, GREEDY) == []
    # the letters of a special token are no answer: tried again, and counted at the end
    decode = type(tiny.processor).decode
    monkeypatch.setattr(type(tiny.processor), "decode", lambda self, ids: decode(self, ids) + " <image>")
    run = sampler_of()
    (made, _), (_, statistics) = make_pairs(run.sampler, run.params, build()[:2], GREEDY, Statistics())
    assert not made and statistics.unusable == 2 and statistics.unchanged == 0 and statistics.by_iteration == {3: 2}


def test_the_winner_of_a_pair_is_the_reference(sampler_of):
    source = build()[0]
    pair = dataclasses.replace(source, responses=(Response("A cup."), source.responses[0]), prefs=(Preference(1, 0),))
    (a,), (b,) = sampler_of()([pair]), sampler_of()([source])
    assert a.reference == source.responses[0] and a.rejected == b.rejected
    (made,) = to_records(a, GREEDY)
    assert [response.text for response in made.responses] == [source.responses[0].text, a.rejected]


def test_mistakes(sampler_of):
    run = sampler_of(lanes=2)
    with pytest.raises(UserError, match="record long: the reference has 4 sentences, there are 2 lanes"):
        run(build())
    cat = build()[0]
    for change in ({"responses": ()}, {"prefix": "There"}, {"complete": False}):
        with pytest.raises(UserError, match="record cat: BDHS needs a whole reference"):
            run([dataclasses.replace(cat, **change)])
    with pytest.raises(DataError, match="there are 16 slots"):
        # a layout that would cut the reference may not: its later sentences would be completed behind nothing
        sampler_of(answer_slots=8, shorten_answers=True)(build())
    assert run([]) == []


def test_a_swap_that_takes_more_tokens_fits(tiny, sampler_of):
    config = dataclasses.replace(GREEDY, yes_no_swap=1.0, n_iter=1)
    ids = tiny.processor.answer_ids("no")[0]
    (one,) = sampler_of(config, answer_slots=len(ids))([record("r", "Is it?", "no", images=[1])])
    assert one.swapped == (0,) and one.rejected == "yes"


def test_every_attempt_at_a_record_has_its_own_number(sampler_of):
    number = sampler_of().sampler._number
    numbers = {number(draw, iteration) for draw, iteration in itertools.product(range(4), range(1, 4))}
    assert len(numbers) == 12


def test_a_prefix_has_room_for_nearly_every_mask():
    """So that batches whose masks leave more or less of a row are computed in one shape."""
    row = {"image_index": np.r_[np.arange(576), np.full(24, -1)], "role": np.r_[np.full(595, PREFIX), np.zeros(5, np.int8)]}
    room = usual_slots([row], 0.95)
    kept = 19 + np.sum(np.random.default_rng(0).random((20_000, 576)) >= 0.95, axis=1)
    assert kept.max() - 3 <= room <= kept.max() + 3
    assert usual_slots([row, row], 1.0) == 19 and usual_slots([row], 0.0) == 595
