"""A reference that is computed once gives what one gives that is computed in every step, and never when something has changed."""

import dataclasses
import io
import json
import re
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.arrays import none_stay
from helpers.checkpoints import tiny_llava
from helpers.lora import random_factors
from helpers.rows import LetterPictures
from helpers.tiny import MIXED, noise_png, record

from mmalign_jax import losses
from mmalign_jax.config import from_mapping
from mmalign_jax.data import logps_writer
from mmalign_jax.data.cached_logps import CachedLogps
from mmalign_jax.data.device import to_device
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.logps_writer import LogpsWriter
from mmalign_jax.data.other_images import OtherImages
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import claimed
from mmalign_jax.hf.adapters import export_adapter
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.losses import Need
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.config import Lora
from mmalign_jax.models.tree import split
from mmalign_jax.report.console import Console
from mmalign_jax.training.cache_key import differences, model_key
from mmalign_jax.training.cached_reference import CachedReference
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.step import init_state
from mmalign_jax.training.step_zero import in_words, largest_log_ratio
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import Media, Response

# Short and long rows: two layouts
LONG = record("long", "What?", "A red cat. " * 6, "Yes, there are two birds. " * 4, images=[3])
RECORDS = (*MIXED, LONG, record("short", "Dog?", "Yes.", "No.", images=[4]))
SETTINGS = {"train": {"batch_size": 4, "seed": 3}, "data": {"buckets": 2, "workers": 0}, "reference": {"kind": "cached"}}


def settings(**groups):
    names = SETTINGS.keys() | groups.keys()
    return from_mapping({name: SETTINGS.get(name, {}) | groups.get(name, {}) for name in names})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("base"))


def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def policy(base):
    return Pretrained.read(base, one_device())


class Case:
    """A run up to training: its rows, its loss, and its cached reference."""

    def __init__(self, policy, directory, config, records=RECORDS):
        self.policy, self.records, self.config, self.directory = policy, records, config, directory
        objective = losses.build(config.objective.name, **config.objective.hyperparameters)
        self.rule = Trainable.of(config, policy.sizes)
        self.loss = LossFunction(policy.model, objective)
        changed = Need.CHANGED in objective.needs
        self.plan = plan_rows(records, policy.processor, config.data, answers=objective.answers, mark_changes=changed)
        views = self.loss.view
        other = views is not None and "other_images" in views.needs
        self.extras = [OtherImages(records, policy.processor, self.plan)] if other else []
        self.said = io.StringIO()

    def cached(self):
        return CachedReference(self.config, self.directory, self.policy, self.loss, Console(self.said))(self.records, self.plan, self.extras)

    def batches(self, extras, count=3):
        """The rows `[B, ...]` of the first steps."""
        options = {"batch_size": self.config.train.batch_size, "workers": 0, "seed": self.config.train.seed}
        loader = make_loader(self.records, self.policy.processor, self.plan, extras=[*self.extras, *extras], **options)
        return [jax.tree.map(lambda x: x[0], next(loader)) for _ in range(count)]


def case(policy, directory, name, records=RECORDS, **groups):
    return Case(policy, directory, settings(objective={"name": name, **groups.pop("objective", {})}, **groups), records)


@pytest.fixture(scope="module")
def cache(policy, tmp_path_factory):
    """A finished cache of mDPO, which holds what DPO, DDPO and LD-DPO read, too. It is not changed."""
    directory = tmp_path_factory.mktemp("cache")
    done = case(policy, directory, "mdpo")
    assert len(done.plan.buckets) == 2
    with none_stay():  # no parameter is kept
        done.cached()
    assert "Computing the reference's log-probs: done" in done.said.getvalue() and "under corrupted images: done" in done.said.getvalue()
    return directory


def moved(params):
    """A policy that is not the reference, so that the numbers are not those of step 0."""
    return jax.tree.map(lambda x: jnp.where(x == 0, 0.05, x * 1.01), params)  # new factors begin with zeros


