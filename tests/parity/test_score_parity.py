"""Scores are a head on transformers' hidden states at each answer's end, whatever else is in the batch; the values those before its tokens."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from helpers.checkpoints import quiet
from helpers.families import all_cases
from helpers.tiny import Tiny, batch_of, noise_png, quick_jit

from mmalign_jax import losses
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.export import export
from mmalign_jax.hf.score_head import FILE
from mmalign_jax.losses import Need
from mmalign_jax.losses.reward_head import RewardHead
from mmalign_jax.mesh import make_mesh
from mmalign_jax.models.score_head import initial_head
from mmalign_jax.pairs.reward_model import RewardModel
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.types import Media

CASES = all_cases()
NAMES = [next(name for name in CASES if name.split()[0] == family) for family in ("llava", "qwen2_5_vl")]


@dataclasses.dataclass(frozen=True)
class Both(RewardHead):
    """Needs everything that the head says."""

    @property
    def needs(self):
        return frozenset({Need.SCORES, Need.VALUES})


@pytest.fixture(scope="module", params=NAMES)
def there(request, tmp_path_factory):
    """(case, base directory, directory of a reward model, its head in float64)."""
    case = CASES[request.param]
    base = case.write(tmp_path_factory.mktemp("base"), 5)
    tiny = Tiny.load(base)
    head = initial_head(tiny.config, 3) | {"bias": np.array(0.25, np.float32)}
    out = export(tiny.params | {"score_head": head}, base, tmp_path_factory.mktemp("models") / "reward")
    return case, base, out, tuple(np.asarray(head[name], np.float64) for name in ("kernel", "bias"))


def of_torch(there, record, processor, text):
    """Scores of transformers' last hidden states `[n]` of a prompt with an answer, and the number of the answer's tokens."""
    case, base, out, (kernel, bias) = there
    model, ids = case.load(out), processor.answer_ids(text)[0]
    with torch.no_grad():
        hidden = model.model(**case.append(case.inputs(base, record), ids.tolist())).last_hidden_state[0]
    return hidden.double().numpy() @ kernel + bias, len(ids)


def test_scores_of_texts(there):
    case, _, out, _ = there
    model = RewardModel.read(out, make_mesh(1, 1, 1, jax.devices()[:1]), "float32", batch_size=2)
    longer = "Yes, there are two birds on the table, and a red cat."
    texts = [[*(answer.text for answer in record.responses[:2]), longer] for record in case.records]
    texts[1] = texts[1][:1]
    found = model.scores(case.records, texts)
    assert [len(scores) for scores in found] == [len(some) for some in texts]
    for record, some, scores in zip(case.records, texts, found, strict=True):
        expected = [of_torch(there, record, model.policy.processor, text)[0][-1] for text in some]
        np.testing.assert_allclose(scores, expected, atol=2e-5, err_msg=record.id)
    # alone, in another order, beside no answer at all
    last = len(texts) - 1
    again = model.scores([case.records[0], case.records[last]], [[], texts[last][::-1]])
    assert again[0] == []
    np.testing.assert_allclose(again[1], found[last][::-1], atol=2e-6)
    # pixels matter; three answers a record once more, so that nothing is compiled anew
    with_picture = next(record for record in case.records if record.media and record.media[0].kind == "image")
    other = dataclasses.replace(with_picture, media=tuple(Media("image", noise_png(77)) for _ in with_picture.media))
    assert np.abs(np.subtract(*model.scores([with_picture, other], [["A cup.", "No.", longer]] * 2))).max() > 1e-4


def test_transformers_loads_the_directory_without_a_word(there):
    case, base, out, _ = there
    assert (out / FILE).is_file() and (out / "model.safetensors.index.json").is_file()
    with quiet():
        _, info = type(case.load(base)).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_scores_and_values_in_training(there):
    """Of packed pairs: the value of a token is the score of the state before it, the first one's that of the prompt's end."""
    case, _, out, (kernel, bias) = there
    tiny = Tiny.load(out)
    params = tiny.params | {"score_head": {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}}
    objective = dataclasses.replace(losses.build("reward_model"), terms=1.0 * Both())
    rows = batch_of(case.records, tiny.processor)
    loss = LossFunction(tiny.model, objective)
    stats = jax.device_get(quick_jit(lambda rows: loss.statistics(params, {}, None, rows, jax.random.key(0)))(rows))
    assert stats.answers.policy is None and stats.answers.lengths.shape == stats.scores.shape == (len(case.records), 2)
    for row, record in enumerate(case.records):
        for k, answer in enumerate(record.responses[:2]):
            expected, count = of_torch(there, record, tiny.processor, answer.text)
            np.testing.assert_allclose(stats.scores[row, k], expected[-1], atol=2e-5)
            np.testing.assert_allclose(stats.values[row, k, :count], expected[-count - 1 : -1], atol=2e-5)
            assert not stats.values[row, k, count:].any() and count == stats.answers.lengths[row, k]


def test_what_is_no_reward_model(there, tmp_path):
    case, base, out, _ = there
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    with pytest.raises(UserError, match="no score_head.safetensors, so this is no reward model"):
        RewardModel.read(base, mesh)
    model = RewardModel.read(out, mesh)
    with pytest.raises(ValueError, match="records, and answers for 0"):
        model.scores(case.records, [])
    with pytest.raises(DataError, match="positions"):
        model.scores(case.records[:1], [["a red cat " * 3000]])
