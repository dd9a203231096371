"""Logits, answer log-probs and greedy generation equal transformers on the same weights, whatever the config says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import quiet, tiny_llava
from helpers.tiny import MIXED, Tiny, batch_of, prefill, quick_jit
from safetensors.torch import load_file, save_file

from mmalign_jax import losses
from mmalign_jax.hf.export import export
from mmalign_jax.sampling import DecodeOptions, LaneStart, decode_lanes, lane_keys
from mmalign_jax.types import FIRST_ANSWER, PREFIX, PairBatch

TOKENS = 32
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}

CONFIGS = {
    "grouped heads, two shards": dict(layout="hub", shards=2),
    "odd sizes": dict(
        text={"hidden_size": 21, "head_dim": 10, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 33},
        vision={"hidden_size": 18, "num_attention_heads": 3, "intermediate_size": 23, "image_size": 28, "patch_size": 9},
    ),
    "mistral, window of 8": dict(text={"model_type": "mistral", "head_dim": 6, "sliding_window": 8}),
    "linear rope": dict(text={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama3 rope": dict(text={"rope_parameters": LLAMA3}),
    "tied head": dict(tie_word_embeddings=True, text={"tie_word_embeddings": True}),
    "biases, other activations": dict(
        text={"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        vision={"hidden_act": "gelu"},
        projector_hidden_act="relu",
        seed=6,
    ),
    "last layer, no projector bias": dict(vision_feature_layer=-1, multimodal_projector_bias=False),
    "several layers and the class token": dict(vision_feature_layer=[-2, 0, -1], vision_feature_select_strategy="full"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's thread pool costs more than such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torch_model(directory) -> transformers.LlavaForConditionalGeneration:
    with quiet():
        model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    # a hub checkpoint's own settings (sampling, penalties) would make "greedy" something else than argmax
    model.generation_config = transformers.GenerationConfig(pad_token_id=4)
    return model


def inputs(tiny: Tiny, batch: PairBatch, row: int, answer: int | None = None) -> dict[str, torch.Tensor]:
    """One row's prefix, and one answer behind it, as transformers takes it. Pixels are normalised here, by numpy."""
    role = np.asarray(batch.role[row])
    slots = (role == PREFIX) | (role == (FIRST_ANSWER + answer if answer is not None else PREFIX))
    values = {"input_ids": torch.tensor(np.asarray(batch.tokens[row])[slots][None], dtype=torch.long)}
    if images := len(MIXED[row].media):
        pixels = np.asarray(batch.images[row, :images], np.float32) / 255
        pixels = (pixels - np.array(tiny.processor.mean, np.float32)) / np.array(tiny.processor.std, np.float32)
        values["pixel_values"] = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return values


def ours(tiny: Tiny, batch: PairBatch, stop_ids: tuple[int, ...], banned_ids: tuple[int, ...]):
    """Logits of every slot, log-probs of the answers' tokens, and greedy answers; all compiled together."""

    @quick_jit
    def run(params):
        filled = prefill(tiny.model, params, batch)
        slots = {"prefix_slots": batch.prefix_slots, "answer_slots": batch.answer_slots}
        logps, _ = losses.answer_logps(filled.hidden, tiny.model.head(params), batch.tokens, batch.role, **slots, chunk=7)
        keys = lane_keys(jax.random.key(0), batch.record_key, jnp.zeros(len(MIXED), jnp.int32), 1)
        options = DecodeOptions(TOKENS, stop_ids=stop_ids, banned_ids=banned_ids)
        start = LaneStart.behind_prefix(batch.role)
        samples = decode_lanes(tiny.model, params, filled, batch, start, keys, options)
        return tiny.model.logits(params, filled.hidden), logps, samples

    return jax.device_get(run(tiny.params))


def compare(tiny: Tiny, model: transformers.LlavaForConditionalGeneration, stop_ids=(), banned_ids=()) -> list[list[int]]:
    """Compares all that can be compared and returns the greedy answers."""
    batch = batch_of(MIXED, tiny.processor, prefix_slots=72)
    logits, logps, samples = ours(tiny, batch, stop_ids, banned_ids)
    written, largest = [], 0.0
    for row in range(len(MIXED)):
        role, prefix = np.asarray(batch.role[row]), int(np.sum(batch.role[row] == PREFIX))
        for answer in range(2):
            given = inputs(tiny, batch, row, answer)
            with torch.no_grad():
                expected = model(**given).logits[0].numpy()
            slots = np.flatnonzero((role == PREFIX) | (role == FIRST_ANSWER + answer))
            np.testing.assert_allclose(logits[row, slots], expected, atol=1e-4, rtol=0)
            largest = max(largest, np.abs(logits[row, slots] - expected).max())
            targets = given["input_ids"][0, prefix:]
            predicted = torch.log_softmax(torch.from_numpy(expected), -1)[prefix - 1 : -1].gather(1, targets[:, None])[:, 0].numpy()
            np.testing.assert_allclose(logps[row, answer, : len(targets)], predicted, atol=1e-4, rtol=0)
            assert np.all(logps[row, answer, len(targets) :] == 0)
        generated = model.generate(
            **inputs(tiny, batch, row), do_sample=False, max_new_tokens=TOKENS, eos_token_id=list(stop_ids) or None,
            suppress_tokens=list(banned_ids) or None, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        expected = generated.sequences[0, prefix:].tolist()
        top = torch.stack(generated.scores)[:, 0].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 5 * largest, "the runner-up is too near: the comparison would be a matter of rounding"
        got = samples.tokens[row, 0, : samples.lengths[row, 0]].tolist()
        assert got == expected
        assert bool(samples.stopped[row, 0]) == (expected[-1] in stop_ids)
        assert np.all(samples.tokens[row, 0, len(got) :] == 0)
        written.append(got)
    return written


def sharpen_tied(directory) -> None:
    """A random tied model repeats its last token; a small embedding, strong layers and a large last norm make it say something."""
    file = directory / "model.safetensors"
    found = load_file(file)
    for name in found:
        if name.endswith("embed_tokens.weight"):
            found[name] *= 0.6
        if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            found[name] *= 2
        if name.endswith("model.norm.weight"):
            found[name] *= 10
    save_file(found, file, {"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(tmp_path, name):
    directory = tiny_llava(tmp_path, **{"layout": "memory", "seed": 5} | CONFIGS[name])
    if name == "tied head":
        sharpen_tied(directory)
    tiny = Tiny.load(directory)
    assert tiny.config.decoder.tied_head == (name == "tied head")
    written = compare(tiny, torch_model(directory))
    # the comparison means something: answers differ, and none is one token over and over
    assert len({tuple(answer) for answer in written}) == len(written)
    assert all(len(answer) == TOKENS and len(set(answer)) >= 4 for answer in written)


def test_transformers_computes_the_same_with_our_export(tmp_path):
    base = tiny_llava(tmp_path / "base", seed=2, layout="hub", shards=3)
    tiny = Tiny.load(base)
    random = np.random.default_rng(7)
    # as training leaves them: every tensor has moved
    moved = jax.tree.map(lambda x: (x + 0.05 * random.standard_normal(x.shape)).astype(np.float32), jax.device_get(tiny.params))
    out = export(moved, base, tmp_path / "out", shard_bytes=20_000)
    compare(dataclasses.replace(tiny, params=moved), torch_model(out), tiny.processor.eos_ids, tiny.processor.banned_ids)
