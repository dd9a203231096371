"""Pairs of a whole set: streamed, made once, and made again when they would be others."""

import dataclasses
import io
import json
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from helpers import checkpoints
from helpers.tiny import record

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, DataConfig, PairsConfig, SamplesConfig
from mmalign_jax.data import builder
from mmalign_jax.data.bad_rows import place_of
from mmalign_jax.data.sources.source import Source
from mmalign_jax.data.validate import check_record
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import claimed
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs import offline
from mmalign_jax.pairs.answers import Answered, Answerer
from mmalign_jax.pairs.bdhs_records import Statistics
from mmalign_jax.pairs.journal import Journal
from mmalign_jax.pairs.own_answers import Own, Prompt
from mmalign_jax.pairs.sampled_records import SampleStatistics, sampled_pairs
from mmalign_jax.pairs.scorers import Scored, Truth, parse
from mmalign_jax.report.console import Console
from mmalign_jax.types import Group, Label, Preference, Response

MESH = mesh_lib.make_mesh(devices=jax.devices()[:1])
PAIRS = PairsConfig(maker="bdhs", rho_th=0.7, n_iter=2, max_sentence_tokens=4, max_answer_tokens=16, batch_size=4)
CONFIG = Config(pairs=PAIRS, data=DataConfig(workers=0))
RECORDS = [record(f"r{number}", "What is it?", f"A cup. {number} dogs.", images=[number]) for number in range(5)]




@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoints.tiny_llava(tmp_path_factory.mktemp("offline"), seed=3)


@pytest.fixture(scope="module")
def policy(directory):
    return Pretrained.read(directory, MESH)


def prepared(out, records=RECORDS, name="1"):
    return builder.open_records(builder.prepare(DataConfig(), Source("rows", name, lambda: iter(records)), out).dir)


def make(policy, records, out, config=CONFIG):
    """The pairs and what was said while they were made."""
    said = io.StringIO()
    return offline.make_offline(policy, records, config, out, Console(said)), said.getvalue()


def pairs_of(made):
    found = builder.open_records(made.prepared.dir)
    return list(map(found.__getitem__, range(len(found))))


def test_made_once_and_the_same_from_references_and_from_pairs(policy, tmp_path):
    made, said = make(policy, prepared(tmp_path / "set"), tmp_path / "pairs")
    counts = made.statistics
    assert not made.prepared.reused and "Making pairs ..." in said and "Loading the model ..." in said
    assert counts.records == 5 == counts.pairs + counts.unchanged + counts.unusable and sum(counts.by_iteration.values()) == 5
    assert len(pairs_of(made)) == counts.pairs > 0
    again, said = make(policy, prepared(tmp_path / "set"), tmp_path / "pairs")
    assert again.prepared.reused and said == ""
    assert (again.statistics, again.left_out) == (counts, ())

    # answers that nobody asked for change nothing
    with_answers = [
        dataclasses.replace(one, responses=(Response("Rejected before."), one.responses[0]), prefs=(Preference(1, 0),)) for one in RECORDS
    ]
    other, _ = make(policy, prepared(tmp_path / "other", with_answers), tmp_path / "other_pairs")
    assert pairs_of(other) == pairs_of(made) and other.statistics == counts


def test_the_sets_own_rejected_answers_by_gamma(policy, tmp_path):
    config = dataclasses.replace(CONFIG, pairs=dataclasses.replace(PAIRS, gamma=0.25))
    own = [dataclasses.replace(one, responses=(Response("A cat."), *one.responses), prefs=(Preference(1, 0, 0.5, 3.0),)) for one in RECORDS]
    made, _ = make(policy, prepared(tmp_path / "set", own), tmp_path / "pairs", config)
    plain, _ = make(policy, prepared(tmp_path / "references"), tmp_path / "plain")
    rejected = {pair.id: (pair.responses[1].text, pair.prefs[0].margin) for pair in pairs_of(plain)}
    assert 0 < len(rejected) and made.statistics.unchanged + made.statistics.unusable == len(RECORDS) - len(rejected)
    for pair, record_ in zip(pairs_of(made), RECORDS, strict=True):
        assert [one.text for one in pair.responses[:2]] == [record_.responses[0].text, "A cat."]
        assert pair.prefs[0] == Preference(0, 1, 0.25, 3.0)
        if record_.id in rejected:
            text, margin = rejected[record_.id]
            assert pair.responses[2].text == text and pair.prefs[1:] == (Preference(0, 2, 0.75, margin),)
        else:
            assert len(pair.responses) == 2 and len(pair.prefs) == 1
    with pytest.raises(UserError, match="config.pairs.gamma: record r0 has 0 rejected answers of its own, not one"):
        make(policy, prepared(tmp_path / "references"), tmp_path / "none", config)


