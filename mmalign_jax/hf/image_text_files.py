"""The files of a CLIP or SigLIP directory: sizes, names of tensors, and the tokenizer."""

import dataclasses
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mmalign_jax.errors import UserError
from mmalign_jax.hf.decoders import ACTIVATIONS, expect
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.names import Entry, NameTable, linear, norm
from mmalign_jax.hf.towers import entries_of, layer_entries, read_tower
from mmalign_jax.models.config import VisionConfig
from mmalign_jax.models.image_text import ImageTextConfig

KINDS = ("clip", "siglip")

# Defaults of transformers' config classes, for keys that a config.json leaves out.
_CLIP_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}  # fmt: skip
_SIGLIP_TEXT = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_UNKNOWN_END = 2  # stands in configs that were written before transformers read the key; the end token is then the last of the vocabulary

_PREFIXES = {
    "vision_model.": "vision.",
    "text_model.": "text.",
    "visual_projection.": "visual_projection.",
    "text_projection.": "text_projection.",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
# no cosine depends on them
_UNUSED = ("logit_scale", "logit_bias", "vision.embeddings.position_ids", "text.embeddings.position_ids")


def read_sizes(values: Mapping[str, Any], normalisation: tuple, where: str) -> ImageTextConfig:
    """Sizes and switches of a CLIP or SigLIP `config.json`.

    Args:
      normalisation: mean and std of pixels, see `hf.pictures.normalisation`.

    Raises:
      UserError: a kind, a switch or a size that is not supported; the message names the key.
    """
    kind = values.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{where}: model_type {kind!r} is no image-text encoder that is known here; {' and '.join(KINDS)} are")
    clip = kind == "clip"
    vision, text = _part(values, "vision_config", clip), _part(values, "text_config", clip)
    expect(text.get("model_type", f"{kind}_text_model"), (f"{kind}_text_model",), "text_config.model_type", where)
    for name, part in (("vision_config", vision), ("text_config", text)):
        _check_sizes(part, name, where)
    expect(vision.get("num_channels", 3), (3,), "vision_config.num_channels", where)
    expect(vision.get("vision_use_head", True), (True,), "vision_config.vision_use_head", where)
    t = (_CLIP_TEXT if clip else _SIGLIP_TEXT) | text
    expect(t["hidden_act"], ACTIVATIONS, "text_config.hidden_act", where)
    tower = read_tower(vision, where, kinds=(f"{kind}_vision_model",), post_norm=True)
    width = values.get("projection_dim", 512) if clip else t.get("projection_size") or t["hidden_size"]
    if not clip:
        expect(width, (tower.width,), "text_config.projection_size", where)
    blocks = VisionConfig(
        image_size=0,
        patch_size=0,
        width=t["hidden_size"],
        mlp_width=t["intermediate_size"],
        layers=t["num_hidden_layers"],
        heads=t["num_attention_heads"],
        norm_eps=t["layer_norm_eps"],
        activation=t["hidden_act"],
        class_token=False,
        causal=clip,
    )
    for name, part in (("vision_config", tower), ("text_config", blocks)):
        if part.width % part.heads:
            raise UserError(f"{where}: {name}.num_attention_heads = {part.heads} does not divide hidden_size = {part.width}")
    return ImageTextConfig(tower, blocks, t["vocab_size"], t["max_position_embeddings"], width, not clip, *normalisation)


def _part(values: Mapping[str, Any], name: str, clip: bool) -> dict[str, Any]:
    """One tower's values. Old configs of CLIP have them twice, and transformers reads the second."""
    second = values.get(f"{name}_dict") if clip else None
    return dict(values.get(name) or {}) if second is None else dict(second)


def _check_sizes(values: Mapping[str, Any], name: str, where: str) -> None:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
    for key in (*keys, "image_size", "patch_size"):
        if key in values and (type(values[key]) is not int or values[key] < 1):
            raise UserError(f"{where}: {name}.{key} = {values[key]!r} is no size that is supported here; expected an int of at least 1")


def names(c: ImageTextConfig) -> NameTable:
    """The names of all tensors of an encoder."""
    v, t, tower = c.vision, c.text, "text_tower"
    words, positions = (c.vocab_size, t.width), (c.positions, t.width)
    entries = [
        *entries_of(v, v.layers),
        Entry((tower, "words", "embedding"), "text.embeddings.token_embedding.weight", words, words),
        Entry((tower, "positions", "embedding"), "text.embeddings.position_embedding.weight", positions, positions),
        *layer_entries(t, t.layers, tower, "text.encoder.layers.{}."),
        *norm((tower, "post_norm"), "text.final_layer_norm", t.width, True, None),
        *linear((tower, "projection"), "text.head" if c.text_bias else "text_projection", (t.width,), (c.width,), c.text_bias, None),
    ]
    if v.class_token:
        entries += linear(("vision_tower", "projection"), "visual_projection", (v.width,), (c.width,), False, None)
    else:
        entries += _pool_entries(v)
    return NameTable(_PREFIXES, tuple(entries), (), lambda reduced: reduced in _UNUSED)


def _pool_entries(v: VisionConfig) -> tuple[Entry, ...]:
    path, name = ("vision_tower", "pool"), "vision.head."
    heads = (v.heads, v.width // v.heads)
    return (
        Entry((*path, "probe"), f"{name}probe", (1, 1, v.width), (v.width,)),
        Entry((*path, "qkv", "kernel"), f"{name}attention.in_proj_weight", (3 * v.width, v.width), (v.width, 3, *heads), (1, 0)),
        Entry((*path, "qkv", "bias"), f"{name}attention.in_proj_bias", (3 * v.width,), (3, *heads)),
        *linear((*path, "out"), f"{name}attention.out_proj", heads, (v.width,), True, None),
        *norm((*path, "norm"), f"{name}layernorm", v.width, True, None),
        *linear((*path, "mlp", "up"), f"{name}mlp.fc1", (v.width,), (v.mlp_width,), True, None),
        *linear((*path, "mlp", "down"), f"{name}mlp.fc2", (v.mlp_width,), (v.width,), True, None),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TextIds:
    """Texts to token ids, of any length, the end token behind them. A special token that a text spells is text.

    Args:
      pad_id: fills the slots behind a text that is shorter than the tower's positions, where the tower sees them.
      canonical: what SigLIP's tokenizers do to a text before `tokenizer.json`: "" nothing, "lower", or "words" (no punctuation either).
    """

    tokenizer: tokenizers.Tokenizer
    pad_id: int
    canonical: str

    @classmethod
    def read(cls, directory: Path, config: ImageTextConfig, values: Mapping[str, Any]) -> "TextIds":
        """Reads `tokenizer.json` and `tokenizer_config.json`; `values` are those of `config.json`.

        Raises:
          UserError: a file is missing, or they do not fit the model.
        """
        file = directory / "tokenizer.json"
        settings = read_json(directory / "tokenizer_config.json")
        read_json(file)  # a file that is missing or no JSON has an error of its own
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        if (highest := max(tokenizer.get_vocab(with_added_tokens=True).values())) >= config.vocab_size:
            raise UserError(f"{file}: has token {highest}, the model was made for {config.vocab_size}")
        end = _token_id(tokenizer, settings, "eos_token", directory)
        if tokenizer.encode("a").ids[-1:] != [end]:
            raise UserError(f"{file}: does not write eos_token of tokenizer_config.json behind a text, as the model was trained")
        if values["model_type"] == "clip":
            wanted = _part(values, "text_config", True).get("eos_token_id", _CLIP_TEXT["eos_token_id"])
            wanted = config.vocab_size - 1 if wanted == _UNKNOWN_END else wanted
            if wanted != end:
                raise UserError(f"{file}: a text ends with token {end}, with config.json's text_config.eos_token_id it would be {wanted}")
            return cls(tokenizer, end, "")
        if settings.get("padding_side", "right") != "right":
            raise UserError(f"{directory / 'tokenizer_config.json'}: padding_side must be right")
        return cls(tokenizer, _token_id(tokenizer, settings, "pad_token", directory), _canonical(settings, directory))

    def __call__(self, text: str) -> list[int]:
        if self.canonical:
            text = text.lower()
        if self.canonical == "words":
            text = re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()
        return self.tokenizer.encode(text).ids


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# SigLIP's tokenizer takes punctuation away, that of SigLIP 2, which is Gemma's, only capitals
_CANONICAL = {"SiglipTokenizer": "words", "Siglip2Tokenizer": "lower", "GemmaTokenizer": "lower"}


def _canonical(settings: Mapping[str, Any], directory: Path) -> str:
    name = str(settings.get("tokenizer_class"))
    if name.removesuffix("Fast") not in _CANONICAL:
        known = ", ".join(_CANONICAL)
        raise UserError(f"{directory / 'tokenizer_config.json'}: tokenizer_class {name} is none of those that SigLIP has here: {known}")
    return _CANONICAL[name.removesuffix("Fast")]


def _token_id(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], key: str, directory: Path) -> int:
    token = settings.get(key)
    token = token.get("content") if isinstance(token, Mapping) else token
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise UserError(f"{directory / 'tokenizer_config.json'}: {key} {token!r} is no token of tokenizer.json")
    return found
