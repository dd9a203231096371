"""Where answers come from: the policy under views, beginnings of the reference, the set, rules and editors."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import checkpoints
from helpers.chat_server import ChatServer
from helpers.tiny import record

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, DataConfig, JudgeConfig, PairsConfig, SamplesConfig
from mmalign_jax.data.layout import lay_out_pictures, tokenize
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.mentions import Mentions
from mmalign_jax.pairs import sources
from mmalign_jax.pairs.answers import check_settings
from mmalign_jax.pairs.own_answers import Prompt
from mmalign_jax.types import Response

RECORDS = [
    dataclasses.replace(record("two", "What is there?", "A cat sits beside a dog.", "Nothing.", images=[1, 2]), meta={"objects": ["cat", "dog"]}),
    dataclasses.replace(record("one", "Describe.", "An owl and a cup.", images=[3]), meta={"objects": ["owl"]}),
    dataclasses.replace(record("no", "A cup?", "No, there is no cup.", images=[4]), meta={"objects": ["dog"]}),
]
TABLE = Mentions({"cat": (), "dog": (), "owl": (), "ant": (), "cup": ("mug",), "egg": ()})




@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = checkpoints.tiny_llava(tmp_path_factory.mktemp("sources"), seed=3)
    return Pretrained.read(directory, mesh_lib.make_mesh(devices=jax.devices()[:1]), "float32")


@pytest.fixture(scope="module")
def ask(policy, tmp_path_factory):
    plan = plan_rows(RECORDS, policy.processor, DataConfig(), answers=0)

    opened, params = {}, policy.params("float32")

    def answers(text, records=RECORDS, rows=2, draw=0, judge=None, **samples):
        config = Config(samples=SamplesConfig(max_tokens=4, seed=5, **samples), judge=judge or JudgeConfig())
        layout = dataclasses.replace(plan.layout, answers=0)
        if (key := (text, rows, config.samples, config.judge)) not in opened:  # compiled once
            replies = tmp_path_factory.mktemp("replies") / "replies.jsonl"
            (opened[key],) = sources.open_sources(sources.parse([text]), policy, config, layout, rows, TABLE, replies)
        prompts = []
        for one in records:
            row = tokenize(one, None, policy.processor, 0)
            prompts.append(Prompt(one, row, lay_out_pictures(one, policy.processor, layout, row)))
        return opened[key](params, prompts, draw)

    return answers


def texts(found):
    return [[one.text for one in each] for each in found]


@pytest.mark.nightly
def test_answers_under_a_view_are_of_it_and_drawn_anew(ask):
    clean, same, black, noise = (ask(text) for text in ("policy", "identity", "black", "diffusion(900)"))
    assert [[len(each) for each in found] for found in (clean, black)] == [[2] * 3] * 2
    assert {one.source for each in black for one in each} == {"black"} and clean[0][0].source == "policy"
    assert noise[0][0].source == "diffusion(t=900,space=normalised)"
    assert np.isfinite(clean[0][0].logps).all() and np.isnan(black[0][0].logps).all()
    assert texts(clean) != texts(black) != texts(noise) and texts(clean) != texts(same)  # a source has draws of its own
    # of record and seed alone, not of the batch
    alone = [ask("diffusion(900)", [one], rows=1)[0] for one in reversed(RECORDS)][::-1]
    assert texts(alone) == texts(noise)
    assert texts(ask("diffusion(900)", draw=1)) != texts(noise)


def test_a_view_is_what_the_policy_sees(ask):
    """Greedy answers to blackened pictures do not depend on the pictures, those to the pictures do."""
    other = [dataclasses.replace(one, media=RECORDS[1].media[:1] * len(one.media)) for one in RECORDS]
    greedy = {"temperature": 0.01, "count": 1}
    assert texts(ask("black", **greedy)) == texts(ask("black", other, **greedy))
    assert texts(ask("identity", **greedy)) != texts(ask("identity", other, **greedy))


def test_a_continued_reference_begins_as_it_and_sees_no_picture(ask):
    found = ask("continued(0.5)")
    assert all(one.text.startswith("A cat sits") and one.source == "continued(cut=0.5)" for one in found[0])
    assert found[0][0].text != found[0][1].text and np.isnan(found[0][0].logps).all()
    other = [dataclasses.replace(one, media=RECORDS[1].media[:1] * len(one.media)) for one in RECORDS]
    assert texts(ask("continued(0.5)", other)) == texts(found)
    assert not ask("continued(0)")[0][0].text.startswith("A cat")
    assert texts([ask("continued(0.5)", [one], rows=1)[0] for one in RECORDS]) == texts(found)


def test_the_sets_own_answers(ask):
    assert texts(ask("dataset")) == [["A cat sits beside a dog.", "Nothing."], ["An owl and a cup."], ["No, there is no cup."]]


def test_swapped_things_are_not_there(ask):
    found = texts(ask("swap"))
    assert found[0][0] in {f"A {one} sits beside a dog." for one in ("cup",)} | {"A cat sits beside a cup."}
    assert found[1][0] in ("An ant and a cup.", "An egg and a cup.")  # it has no cup to be exchanged, and "an" stays true
    assert found[2] == ["Yes, there is no cup."]  # what it names it denies
    assert texts(ask("swap", [dataclasses.replace(RECORDS[2], responses=(Response("Nothing."),))])) == [[]]
    assert texts(ask("swap")) == found and texts(ask("swap(2)"))[0] == []  # one thing is left to take two places
    seen = {texts(ask("swap", draw=draw))[1][0] for draw in range(8)}
    assert len(seen) == 2
    assert texts(ask("swap", [dataclasses.replace(RECORDS[1], responses=(Response("Owls. An owl, a cup."),))]))[0][0] in (
        "Ants. An ant, a cup.", "Eggs. An egg, a cup.",
    )  # fmt: skip
    unknown = dataclasses.replace(RECORDS[2], meta={})
    assert texts(ask("swap", [unknown])) == [["Yes, there is no cup."]]  # it may deny what it names
    many = dataclasses.replace(RECORDS[0], responses=(Response("Two cats."),))
    assert texts(ask("swap", [many])) == [["Two cups."]]


def test_an_editors_answers_and_those_it_does_not_give(ask):
    with ChatServer(lambda question, before: "mute" if question == "Describe." else "ok") as server:
        judge = JudgeConfig(url=server.url, model="editor", attempts=1)
        assert texts(ask("edit", judge=judge)) == [["not A cat sits beside a dog."], [], ["not No, there is no cup."]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "answers come from somewhere. Known: policy, "),
        (["polcy"], "no source 'polcy'. Did you mean policy"),
        (["policy", "policy"], "policy comes twice"),
        (["other_image"], "other_image needs other_images"),
        (["argmax(other_image)"], "other_image needs other_images"),
        (["argmax(difusion(3))"], "config.samples.sources: argmax: view: no view 'difusion'. Did you mean diffusion"),
        (["argmax(diffusion(3,5))"], "argmax: view: diffusion: space must be normalised or pixel, got '5'"),
        (["argmax(where=some)"], "argmax: where must be all or changed, got 'some'. Known: argmax: view .a view, by default diffusion"),
        (["argmax", "argmax(diffusion(500, space=pixel), all)"], "comes twice"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(UserError, match=message):
        sources.parse(given)


def test_a_source_that_lacks_its_settings_is_named(ask):
    with pytest.raises(UserError, match="config.judge.url: the source edit asks"):
        ask("edit")
    with pytest.raises(UserError, match="gives verdicts"):
        ask("edit", judge=JudgeConfig(url="u", model="m", edit_prompt="score"))
    with pytest.raises(UserError, match="config.samples.max_tokens: with the beginning of its reference, record two"):
        ask("continued(0.9)", [dataclasses.replace(RECORDS[0], responses=(Response("word " * 600),), prefs=())])
    with pytest.raises(UserError, match="continued starts from a whole reference answer, which record bare"):
        ask("continued", [dataclasses.replace(RECORDS[0], id="bare", responses=(), prefs=())])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"selector": "best_worst"}, "config.samples.scorers: best_worst goes by scores"),
        ({"selector": "reference_against_own(ceiling=0)"}, "config.samples.scorers: reference_against_own goes by scores"),
        ({"selector": "by_source", "sources": ("policy",)}, "config.samples.sources: by_source sets answers of a source above"),
        ({"selector": "by_source", "sources": ("policy", "black"), "gap": 1.0}, "config.samples.gap: by_source does not go by scores"),
        ({"selector": "all_pairs", "scorers": ("exact",), "sources": ("swap",), "synonyms": "TABLE"}, "config.samples.count: one answer"),
        ({"selector": "unpaired"}, "config.samples.scorers: unpaired goes by scores"),
        ({"selector": "unpaired(by=mean)", "scorers": ("exact",), "count": 1}, "config.samples.count: one answer is compared with nothing"),
        ({"selector": "group(3)", "scorers": ("exact",)}, r"config.samples.count: group takes 3 answers, of 2 that are asked for"),
        ({"selector": "reference_against_own", "sources": ("swap",)}, "config.samples.synonyms: the source swap looks words up"),
        ({"selector": "reference_against_own", "sources": ("edit",)}, "config.judge.url: the source edit asks"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_read(policy, tmp_path, samples, message):
    table = tmp_path / "table.json"
    table.write_text('{"cat": []}')
    samples = {name: str(table) if value == "TABLE" else value for name, value in samples.items()}
    with pytest.raises(UserError, match=message):
        check_settings(Config(samples=SamplesConfig(**samples)), policy.processor, of_samples=False)


def test_what_is_asked_between_steps(policy):
    late = Config(pairs=PairsConfig(when="online"), samples=SamplesConfig(scorers=("exact",), sources=("policy", "dataset")))
    with pytest.raises(UserError, match="config.samples.sources: dataset gives answers before training"):
        check_settings(late, policy.processor, of_samples=False)
    for selector, what in (("unpaired", "labelled answers"), ("group", "groups")):
        online = Config(pairs=PairsConfig(when="online"), samples=SamplesConfig(scorers=("exact",), selector=selector))
        with pytest.raises(UserError, match=f"config.samples.selector: {selector} makes {what}, which train offline"):
            check_settings(online, policy.processor, of_samples=False)
        check_settings(dataclasses.replace(online, pairs=PairsConfig()), policy.processor, of_samples=False)
    check_settings(Config(samples=SamplesConfig(count=1, sources=("dataset",), scorers=("exact",))), policy.processor, of_samples=False)
    one = SamplesConfig(count=1, scorers=("exact",), selector="unpaired")  # it is compared with the threshold
    check_settings(Config(samples=one), policy.processor, of_samples=False)
