"""The likeliest token at each place of a reference, given the reference before it."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import checkpoints
from helpers.tiny import Tiny, batch_of, prefill, quick_jit, record

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, DataConfig, SamplesConfig
from mmalign_jax.data.layout import lay_out_pictures, tokenize
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs import sources
from mmalign_jax.pairs.answers import plan_answers
from mmalign_jax.pairs.own_answers import Prompt
from mmalign_jax.pairs.sampled_records import SampleStatistics, sampled_pairs
from mmalign_jax.types import FIRST_ANSWER, PREFIX, Response

RECORDS = [
    record("two", "What is there?", "A cat sits beside a dog.", images=[1, 2]),
    record("one", "Describe.", "An owl, and a small cup on the red table.", images=[3]),
    record("no", "A cup?", "No.", images=[4]),
]




@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = checkpoints.tiny_llava(tmp_path_factory.mktemp("argmax"), seed=3)
    return Pretrained.read(directory, mesh_lib.make_mesh(devices=jax.devices()[:1]), "float32")


@pytest.fixture(scope="module")
def ask(policy, tmp_path_factory):
    opened, params = {}, {}
    layout = dataclasses.replace(plan_rows(RECORDS, policy.processor, DataConfig(), answers=0).layout, answers=0)

    def answers(text, records=RECORDS, rows=4, draw=0, seed=5, processor=policy.processor, mesh=policy.mesh):
        if (key := (text, rows, seed, processor.banned_ids, mesh)) not in opened:
            config, replies = Config(samples=SamplesConfig(seed=seed)), tmp_path_factory.mktemp("replies") / "replies.jsonl"
            of = dataclasses.replace(policy, processor=processor, mesh=mesh)
            (opened[key],) = sources.open_sources(sources.parse([text]), of, config, layout, rows, None, replies)
        prompts = []
        for one in records:
            row = tokenize(one, None, policy.processor, 0)
            prompts.append(Prompt(one, row, lay_out_pictures(one, policy.processor, layout, row)))
        if mesh not in params:
            with jax.set_mesh(mesh):
                params[mesh] = dataclasses.replace(policy, mesh=mesh).params("float32")
        found = opened[key](params[mesh], prompts, draw)
        assert all(len(each) == 1 for each in found)
        return [each[0] for each in found]

    return answers


def ids(found):
    return [one.tokens.tolist() for one in found]


def test_they_are_the_models_likeliest_tokens(ask, policy):
    """Against all logits of the rows, by hand."""
    tiny = Tiny.load(policy.path)
    batch = batch_of(RECORDS, tiny.processor, answers=1)
    run = quick_jit(lambda params: tiny.model.logits(params, prefill(tiny.model, params, batch).hidden))
    logits, role, tokens = (np.array(x) for x in (run(tiny.params), batch.role, batch.tokens))
    # as if the likeliest tokens of the first answer were special
    more = tuple(set(ask("argmax(identity)")[0].tokens[:-1].tolist()))
    special = dataclasses.replace(policy.processor, banned_ids=(*policy.processor.banned_ids, *more))
    logits[..., [*special.banned_ids, *special.eos_ids]] = -np.inf
    found = ask("argmax(identity)", processor=special)
    assert more and not set(more) & set(found[0].tokens.tolist())
    for row, one in enumerate(found):
        answer = np.flatnonzero(role[row] == FIRST_ANSWER)
        before = [np.flatnonzero(role[row] == PREFIX)[-1], *answer[:-1]]
        assert one.tokens[:-1].tolist() == logits[row, before].argmax(axis=-1)[:-1].tolist()
        assert one.tokens[-1] == tokens[row, answer[-1]] and len(one.tokens) == len(answer)  # it ends where the reference ends
        assert one.text == tiny.processor.decode(one.tokens) and one.finished and np.isnan(one.logps).all()
        assert one.source == "argmax(view=identity,where=all)"


def test_they_see_the_view_and_nothing_else(ask):
    other = [dataclasses.replace(one, media=RECORDS[1].media * len(one.media)) for one in RECORDS]
    assert ids(ask("argmax(black)")) == ids(ask("argmax(black)", other))
    assert ids(ask("argmax(identity)")) != ids(ask("argmax(identity)", other))


@pytest.mark.nightly
def test_they_are_of_seed_record_and_draw_alone(ask):
    noise = ids(ask("argmax"))
    assert [ids(ask("argmax", [one], rows=1))[0] for one in reversed(RECORDS)][::-1] == noise
    assert ids(ask("argmax", mesh=mesh_lib.make_mesh(2, 2, 2))) == noise
    assert ids(ask("argmax", draw=1)) != noise and ids(ask("argmax", seed=6)) != noise


def test_only_what_the_view_changes(ask, policy):
    references = [policy.processor.answer_ids(one.responses[0].text)[0].tolist() for one in RECORDS]
    assert ids(ask("argmax(identity,where=changed)")) == references
    changed, said, clean = (ids(ask(f"argmax({text})")) for text in ("black,where=changed", "black", "identity"))
    for row, reference in enumerate(references):
        expected = [own if one == other else one for own, one, other in zip(reference, said[row], clean[row], strict=True)]
        assert changed[row] == expected
    assert changed != references and changed != said


def test_mistakes_are_named(ask):
    with pytest.raises(UserError, match="argmax starts from a whole reference answer, which record bare"):
        ask("argmax(black)", [dataclasses.replace(RECORDS[0], id="bare", responses=())])
    with pytest.raises(UserError, match="record odd: the tokenizer cannot read its reference .*<image>"):
        ask("argmax(black)", [dataclasses.replace(RECORDS[0], id="odd", responses=(Response("An <image>."),))])
    with pytest.raises(UserError, match=r"prefix and answer take \d+ positions, the model was made for 512"):
        ask("argmax(black)", [dataclasses.replace(RECORDS[0], id="long", responses=(Response("word " * 600),))])


def test_pairs_of_them_and_of_those_that_cannot_be_read(policy, tmp_path):
    """Every record is a pair of its reference and the answer, or counted with the reason why not."""
    config = Config(samples=SamplesConfig(sources=("argmax(black)",), selector="reference_against_own", max_tokens=4))
    answerer, _ = plan_answers(policy, RECORDS, config, answers=1, rows=2, replies=tmp_path / "replies.jsonl")
    *_, (_, counts) = made = list(sampled_pairs(answerer, policy.params("float32"), RECORDS, config.samples, SampleStatistics()))
    assert counts.records == 3 and counts.paired + sum(counts.refused.values()) == 3 and counts.paired
    for pairs, _ in made:
        for one in pairs:
            assert one.responses[one.prefs[0].win].text == next(r for r in RECORDS if r.id == one.id).responses[0].text
            assert one.responses[one.prefs[0].lose].source == "argmax(view=black,where=all)"