def both_ways(some, *, gradient=False, step=0):
    """What a live reference and a cached one give: loss and metrics, the reference's sums, and by choice the gradient."""
    mesh, key = some.policy.mesh, jax.random.key(some.config.train.seed)
    with jax.set_mesh(mesh):
        whole = some.policy.params()
        trained, frozen = some.rule.split(whole)
        trained, theirs = moved(trained), split(whole, some.rule.in_reference)[0]

        def loss(params, reference, batch):
            stats = some.loss.statistics(params, frozen, reference, batch, key)
            per_pair, metrics = some.loss.objective(stats)
            sums = [logps.reference for logps in (stats.answers, stats.other_image) if logps is not None]
            return jnp.mean(per_pair), {"loss and metrics": metrics, "sums": sums}

        def run(params, reference, batch):
            return jax.value_and_grad(loss, has_aux=True)(params, reference, batch) if gradient else (loss(params, reference, batch), {})

        run, out = jax.jit(run), []
        for reference, extras in ((theirs, []), (None, some.cached())):
            batch = to_device(some.batches(extras, step + 1)[step], mesh, batch_axis=0)
            (_, values), grads = jax.device_get(run(trained, reference, batch))
            out.append({**values, "gradient": grads})
    return out


def assert_same(live, cached):
    for theirs, ours in zip(live["sums"], cached["sums"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    metrics, others = live["loss and metrics"], cached["loss and metrics"]
    assert others.keys() == metrics.keys() and abs(metrics["chosen_drift"]) > 1e-3
    for name in metrics:
        # rewards are differences of two sums of about -60
        np.testing.assert_allclose(others[name], metrics[name], rtol=5e-6, atol=2e-5, err_msg=name)
    alike = lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())  # noqa: E731
    jax.tree.map(alike, live["gradient"], cached["gradient"])


@pytest.mark.parametrize("name", ["dpo", pytest.param("mdpo", marks=pytest.mark.nightly)])
def test_sums_metrics_and_gradient_are_those_of_a_live_reference(policy, cache, name):
    some = case(policy, cache, name)
    assert len({batch.tokens.shape for batch in some.batches([], 2)}) == 2  # of both layouts
    # in one layout or the other; the gradient of mDPO has that of DPO in it
    assert_same(*(both_ways(some, gradient=True) if name == "mdpo" else both_ways(some, step=1)))
    assert "reused" in some.said.getvalue() and "Computing" not in some.said.getvalue()


@pytest.mark.parametrize(("name", "values"), [("ddpo", {"changed_weight": 7.0}), pytest.param("ld_dpo", {"alpha": 0.3}, marks=pytest.mark.nightly)])
def test_weights_of_tokens_may_change_without_a_new_sweep(policy, cache, name, values):
    some = case(policy, cache, name, objective=values)
    assert_same(*both_ways(some))
    assert "Computing" not in some.said.getvalue()


def test_eight_devices(base, cache, tmp_path):
    records = [dataclasses.replace(one, id=f"{one.id} {half}") for half in range(2) for one in MIXED]
    some = case(Pretrained.read(base, make_mesh(2, 2, 2)), tmp_path, "dpo", records, data={"buckets": 1}, train={"batch_size": 8, "seed": 3})
    assert_same(*both_ways(some))
    assert "Computing" in some.said.getvalue()
    # pictures of the second half are those of the first
    one, eight = (CachedLogps.open(directory / "answers") for directory in (cache, tmp_path))
    count = one.ends[len(MIXED) - 1, -1]
    np.testing.assert_array_equal(one.ends[: len(MIXED)], eight.ends[: len(MIXED)])
    np.testing.assert_allclose(eight.logps, np.tile(one.logps[:count], 2), rtol=1e-5, atol=1e-5)


def test_rows_hold_each_answer_at_its_slots(policy, cache):
    some = case(policy, cache, "mdpo")
    answers, other = some.cached()
    for number in range(len(RECORDS)):
        layout = some.plan.buckets[0 if number in some.plan.buckets[0].members else 1].layout
        row, tokens = answers(number, layout)["reference_logps"], some.plan.tokens[number]
        assert row.shape == (layout.tokens,) and row.dtype == np.float32
        for k, (ids, _) in enumerate(tokens.answers):
            own = row[layout.prefix_slots + k * layout.answer_slots :][: layout.answer_slots]
            assert (own[: len(ids)] < 0).all() and not own[len(ids) :].any()
        assert not row[: layout.prefix_slots].any()
        assert other(number, layout)["reference_other_logps"].shape == (layout.answer_slots,)


@pytest.fixture(scope="module")
def adapters(policy, base, tmp_path_factory):
    """Two adapters with other values and the same sizes."""
    sizes = policy.sizes.with_lora({"decoder": Lora(2, 4.0, ("query", "value"))})
    return [
        export_adapter(random_factors(sizes, seed), sizes, base, tmp_path_factory.mktemp("adapters") / str(seed)) for seed in (0, 1)
    ]


def adapted(policy, **groups):
    return policy.adapted(settings(**groups))


@pytest.mark.nightly
def test_with_low_rank_factors(policy, cache, adapters, tmp_path):
    """New factors are no part of the reference, so the base's cache serves; an adapter that goes on training is."""
    new = case(adapted(policy, lora={"rank": 2}), cache, "dpo", lora={"rank": 2})
    assert_same(*both_ways(new))
    assert "Computing" not in new.said.getvalue()
    model = {"adapter": str(adapters[0])}
    old = case(adapted(policy, model=model), tmp_path / "adapter", "dpo", model=model, data={"buckets": 1})
    assert_same(*both_ways(old))
    with pytest.raises(UserError, match=r"something else: adapter \(adapter_model.safetensors; .*\)\. Delete"):
        case(adapted(policy, model=model), cache, "dpo", model=model).cached()


@pytest.mark.nightly
@pytest.mark.parametrize("view", ["other_image", "diffusion(300)"])
def test_views_of_other_rows_pictures_and_of_float_pixels(policy, cache, tmp_path, view):
    shutil.copytree(cache / "answers", tmp_path / "answers")
    some = case(policy, tmp_path, "mdpo", objective={"view": view}, data={"buckets": 1})
    assert_same(*both_ways(some))


def test_at_step_0_a_difference_of_one_token_is_seen(policy, cache):
    """0.02 nats are added to one; that it is the largest difference says that all others are smaller."""
    some = case(policy, cache, "mdpo")
    batch = jax.tree.map(lambda x: x[None].copy(), some.batches(some.cached(), 1)[0])
    batch.reference_other_logps[0, 0, 1] += 0.02
    with jax.set_mesh(policy.mesh):
        state = init_state(*some.rule.split(policy.params()), optax.sgd(0.1), seed=3)
        assert largest_log_ratio(some.loss, state, to_device(batch, policy.mesh)) == pytest.approx(0.02, abs=1e-4)


@pytest.mark.parametrize(("apart", "words"), [(0.009, ""), (0.5, "up to 0.5 nats an answer apart"), (float("nan"), "up to nan nats")])
def test_a_difference_is_told(apart, words):
    assert words in in_words(apart) and bool(in_words(apart)) == bool(words)


def changed_file(directory, name, change):
    file = directory / name
    file.write_bytes(change(file.read_bytes()))


def set_json(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


def last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 1])


