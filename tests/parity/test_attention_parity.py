"""The attention of answers to pictures equals what transformers returns with output_attentions=True."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from helpers.families import all_cases
from helpers.tiny import Tiny, batch_of, quick_jit

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.attention_ratio import AttentionRatio

CASES = all_cases()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's thread pool costs more than such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def theirs(case, directory, record, processor) -> tuple[list[np.ndarray], list[int]]:
    """Of each answer [L, n, 2]: attention of its n tokens to the two pictures; and how many tokens these have."""
    model = case.load(directory)
    model.set_attn_implementation("eager")
    out, prompt = [], case.inputs(directory, record)
    ids = prompt["input_ids"][0].numpy()
    (at,) = np.nonzero(np.isin(ids, processor.image_token_ids))
    runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    assert len(runs) == 2
    for response in record.responses:
        answer = processor.answer_ids(response.text)[0].tolist()
        with torch.no_grad():
            found = model(**case.append(prompt, answer), output_attentions=True).attentions
        weights = torch.stack(found)[:, 0, :, len(ids) :].mean(dim=1).numpy()
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        out.append(np.stack([weights[..., run].sum(-1) for run in runs], axis=-1))
    return out, [len(run) for run in runs]


SLOW = [pytest.param(name, marks=pytest.mark.nightly) for name in ("gemma3", "qwen3_vl")]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", *SLOW])
def test_equals_transformers(tmp_path, name):
    case = CASES[name]
    directory = case.write(tmp_path, 5)
    tiny = Tiny.load(directory)
    record = next(one for one in case.records if len(one.media) == 2)
    expected, tokens = theirs(case, directory, record, tiny.processor)

    batch = batch_of([record], tiny.processor)
    picture = np.full((1, batch.prefix_slots), -1, np.int32)
    (at,) = np.nonzero(np.isin(batch.tokens[0, : batch.prefix_slots], tiny.processor.image_token_ids))
    picture[0, at] = np.repeat([0, 1], tokens)

    @quick_jit
    def run(params):
        features = tiny.model.encode_images(params, batch.images, batch.patches)
        return tiny.model.attention_to_images(params, features, batch, jax.numpy.array(picture), 2)

    found = np.asarray(run(tiny.params))
    for answer, wanted in enumerate(expected):
        np.testing.assert_allclose(found[:, 0, answer, : wanted.shape[1]], wanted, atol=1e-5)

    # the scorer's ratio of it, end token aside
    policy = Pretrained.read(directory, mesh_lib.make_mesh(devices=jax.devices()[:1]), "float32")
    record = dataclasses.replace(record, meta={"target_image": 1})
    texts = [one.text for one in record.responses]
    settings = {"layer": 0, "per": "token"} if name == "qwen2_vl" else {}
    ((first, second),) = AttentionRatio(policy, asked=(0.1, 0.0, 0.0), batch_size=1, **settings)([record], [texts])
    for one, wanted in zip((first, second), expected, strict=True):
        of_all = (wanted[0] / np.array(tokens) if settings else wanted.mean(axis=0))[:-1].sum(axis=0)
        np.testing.assert_allclose(one, of_all[1] / of_all.sum() - 0.1, atol=1e-4)
    assert abs(first - second) > 1e-3