def test_runs_share_a_cache_of_pairs(policy, tmp_path):
    config = dataclasses.replace(CONFIG, pairs=dataclasses.replace(PAIRS, cache=str(tmp_path / "cache")))
    records, said = prepared(tmp_path / "set"), io.StringIO()
    made, again = (offline.make_cached(policy, records, config, Console(said)) for _ in range(2))
    assert (made.prepared.reused, again.prepared.reused) == (False, True) and made.prepared.dir == again.prepared.dir
    assert pairs_of(made) == pairs_of(make(policy, records, tmp_path / "own", config)[0])
    other = dataclasses.replace(config, pairs=dataclasses.replace(config.pairs, seed=7))
    assert offline.make_cached(policy, records, other, Console(said)).prepared.dir.parent == made.prepared.dir.parent != made.prepared.dir
    assert pairs_of(again) == pairs_of(made) and "waiting" not in said.getvalue()  # the first set is still there
    with claimed(made.prepared.dir):
        thread = threading.Thread(target=offline.make_cached, args=(policy, records, config, Console(said)), daemon=True)
        thread.start()
        thread.join(timeout=3)
        assert thread.is_alive() and f"Another run makes {made.prepared.dir}; waiting for it" in said.getvalue()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_records_that_do_not_fit_are_named(policy, tmp_path):
    long = record("long", "What?", "A table. " * 20, images=[1])
    config = dataclasses.replace(CONFIG, data=DataConfig(workers=0, answer_tokens=48, on_long_row="drop"))
    made, _ = make(policy, prepared(tmp_path / "set", [*RECORDS[:2], long]), tmp_path / "pairs", config)
    for found in (made, offline.read_offline(made.prepared, config)):
        assert [row.record_id for row in found.left_out] == ["long"] and found.left_out[0].policy == "dropped_long"
        assert isinstance(found.statistics, Statistics) and found.statistics.records == 2


def test_pairs_are_not_held_in_memory(policy, tmp_path, monkeypatch):
    """Rows reach the builder while later records have not been read."""
    read, read_before = [], []

    class Counting(builder.RecordSource):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    def one_at_a_time(sampler, params, records, config, statistics):
        del read[:]  # what the plan read
        for number, one in enumerate(records):
            answers = (one.responses[0], Response("A tree.", source="bdhs"))
            statistics = dataclasses.replace(statistics, records=number + 1, pairs=number + 1)
            yield [dataclasses.replace(one, responses=answers, prefs=(Preference(0, 1),))], statistics

    def watching(config, source, out, **options):
        def rows():
            for row in source.rows():
                read_before.append(len(read))
                yield row

        return prepare(config, dataclasses.replace(source, rows=rows), out, **options)

    records, prepare = prepared(tmp_path / "set"), builder.prepare
    monkeypatch.setattr(records, "__class__", Counting)
    monkeypatch.setattr(offline, "make_pairs", one_at_a_time)
    monkeypatch.setattr(builder, "prepare", watching)
    make(policy, records, tmp_path / "pairs")
    assert read_before == [1, 2, 3, 4, 5]