FILES = {
    "weights": ("model.safetensors", last_byte, r"weights \(model\.safetensors\)"),
    "model": ("config.json", lambda data: data.replace(b'_eps": 1e-05', b'_eps": 1e-06'), r"model \(.*decoder\.norm_eps: 1e-05 there, 1e-06 now.*\)"),
    "processor": ("tokenizer_config.json", set_json(model_max_length=1024), r"processor \(tokenizer_config\.json\)"),
    "chat template": ("chat_template.jinja", lambda data: data.replace(b"<image>\n", b"<image> "), "chat_template"),
}  # fmt: skip


@pytest.mark.parametrize("field", ["weights", "model", "processor", "chat template"])
def test_another_model_directory_is_refused_by_the_field(base, cache, tmp_path, field):
    name, change, words = FILES[field]
    shutil.copytree(base, tmp_path / "changed")
    before = (tmp_path / "changed" / name).read_bytes()
    changed_file(tmp_path / "changed", name, change)
    assert (tmp_path / "changed" / name).read_bytes() != before
    some = case(Pretrained.read(tmp_path / "changed", one_device()), cache, "dpo")
    refused(some, cache, words)


def refused(some, cache, *words, part="answers"):
    """The error names these fields and no others, the file, and the mend."""
    with pytest.raises(UserError) as caught:
        some.cached()
    text = str(caught.value)
    found = re.fullmatch(r"(.*): the reference's .* were computed from something else: (.*)\. Delete (.*), or choose another .*", text)
    assert found and found[1] == str(cache / part / "key.json") and found[3] == str(cache / part)
    assert "config.reference.cache" in text
    assert re.fullmatch("; ".join(words), found[2]), found[2]
    assert "Computing" not in some.said.getvalue()


