"""Sentence encoders from a directory in Sentence-Transformers' layout: all-MiniLM-L6-v2, all-mpnet-base-v2 and their like."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import read_json as read_any_json
from mmalign_jax.hf import safetensors_dir
from mmalign_jax.hf.files import read_json
from mmalign_jax.models.text_encoder import TextEncoderConfig, sentence_vectors

_MODULES = ("Transformer", "Pooling", "Normalize")
_ROWS, _LENGTHS = (8, 64), (32, 64, 128, 256, 512)  # texts of one pass and their tokens, which it is compiled for


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Texts to vectors of length 1. What is behind `max_tokens` tokens is not seen, as the encoder was trained (256 or 384)."""

    config: TextEncoderConfig
    params: dict
    max_tokens: int
    _tokenizer: Any

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> "TextEncoder":
        """Reads the encoder of a directory.

        Raises:
          UserError: it is not a sentence encoder of a kind that is known here.
          DataError: a file is damaged, or a tensor is missing or has another shape.
        """
        import transformers  # late: it takes seconds, and a mistake in a config should be told at once

        directory = pathlib.Path(directory)
        values = read_json(directory / "config.json")
        config = _config(values, directory)
        _check_modules(directory)
        settings = read_json(directory / "sentence_bert_config.json")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory}: the tokenizer cannot be loaded ({error})") from error
        limit = min(settings.get("max_seq_length") or config.max_tokens, config.max_tokens)
        return cls(config, jax.device_put(_read(config, values["model_type"], directory)), limit, tokenizer)

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "n D"]:
        """A vector for each text."""
        out = np.zeros((len(texts), self.config.width), np.float32)
        ids = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens, padding=False)["input_ids"] if texts else []
        order = sorted(range(len(texts)), key=lambda index: len(ids[index]))  # texts of like length pass together
        rows = next((count for count in _ROWS if count >= len(order)), _ROWS[-1])
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            longest = len(ids[chosen[-1]])
            slots = min(next((length for length in _LENGTHS if length >= longest), longest), self.config.max_tokens)
            tokens, inside = np.zeros((rows, slots), np.int32), np.zeros((rows, slots), bool)
            for row, index in enumerate(chosen):
                tokens[row, : len(ids[index])], inside[row, : len(ids[index])] = ids[index], True
            out[chosen] = np.asarray(_encode(self.config, self.params, tokens, inside))[: len(chosen)]
        return out


_encode = functools.partial(jax.jit, static_argnums=0)(sentence_vectors)


def _config(values: dict[str, Any], directory: pathlib.Path) -> TextEncoderConfig:
    kind = values.get("model_type")
    if kind not in ("bert", "mpnet"):
        raise UserError(f"{directory / 'config.json'}: model_type {kind!r} is no sentence encoder that is known here; bert and mpnet are")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{directory / 'config.json'}: position_embedding_type must be absolute")
    own = {"token_types": values.get("type_vocab_size", 2)}
    if kind == "mpnet":
        # positions count from the one behind the padding token's
        own = {"first_position": 2, "position_buckets": values.get("relative_attention_num_buckets", 32)}
    return TextEncoderConfig(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        mlp_width=values["intermediate_size"],
        positions=values["max_position_embeddings"],
        norm_eps=values.get("layer_norm_eps", 1e-12),
        activation=values.get("hidden_act", "gelu"),
        **own,
    )


def _check_modules(directory: pathlib.Path) -> None:
    """The mean of all tokens, normalised, is what is computed here; another pooling would be another vector."""
    file = directory / "modules.json"
    modules = read_any_json(file, "Download the directory again") if file.is_file() else []
    kinds = tuple(str(module.get("type")).split(".")[-1] for module in modules)
    if kinds[:2] != _MODULES[:2] or kinds not in (_MODULES, _MODULES[:2]):
        raise UserError(f"{file}: expected the modules {', '.join(_MODULES)} of Sentence-Transformers, found {', '.join(kinds) or 'none'}")
    pooling = read_json(directory / str(modules[1].get("path", "1_Pooling")) / "config.json")
    chosen = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    if chosen != ["pooling_mode_mean_tokens"]:
        raise UserError(f"{directory}: pools by {', '.join(chosen) or 'nothing'}; only pooling_mode_mean_tokens is known here")


def _names(kind: str) -> dict[str, str]:
    """Our name of a layer's part -> the checkpoint's, `{}` being the layer."""
    layer = "encoder.layer.{}."
    if kind == "mpnet":
        attention = {ours: f"{layer}attention.attn.{theirs}" for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))}
        norm = f"{layer}attention.LayerNorm"
    else:
        attention = {ours: f"{layer}attention.self.{ours}" for ours in ("query", "key", "value")} | {"out": f"{layer}attention.output.dense"}
        norm = f"{layer}attention.output.LayerNorm"
    inner = {"up": f"{layer}intermediate.dense", "down": f"{layer}output.dense", "mlp_norm": f"{layer}output.LayerNorm"}
    return attention | {"attention_norm": norm} | inner


def _read(config: TextEncoderConfig, kind: str, directory: pathlib.Path) -> dict:
    tensors = safetensors_dir.open_weights(directory)
    prefix = f"{kind}." if any(name.startswith(f"{kind}.") for name in tensors) else ""

    def read(name: str, *shape: int) -> np.ndarray:
        tensor = tensors.get(prefix + name)
        if tensor is None or tensor.shape != shape:
            found = "is missing" if tensor is None else f"has shape {tensor.shape}, not {shape}"
            raise DataError(f"tensor {prefix + name} {found}", file=str(directory), mend="Download the directory again")
        return np.asarray(tensor.read(), np.float32)

    c, head = config, config.width // config.heads
    shapes = {
        **{name: ((c.width, c.width), (c.width, c.heads, head), (c.heads, head)) for name in ("query", "key", "value")},
        "out": ((c.width, c.width), (c.heads, head, c.width), (c.width,)),
        "up": ((c.mlp_width, c.width), (c.width, c.mlp_width), (c.mlp_width,)),
        "down": ((c.width, c.mlp_width), (c.mlp_width, c.width), (c.width,)),
    }

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": read(f"{name}.weight", c.width), "bias": read(f"{name}.bias", c.width)}

    def part(ours: str, theirs: str) -> dict[str, np.ndarray]:
        if ours not in shapes:
            return norm(theirs)
        kernel, ours_shape, bias = shapes[ours]
        return {"kernel": read(f"{theirs}.weight", *kernel).T.reshape(ours_shape), "bias": read(f"{theirs}.bias", kernel[0]).reshape(bias)}

    layers = [{ours: part(ours, theirs.format(number)) for ours, theirs in _names(kind).items()} for number in range(c.layers)]
    params: dict[str, Any] = {
        "words": {"embedding": read("embeddings.word_embeddings.weight", c.vocab_size, c.width)},
        "positions": {"embedding": read("embeddings.position_embeddings.weight", c.positions, c.width)},
        "norm": norm("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
    }
    if c.token_types:
        params["token_types"] = {"embedding": read("embeddings.token_type_embeddings.weight", c.token_types, c.width)}
    if c.position_buckets:
        params["position_bias"] = read("encoder.relative_attention_bias.weight", c.position_buckets, c.heads)
    return params
