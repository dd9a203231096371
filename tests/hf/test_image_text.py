"""Image-text encoders against transformers: CLIP and SigLIP with random weights."""

import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
import transformers
from helpers.checkpoints import SENTENCES, quiet
from helpers.image_text import tiny_clip, tiny_siglip
from safetensors.torch import load_file, save_file

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.errors import UserError
from mmalign_jax.hf.image_text import ImageTextEncoder

TEXTS = ["A dog sits next to a blue chair.", "", "There are two birds, and a yellow car!", "cat", SENTENCES[3]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return tiny_siglip(tmp_path_factory.mktemp("siglip") / "model")


def pictures(count):
    draw = np.random.default_rng(0)
    sizes = [(40, 31), (28, 28), (20, 60)]
    return [PIL.Image.fromarray(draw.integers(0, 256, (*sizes[n % 3], 3), np.uint8)) for n in range(count)]


@torch.no_grad()
def theirs(directory, shown, texts):
    """Normalised vectors; texts of CLIP one at a time, so that nothing is padded."""
    with quiet():
        model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    images = model.get_image_features(pixel_values=torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in shown]))
    if model.config.model_type == "clip":
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert isinstance(tokenizer, transformers.CLIPTokenizer)
        said = torch.cat([model.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output for text in texts])
    else:
        # transformers' own class of tokenizer needs sentencepiece: what it does to a text is written out
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.enable_padding(length=24, pad_id=1)
        plain = [text.lower().translate(str.maketrans("", "", ".,!?:")) for text in texts]
        said = model.get_text_features(input_ids=torch.tensor([tokenizer.encode(text).ids for text in plain])).pooler_output
    return [(x / x.norm(dim=-1, keepdim=True)).numpy() for x in (images.pooler_output, said)]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_cosines_are_those_of_transformers(kind, request):
    directory = request.getfixturevalue(kind)
    encoder, shown = ImageTextEncoder.load(directory), pictures(3)
    images, said = theirs(directory, shown, TEXTS)
    found = encoder.texts(TEXTS)
    assert found.dtype == np.float32 and encoder.max_tokens == (40 if kind == "clip" else 24)
    np.testing.assert_allclose(found, said, atol=1e-5)
    np.testing.assert_allclose(encoder.pictures(shown), images, atol=1e-5)
    pairs = [(0, 1), (2, 0), (0, 4), (1, 4), (2, 2)]
    cosines = encoder.similarity([shown[a] for a, _ in pairs], [TEXTS[b] for _, b in pairs])
    np.testing.assert_allclose(cosines, [images[a] @ said[b] for a, b in pairs], atol=1e-5)
    assert np.ptp(cosines) > 0.05
    assert encoder.similarity([], []).shape == (0,)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_vector_is_a_function_of_its_picture_or_text_alone(kind, request):
    encoder = ImageTextEncoder.load(request.getfixturevalue(kind))
    shown, texts = pictures(10), [f"{'a red cat ' * (number % 4)}on the table" for number in range(70)]
    many = encoder.pictures(iter(shown))
    np.testing.assert_allclose(np.concatenate([encoder.pictures([shown[number]]) for number in (0, 7, 9)]), many[[0, 7, 9]], atol=2e-6)
    np.testing.assert_allclose(encoder.texts(texts)[[0, 33, 69]], encoder.texts([texts[0], texts[33], texts[69]]), atol=2e-6)
    if kind == "clip":  # beside one of more than 32 tokens
        long = "cat " * 36
        np.testing.assert_allclose(encoder.texts([long, "cat"])[1:], encoder.texts(["cat"]), atol=2e-6)


def test_a_picture_that_comes_again_is_encoded_once(clip, monkeypatch):
    encoder, shown, seen = ImageTextEncoder.load(clip), pictures(2), []
    tile = ImageTextEncoder._tile
    monkeypatch.setattr(ImageTextEncoder, "_tile", lambda self, picture: seen.append(picture) or tile(self, picture))
    cosines = encoder.similarity([shown[0], shown[1], shown[0]], ["cat", "cat", "dog"])
    assert len(seen) == 2 and len(set(cosines.tolist())) == 3


def test_a_mesh_of_the_caller_does_not_matter(siglip):
    shown = pictures(3)
    expected = ImageTextEncoder.load(siglip).similarity(shown, TEXTS[:3])
    with jax.set_mesh(mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)):
        np.testing.assert_allclose(ImageTextEncoder.load(siglip).similarity(shown, TEXTS[:3]), expected, atol=1e-6)