def with_change(number, **changes):
    return [dataclasses.replace(one, **changes) if place == number else one for place, one in enumerate(RECORDS)]


def test_other_records_are_refused_and_the_first_is_named(policy, cache):
    content = r"data \(content\)"
    longer = with_change(2, responses=(Response("No, there is not any cat!"), RECORDS[2].responses[1]))
    refused(case(policy, cache, "dpo", longer), cache, content, "the first record that differs is number 2, text")
    picture = with_change(3, media=(Media("image", noise_png(9)),))
    refused(case(policy, cache, "dpo", picture), cache, content, "the first record that differs is number 3, blue")
    turned = [RECORDS[1], RECORDS[0], *RECORDS[2:]]
    refused(case(policy, cache, "dpo", turned), cache, content, "the first record that differs is number 0, two")
    fewer = RECORDS[:-1]
    refused(case(policy, cache, "dpo", fewer), cache, r"data \(content; items; records: 6 there, 5 now; rows: 6 there, 5 now\)", "the set had 6 .*")
    swapped = with_change(0, prefs=(dataclasses.replace(RECORDS[0].prefs[0], win=1, lose=0),))
    refused(case(policy, cache, "dpo", swapped), cache, content, "the first record that differs is number 0, red")
    limits = {"buckets": 2, "answer_tokens": 64, "on_long_row": "shorten_answer"}
    changed = r'data \(answer_tokens: 0 there, 64 now; on_long_row: "error" there, "shorten_answer" now\)'
    refused(case(policy, cache, "dpo", data=limits), cache, changed)


def test_what_no_log_prob_depends_on_may_change(policy, cache):
    pref = dataclasses.replace(RECORDS[0].prefs[0], weight=0.5, margin=2.0)
    other = with_change(0, prefs=(pref,), meta={"by": "somebody"}, media=(dataclasses.replace(RECORDS[0].media[0], origin="elsewhere"),))
    some = case(policy, cache, "dpo", other, train={"batch_size": 2, "seed": 4}, data={"buckets": 1})
    assert len(some.cached()) == 1 and "reused" in some.said.getvalue()


def test_another_computation_is_refused_by_the_field(base, policy, cache):
    half = Pretrained.read(base, policy.mesh, "bfloat16")
    types = [f'{name} \\("float32" there, "bfloat16" now\\)' for name in ("compute_dtype", "reference_dtype")]
    refused(case(half, cache, "dpo"), cache, *types)
    refused(case(policy, cache, "dpo", model={"reference_dtype": "bfloat16"}), cache, types[1])
    sized = dataclasses.replace(policy, processor=dataclasses.replace(policy.processor, pictures=LetterPictures()))
    now = model_key(sized, "float32")
    assert differences(model_key(policy, "float32"), now)[0].startswith("resolution (1024 x 768: ") and len(now["resolution"]) > 3
    assert differences({"platform": "cpu"}, {"platform": "tpu"}) == ['platform ("cpu" there, "tpu" now)']


def test_another_view_and_another_seed_are_refused_by_the_field(policy, cache):
    other = case(policy, cache, "mdpo", objective={"view": "random_crop(0.1,0.2)"})
    refused(other, cache, "view", part="other_image")
    seeded = case(policy, cache, "mdpo", train={"batch_size": 4, "seed": 4})
    refused(seeded, cache, r"seed \(3 there, 4 now\)", part="other_image")
    fixed = case(policy, cache, "mdpo", objective={"view": "black"}, train={"batch_size": 4, "seed": 4})
    refused(fixed, cache, "seed.*", 'view', part="other_image")


