"""The text half of a checkpoint: `text_config` to `DecoderConfig`, and the names of a decoder's tensors. One table for every family."""

from collections.abc import Mapping
from typing import Any

from mmalign_jax.errors import UserError
from mmalign_jax.hf.names import EMBEDDING, Entry, linear, norm
from mmalign_jax.models.config import DecoderConfig, RopeConfig

# Names of `models.layers.activation`.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")

# Defaults of transformers' config classes, for keys that a config.json leaves out.
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "rope_theta": 10000.0, "sliding_window": None, "num_key_value_heads": None,
}  # fmt: skip
_QWEN = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_QWEN_VL = _QWEN | {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80,
}  # fmt: skip
_GEMMA = _LLAMA | {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen3_vl_text": _QWEN | {"head_dim": 128, "max_position_embeddings": 128000, "rope_theta": 5e5, "sliding_window": None},
    "gemma": _GEMMA | {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None,
    },
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {
        "vocab_size": 262208, "max_position_embeddings": 131072, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "rope_theta": 1e6,
    },
}  # fmt: skip
# Frequencies that turn with time, row and column where a config leaves mrope_section out.
_SECTIONS = {"qwen2_vl_text": (16, 24, 24), "qwen2_5_vl_text": (16, 24, 24), "qwen3_vl_text": (24, 20, 20)}
_QUERY_BIAS = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
_SANDWICH = ("gemma2", "gemma3_text")
_QK_NORM = ("qwen3", "qwen3_vl_text", "gemma3_text")


def expect(value: Any, allowed: tuple, key: str, where: str) -> None:
    """Raises UserError when a config's value is none of those that are supported."""
    if value not in allowed:
        raise UserError(f"{where}: {key} is {value!r}; supported: {', '.join(map(str, allowed))}")


def read_decoder(
    values: Mapping[str, Any], where: str, *, kinds: tuple[str, ...], tied: bool | None = None, bidirectional: str = "none"
) -> DecoderConfig:
    """Reads a `text_config`.

    Args:
      kinds: the `model_type`s that this family may have; the first is that of a config without one.
      tied: `tie_word_embeddings` of the config around it, None when it does not say; either place may ask for tying.
      bidirectional: see `DecoderConfig`.

    Raises:
      UserError: a kind or a switch that the decoder does not have; the message names the key.
    """
    kind = values.get("model_type", kinds[0])
    expect(kind, kinds, "text_config.model_type", where)
    gemma = kind.startswith("gemma")
    t = DEFAULTS[kind] | dict(values)
    act = t["hidden_activation" if kind in _SANDWICH else "hidden_act"]
    # Gemma's first checkpoints say "gelu" and mean the approximation
    act = "gelu_pytorch_tanh" if kind == "gemma" and act == "gelu" else act
    expect(act, ACTIVATIONS, "text_config.hidden_act", where)
    if kind == "gemma3_text":
        # transformers' model has these keys in its config and does not look at them
        expect(t["attn_logit_softcapping"], (None,), "text_config.attn_logit_softcapping", where)
        expect(t["final_logit_softcapping"], (None,), "text_config.final_logit_softcapping", where)
        expect(bool(t.get("use_bidirectional_attention")), (False,), "text_config.use_bidirectional_attention", where)
    heads = t["num_attention_heads"]
    window, local = _windows(kind, t, where)
    return DecoderConfig(
        vocab_size=t["vocab_size"],
        width=t["hidden_size"],
        mlp_width=t["intermediate_size"],
        layers=t["num_hidden_layers"],
        heads=heads,
        kv_heads=t["num_key_value_heads"] or heads,
        head_width=t.get("head_dim") or t["hidden_size"] // heads,
        norm_eps=t["rms_norm_eps"],
        rope=_rope(_parameters(t, "full_attention"), t, where, kind),
        max_positions=t["max_position_embeddings"],
        activation=act,
        tied_head=bool(tied) or bool(values.get("tie_word_embeddings", t["tie_word_embeddings"] if tied is None else False)),
        attention_bias=kind in _QUERY_BIAS or bool(t["attention_bias"]),
        out_bias=kind not in _QUERY_BIAS and bool(t["attention_bias"]),
        mlp_bias=bool(t["mlp_bias"]),
        qk_norm=kind in _QK_NORM,
        norm_offset=gemma,
        sandwich=kind in _SANDWICH,
        embedding_scale=t["hidden_size"] ** 0.5 if gemma else 1.0,
        query_scale=t["query_pre_attn_scalar"] ** -0.5 if kind in _SANDWICH else None,
        attention_softcap=t["attn_logit_softcapping"] if kind == "gemma2" else None,
        final_softcap=t["final_logit_softcapping"] if gemma else None,
        sliding_window=window,
        local_layers=local,
        local_rope=_rope(_local_parameters(t), t, where, kind) if kind == "gemma3_text" else None,
        bidirectional=bidirectional,
    )