def test_texts_are_never_cut(clip, siglip):
    encoder = ImageTextEncoder.load(clip)
    long = " ".join(SENTENCES)
    with pytest.raises(UserError, match="tokens, the image-text encoder has positions for 40: 'USER: What is"):
        encoder.texts(["cat", long])
    pieces = encoder.pieces(long)
    assert len(pieces) > 2 and all(map(encoder.fits, pieces)) and " ".join(pieces) == long
    assert encoder.pieces(" one cat ") == ["one cat"]
    word = "Donaudampfschiff" * 9
    assert "".join(encoder.pieces(word)) == word and all(map(encoder.fits, encoder.pieces(word)))
    tokens = 24 - 1
    words = "cat " * tokens
    assert ImageTextEncoder.load(siglip).fits(words) and not ImageTextEncoder.load(siglip).fits(words + "cat")


def test_a_special_token_that_a_text_spells_is_text(clip):
    encoder = ImageTextEncoder.load(clip)
    whole, start = encoder.texts(["a cat <|endoftext|> on the table", "a cat"])
    assert np.abs(whole - start).max() > 1e-3


def changed(directory, tmp_path, file, change):
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    (copy / file).write_text(json.dumps(change(json.loads((copy / file).read_text()))))
    return copy


@pytest.mark.parametrize(
    ("name", "plain"), [("SiglipTokenizer", "there is a cat"), ("Siglip2Tokenizer", "there is, a cat."), ("GemmaTokenizerFast", "there is, a cat.")]
)
def test_texts_are_made_plain_as_the_kind_of_tokenizer_does(name, plain, siglip, tmp_path):
    """SigLIP reads neither capitals nor punctuation, SigLIP 2 no capitals; files of tokenizers do not always say so."""
    directory = changed(siglip, tmp_path, "tokenizer_config.json", lambda v: v | {"tokenizer_class": name})
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = ImageTextEncoder.load(directory)._ids
    assert ids("There is, a CAT.") == tokenizer.encode(plain).ids and ids("") == [1]


def inside(part, **values):
    return lambda v: v | {part: v[part] | values}


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("clip", "config.json", lambda v: v | {"model_type": "siglip2"}, "model_type 'siglip2' is no image-text encoder that is known here; clip"),
        ("clip", "config.json", inside("vision_config", patch_size=[7, 7]), r"vision_config.patch_size = \[7, 7\] is no size"),
        ("clip", "config.json", inside("text_config", hidden_act="mish"), "text_config.hidden_act"),
        ("clip", "config.json", inside("text_config", num_attention_heads=5), "text_config.num_attention_heads = 5 does not divide hidden_size = 12"),
        ("clip", "config.json", inside("text_config", max_position_embeddings=41), r"position_embedding.weight has shape \(40, 12\)"),
        ("clip", "config.json", inside("text_config", eos_token_id=7), "with config.json's text_config.eos_token_id it would be 7"),
        ("clip", "preprocessor_config.json", lambda v: v | {"crop_size": {"height": 35, "width": 35}}, "the image processor made"),
        ("clip", "tokenizer_config.json", lambda v: v | {"eos_token": "cat"}, "eos_token"),
        ("siglip", "config.json", inside("vision_config", vision_use_head=False), "vision_config.vision_use_head"),
        ("siglip", "config.json", inside("text_config", vocab_size=9), "has token [0-9]+, the model was made for 9"),
        ("siglip", "tokenizer_config.json", lambda v: v | {"tokenizer_class": "T5Tokenizer"}, "tokenizer_class T5Tokenizer is none of those"),
        ("siglip", "tokenizer_config.json", lambda v: v | {"pad_token": None}, "pad_token None is no token of tokenizer.json"),
    ],
)
def test_what_is_not_known_is_refused_by_name(kind, file, change, message, request, tmp_path):
    with pytest.raises(UserError, match=message):
        ImageTextEncoder.load(changed(request.getfixturevalue(kind), tmp_path, file, change))


def test_tensors_that_are_missing_or_strange_are_named(siglip, tmp_path):
    file = changed(siglip, tmp_path, "config.json", lambda v: v) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"vision_model.head.more": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"the model has no place for vision_model.head.more"):
        ImageTextEncoder.load(file.parent)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("head.probe")}, file)
    with pytest.raises(UserError, match=r"the weights lack vision.head.probe"):
        ImageTextEncoder.load(file.parent)


def test_configs_of_clip_that_say_sizes_twice(clip, tmp_path):
    twice = lambda v: v | {"text_config_dict": v["text_config"] | {"eos_token_id": 2}, "text_config": {"hidden_size": 99}}  # noqa: E731
    found = ImageTextEncoder.load(changed(clip, tmp_path, "config.json", twice))
    np.testing.assert_array_equal(found.texts(TEXTS), ImageTextEncoder.load(clip).texts(TEXTS))
