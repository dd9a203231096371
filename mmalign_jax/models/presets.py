"""Sizes of published models, for what needs no weights."""

from mmalign_jax.errors import UserError
from mmalign_jax.models.config import ConnectorConfig, DecoderConfig, MllmConfig, RopeConfig, VisionConfig

_CLIP_L_336 = VisionConfig(image_size=336, patch_size=14, width=1024, mlp_width=4096, layers=24, heads=16, norm_eps=1e-5)


def preset(name: str) -> MllmConfig:
    """The sizes of a published model.

    Raises:
      UserError: there is no such preset.
    """
    known = {
        "llava-1.5-7b": _llava(_vicuna(4096, 11008, 32, 32)),
        "llava-1.5-13b": _llava(_vicuna(5120, 13824, 40, 40)),
        "llava-1.6-vicuna-7b": _llava_next(_vicuna(4096, 11008, 32, 32)),
        "llava-1.6-mistral-7b": _llava_next(_MISTRAL_7B),
    }
    if name not in known:
        raise UserError(f"config.model.preset: no preset {name!r}; known: {', '.join(known)}")
    return known[name]


# Mistral-7B-Instruct-v0.2, which has no window
_MISTRAL_7B = DecoderConfig(
    vocab_size=32064,
    width=4096,
    mlp_width=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_width=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1e6),
    max_positions=32768,
)


def _llava_next(decoder: DecoderConfig) -> MllmConfig:
    connector = ConnectorConfig(newline=True)
    return MllmConfig("llava_next", decoder, _CLIP_L_336, connector, image_token_id=32000, feature_layers=(-2,))


def _llava(decoder: DecoderConfig) -> MllmConfig:
    return MllmConfig("llava", decoder, _CLIP_L_336, ConnectorConfig(), image_token_id=32000, feature_layers=(-2,))


def _vicuna(width: int, mlp_width: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=32064,
        width=width,
        mlp_width=mlp_width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_width=128,
        norm_eps=1e-5,
        rope=RopeConfig(),
        max_positions=4096,
    )