def _windows(kind: str, t: Mapping[str, Any], where: str) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it; () when all have."""
    layers = t["num_hidden_layers"]
    if kind in ("llama", "gemma") or t["sliding_window"] is None:
        return None, ()
    if kind == "mistral":
        return t["sliding_window"], ()
    types = t.get("layer_types")
    if types is None and kind.startswith("gemma"):
        pattern = 2 if kind == "gemma2" else t.get("sliding_window_pattern", t.get("_sliding_window_pattern", 6))
        types = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    elif types is None:
        behind = t["max_window_layers"] if t["use_sliding_window"] else layers
        types = ["sliding_attention" if layer >= behind else "full_attention" for layer in range(layers)]
    for name in types:
        expect(name, ("sliding_attention", "full_attention"), "text_config.layer_types", where)
    local = tuple(name == "sliding_attention" for name in types)
    return (t["sliding_window"], local) if any(local) else (None, ())


def _parameters(t: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """transformers 5 writes rope_parameters (Gemma 3: one group a layer type); 4 wrote rope_theta beside rope_scaling."""
    values = dict(t.get("rope_parameters") or t.get("rope_scaling") or {})
    return dict(values[layer_type]) if isinstance(values.get(layer_type), Mapping) else values


def _local_parameters(t: Mapping[str, Any]) -> dict[str, Any]:
    values = (t.get("rope_parameters") or {}).get("sliding_attention") or {}
    return {"rope_theta": t.get("rope_local_base_freq", 10_000.0), **values}


def _rope(scaling: Mapping[str, Any], t: Mapping[str, Any], where: str, decoder: str) -> RopeConfig:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    # Qwen2-VL's first configs call ordinary frequencies with sections "mrope"
    # and InternVL's say "dynamic": frequencies that change with rows longer than max_position_embeddings, which are refused (layout.misfit)
    kind = "default" if kind in ("mrope", "dynamic") else kind
    expect(kind, ("default", "linear", "llama3"), "text_config.rope_parameters.rope_type", where)
    return RopeConfig(
        theta=float(scaling.get("rope_theta", t["rope_theta"])),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_positions=int(scaling.get("original_max_position_embeddings", t["max_position_embeddings"])),
        sections=tuple(scaling.get("mrope_section") or _SECTIONS[decoder]) if decoder in _SECTIONS else (),
        interleaved=decoder == "qwen3_vl_text",
    )


def decoder_entries(d: DecoderConfig) -> tuple[Entry, ...]:
    """Every tensor of a decoder and its head, by reduced name."""
    path, name, count = ("decoder", "layers"), "decoder.layers.{}.", d.layers
    attention, attention_name = (*path, "attention"), name + "self_attn."
    query, key, vocabulary = (d.heads, d.head_width), (d.kv_heads, d.head_width), (d.vocab_size, d.width)
    # "post_attention_layernorm" stands before the MLP, but where both halves have a norm behind them
    before_mlp = "pre_feedforward_layernorm" if d.sandwich else "post_attention_layernorm"
    entries = [
        Entry(("decoder", "embed", "embedding"), EMBEDDING, vocabulary, vocabulary),
        *norm((*path, "input_norm"), name + "input_layernorm", d.width, False, count),
        *linear((*attention, "query"), attention_name + "q_proj", (d.width,), query, d.attention_bias, count),
        *linear((*attention, "key"), attention_name + "k_proj", (d.width,), key, d.attention_bias, count),
        *linear((*attention, "value"), attention_name + "v_proj", (d.width,), key, d.attention_bias, count),
        *linear((*attention, "out"), attention_name + "o_proj", query, (d.width,), d.out_bias, count),
        *norm((*path, "post_norm"), name + before_mlp, d.width, False, count),
        *linear((*path, "mlp", "gate"), name + "mlp.gate_proj", (d.width,), (d.mlp_width,), d.mlp_bias, count),
        *linear((*path, "mlp", "up"), name + "mlp.up_proj", (d.width,), (d.mlp_width,), d.mlp_bias, count),
        *linear((*path, "mlp", "down"), name + "mlp.down_proj", (d.mlp_width,), (d.width,), d.mlp_bias, count),
        *norm(("decoder", "final_norm"), "decoder.norm", d.width, False, None),
    ]
    if d.qk_norm:
        entries += norm((*attention, "query_norm"), attention_name + "q_norm", d.head_width, False, count)
        entries += norm((*attention, "key_norm"), attention_name + "k_norm", d.head_width, False, count)
    if d.sandwich:
        entries += norm((*path, "attention_out_norm"), name + "post_attention_layernorm", d.width, False, count)
        entries += norm((*path, "mlp_out_norm"), name + "post_feedforward_layernorm", d.width, False, count)
    if not d.tied_head:
        entries += linear(("decoder", "head"), "head", (d.width,), (d.vocab_size,), False, None)
    return tuple(entries)