def test_an_interrupted_run_leaves_nothing_and_damaged_statistics_are_named(policy, tmp_path, monkeypatch):
    records = prepared(tmp_path / "set")

    def stopped(sampler, params, rows, config, statistics):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(offline, "make_pairs", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(policy, records, tmp_path / "pairs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    made, _ = make(policy, records, tmp_path / "pairs")
    for damage, problem in ((lambda file: file.write_text("{"), "damaged"), (os.remove, "missing")):
        damage(made.prepared.dir / builder.STATISTICS)
        with pytest.raises(DataError, match=f"statistics.json: {problem}.* Delete .* and make the pairs again"):
            make(policy, records, tmp_path / "pairs")


@pytest.mark.parametrize("maker", [pytest.param("bdhs", marks=pytest.mark.nightly), "samples"])
def test_a_killed_run_goes_on_with_the_record_that_it_was_at(policy, tmp_path, monkeypatch, maker):
    """Nothing is made twice, nothing is lost, and the counts are those of a run that was not killed."""
    scorers = {"scorers": ("objects(wrong=0.5)", "length(-0.1)"), "synonyms": str(tmp_path / "table.json")}
    samples = SamplesConfig(count=3, max_tokens=6, batch_size=2, stop_strings=("e", "a"), **scorers)
    (tmp_path / "table.json").write_text(json.dumps({letter: [] for letter in "abcdef"}))
    config = dataclasses.replace(CONFIG, pairs=dataclasses.replace(PAIRS, maker=maker), samples=samples)
    records = prepared(tmp_path / "set", [dataclasses.replace(one, meta={"objects": ["a"]}) for one in RECORDS])
    whole, _ = make(policy, records, tmp_path / "whole", config)
    name = {"bdhs": "make_pairs", "samples": "sampled_pairs"}[maker]
    work, asked = getattr(offline, name), []

    def killed(*arguments):
        sampler, params, rows, *others = arguments
        listed = list(rows)
        asked.extend(one.id for one in listed)
        for number, made in enumerate(work(sampler, params, iter(listed), *others)):
            if number == 2 and len(listed) == len(RECORDS):
                raise KeyboardInterrupt
            yield made

    with monkeypatch.context() as patch:
        patch.setattr(offline, name, killed)
        with pytest.raises(KeyboardInterrupt):
            make(policy, records, tmp_path / "pairs", config)
        journal = tmp_path / ".pairs.made.jsonl"
        with journal.open("ab") as opened:
            opened.write(b'{"pairs": ["{')  # a line that the kill cut off
        asked.clear()
        made, said = make(policy, records, tmp_path / "pairs", config)
    assert asked == ["r2", "r3", "r4"] and "Going on: 2 of 5 records are done" in said
    assert pairs_of(made) == pairs_of(whole) and made.statistics == whole.statistics and made.statistics.records == 5
    assert not journal.exists()
    journal.write_text('"of other settings"\n{"pairs": [], "statistics": {}}\n')
    with Journal(journal, "of these") as other:
        assert len(other) == 0
    assert not journal.exists()


def test_answers_that_no_record_can_hold_are_left_out_and_counted(policy):
    """Empty, spelling an image, or cut: they were drawn, and would stop the set, or be trained on as if they ended."""
    one = dataclasses.replace(RECORDS[0], meta={"objects": ["a"]})
    texts = [("A a.", True), ("", True), ("A <image> b.", True), ("b b a", False), ("b.", True)]
    owns = [Own(np.zeros(2, np.int32), np.zeros(2, np.float32), text, finished) for text, finished in texts]
    scored = [Scored(float(len(texts) - number), {}) for number in range(len(texts))]
    answered = Answered(Prompt(one, None, {}), owns, scored)

    class Answering(Answerer):
        def __call__(self, params, records, draw):
            return [answered for _ in records]

    answering, config = Answering(policy.processor, (), parse((), Truth()), None), SamplesConfig(scorers=("exact",))
    (((made,), counts),) = sampled_pairs(answering, {}, [one], config, SampleStatistics())
    assert [response.text for response in made.responses] == ["A a.", "b."] and made.prefs == (Preference(0, 1, margin=4.0),)
    assert counts.refused == {"out of tokens": 1, "unreadable": 2} and (counts.pairs, counts.answers) == (1, 5)
    check_record(made, place_of(made), max_pixels=1 << 20, max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("selector", "rows", "refused"),
    [
        ("unpaired(2.5)", {"labels": (Label(0, True), Label(1, True), Label(3, False))}, {"identical texts": 1, "out of tokens": 1}),
        ("unpaired(by=mean)", {"labels": (Label(0, True), Label(3, False))}, {"identical texts": 1, "out of tokens": 1, "tie": 1}),
        ("group(4)", {"groups": (Group((0, 1, 2, 3)),)}, {"out of tokens": 1}),
        ("group", {}, {"group is not whole": 1, "out of tokens": 1}),
    ],
)
def test_scored_answers_that_are_not_paired(policy, selector, rows, refused):
    """Indices are those of the record's answers, which hold the scores; a record without a row is left out, and told why."""
    texts = [("A a.", True, 6.0), ("b.", True, 3.0), ("b.", True, 2.0), ("b b a", False, 9.0), ("c.", True, 1.0)]
    owns = [Own(np.zeros(2, np.int32), np.zeros(2, np.float32), text, finished) for text, finished, _ in texts]
    answered = Answered(Prompt(RECORDS[0], None, {}), owns, [Scored(score, {}) for *_, score in texts])

    class Answering(Answerer):
        def __call__(self, params, records, draw):
            return [answered for _ in records]

    answering = Answering(policy.processor, (), parse((), Truth()), None)
    config = SamplesConfig(scorers=("exact",), selector=selector, count=5)
    ((made, counts),) = sampled_pairs(answering, {}, RECORDS[:1], config, SampleStatistics())
    assert counts.refused == refused and counts.pairs == len(rows.get("labels", rows.get("groups", ()))) and counts.answers == 5
    assert len(made) == bool(rows)
    for one in made:
        assert [(answer.text, answer.score) for answer in one.responses] == [("A a.", 6.0), ("b.", 3.0), ("b.", 2.0), ("c.", 1.0)]
        assert {"labels": one.labels, "groups": one.groups} == {"labels": (), "groups": ()} | rows and one.prefs == () and one.reference is None
        check_record(one, place_of(one), max_pixels=1 << 20, max_bytes=1 << 20)


def test_no_pair_at_all_and_several_processes(policy, tmp_path, monkeypatch):
    records = prepared(tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(offline, "make_pairs", lambda sampler, params, rows, config, counts: iter([([], Statistics(records=5, unchanged=5))]))
        with pytest.raises(UserError, match="config.pairs: no pair came out of 5 records"):
            make(policy, records, tmp_path / "pairs")
    made, _ = make(policy, records, tmp_path / "pairs")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert make(policy, records, tmp_path / "pairs")[0].prepared.reused  # pairs that are there are read by every process
    with pytest.raises(UserError, match="making pairs runs in one process"):
        make(policy, records, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists() and pairs_of(made)


def test_identity_of_settings_and_records(policy, tmp_path):
    records = prepared(tmp_path / "set")

    def identity(*, records=records, dtype="float32", data=None, **pairs):
        model = dataclasses.replace(policy.model, dtype=dtype)
        config = dataclasses.replace(CONFIG, pairs=dataclasses.replace(PAIRS, **pairs), data=dataclasses.replace(CONFIG.data, **(data or {})))
        return offline.identity(dataclasses.replace(policy, model=model), records, config)

    same, fields = identity(), {field.name for field in dataclasses.fields(PairsConfig)}
    changes = {
        "rho_th": 0.5, "n_iter": 3, "eps": 0.5, "temperature": 0.5, "top_p": 0.5, "max_sentence_tokens": 5, "yes_no_swap": 0.1,
        "per_sentence": True, "similarity": "another", "seed": 1, "noise_steps": 5, "guided": False, "gamma": 0.5,
            "max_answer_tokens": 9, "mask_scope": "text", "split_unit": "token", "stop": "full_stop",
    }  # fmt: skip
    assert fields == changes.keys() | {"maker", "when", "every", "batch_size", "encoder", "cache"}
    others = [identity(**{name: value}) for name, value in changes.items()]
    others += [identity(dtype="bfloat16"), identity(data={"answer_tokens": 64}), identity(data={"on_long_row": "drop"})]
    others += [identity(records=prepared(tmp_path / "other", RECORDS[:2], "2"))]
    assert len({same, *others}) == 1 + len(others)
    assert identity(when="online", batch_size=8, cache="elsewhere", data={"workers": 7, "cache": "elsewhere"}) == same


def test_identity_sees_an_image_file_that_changed(policy, tmp_path):
    """The rows of such a set and its settings stay the same; only what their paths lead to is another picture."""
    image = tmp_path / "x.png"

    def identity(content):
        image.write_bytes(content)
        source = Source("rows", "1", lambda: iter(RECORDS[:1]), side_files={str(image): (image.stat().st_size, image.stat().st_mtime_ns)})
        return offline.identity(policy, builder.open_records(builder.prepare(DataConfig(), source, tmp_path / "set").dir), CONFIG)

    assert identity(b"one picture") != identity(b"another picture")


def test_identity_of_the_models_files(policy, directory, tmp_path):
    records, copy = prepared(tmp_path / "set"), tmp_path / "model"
    shutil.copytree(directory, copy)

    def identity(path=copy):
        return offline.identity(dataclasses.replace(policy, path=path), records, CONFIG)

    same = identity()
    assert same == identity(directory)  # where it lies does not matter; copytree keeps the times of files
    for name, content in (("README.md", "# Card"), ("mmalign_export.json", "{}"), (".gitattributes", "*")):
        (copy / name).write_text(content)
    assert identity() == same
    os.utime(copy / "tokenizer.json")  # a time alone is no change of a small file
    assert identity() == same
    seen = {same}
    for name in ("chat_template.jinja", "tokenizer.json", "preprocessor_config.json", "config.json"):
        (copy / name).write_text((copy / name).read_text() + " ")
        seen.add(identity())
    generation = copy / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": 2}))
    seen.add(identity())
    weights = next(copy.glob("*.safetensors"))
    os.utime(weights)
    seen.add(identity())
    assert len(seen) == 7