def test_two_adapters_are_told_apart(policy, adapters):
    one, two = (model_key(adapted(policy, model={"adapter": str(directory)}), "float32") for directory in adapters)
    assert differences(one, two) == ["adapter (adapter_model.safetensors)"]


def test_a_sweep_that_was_killed_goes_on_where_it_was(policy, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(logps_writer, "PART_ROWS", 2)
    some, add = case(policy, tmp_path, "dpo", data={"buckets": 1}), LogpsWriter.add

    def killed(writer, number, lengths, logps):
        if writer.done.sum() == 3:
            raise KeyboardInterrupt
        add(writer, number, lengths, logps)

    monkeypatch.setattr(LogpsWriter, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        some.cached()
    assert CachedLogps.open(tmp_path / "answers") is None and not (tmp_path / "answers").exists()
    # three rows were computed, two of them were kept
    monkeypatch.setattr(LogpsWriter, "add", add)
    again = case(policy, tmp_path, "dpo", data={"buckets": 1}, reference={"kind": "cached", "batch_size": 4})
    again.cached()
    assert "Going on: the log-probs of 2 of 6 rows are there" in again.said.getvalue()
    whole, parts = (CachedLogps.open(directory / "answers") for directory in (cache, tmp_path))
    np.testing.assert_array_equal(whole.ends, parts.ends)
    np.testing.assert_allclose(parts.logps, whole.logps, rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".answers.lock", "answers"]


def written(directory, key, numbers=(1, 0), finish=True):
    writer = LogpsWriter(directory / "answers", key, (2, 2))
    for number in numbers:
        writer.add(number, np.array([number + 1, 2], np.int32), -np.ones((2, 4), np.float32) * (number + 1))
    if finish:
        writer.finish(np.zeros((1, 16), np.uint8))
    return writer


def test_parts_of_another_key_are_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(logps_writer, "PART_ROWS", 1)
    written(tmp_path, {"a": 1}, numbers=(1,), finish=False)
    assert LogpsWriter(tmp_path / "answers", {"a": 1}, (2, 2)).done.tolist() == [False, True]
    assert not LogpsWriter(tmp_path / "answers", {"a": 2}, (2, 2)).done.any()
    with pytest.raises(ValueError, match="2 items"):
        LogpsWriter(tmp_path / "answers", {"a": 2}, (2, 2)).finish(np.zeros((1, 16), np.uint8))


def test_rows_may_come_in_any_order(tmp_path):
    written(tmp_path, {"a": 1})
    there = CachedLogps.open(tmp_path / "answers")
    assert there.key == {"a": 1} and there.ends.tolist() == [[1, 3], [5, 7]] and there.logps.tolist() == [-1, -1, -1, -2, -2, -2, -2]


def test_another_run_that_writes_the_same_is_waited_for(tmp_path):
    told = []
    with claimed(tmp_path / "cache" / "answers", lambda: told.append("first")):
        other = threading.Thread(target=lambda: second(tmp_path / "cache" / "answers", told))
        other.start()
        while "waiting" not in told:
            assert other.is_alive()
            time.sleep(0.01)
        assert told == ["waiting"]
    other.join(timeout=20)
    assert told == ["waiting", "in"]


def second(directory, told):
    with claimed(directory, lambda: told.append("waiting")):
        told.append("in")


@pytest.mark.parametrize("name", ["logps.npy", "lengths.npy", "records.npy", "key.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    written(tmp_path, {"a": 1})
    file = tmp_path / "answers" / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-2] if damage == "truncated" else data[:-3] + b"]" + data[-2:])
    words = {"truncated": "truncated", "changed": "corrupt", "missing": "missing"}[damage] if name != "key.json" else "damaged|no such file"
    with pytest.raises(UserError, match=words) as caught:
        CachedLogps.open(tmp_path / "answers")
    assert str(file) in str(caught.value)


def test_an_answer_that_is_too_long_for_its_row_is_no_row(tmp_path, policy, cache):
    layout = dataclasses.replace(case(policy, cache, "dpo").plan.layout, answer_slots=1)
    written(tmp_path, {"a": 1})
    with pytest.raises(DataError, match="lengths.npy: answer 0 of item 1 has 2 tokens, its row has 1 slots"):
        CachedLogps.open(tmp_path / "answers")(1, layout)
