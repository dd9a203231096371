"""What Qwen's multimodal families share: flat and nested configs, and the names of their towers' tensors."""

from collections.abc import Mapping
from typing import Any

from mmalign_jax.errors import UserError
from mmalign_jax.hf import decoders
from mmalign_jax.hf.names import HEAD, Entry, NameTable, linear, norm
from mmalign_jax.models.config import ConnectorConfig, DecoderConfig, MllmConfig, VisionConfig

EPS = 1e-6  # of every norm of the towers, in no config
# transformers' module names, see `NameTable.memory`
MEMORY = {
    "projector.": "model.visual.merger.",
    "projector.deepstack_merger_list.": "model.visual.deepstack_merger_list.",
    "vision.": "model.visual.",
    "decoder.": "model.language_model.",
    "head.": "lm_head.",
}
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


def read_text(config: Mapping[str, Any], where: str, kind: str) -> DecoderConfig:
    """The decoder; configs of transformers 4 hold its keys at the top.

    Raises:
      UserError: a switch that is not supported.
    """
    text = config.get("text_config")
    if text is None:
        text = {key: value for key, value in config.items() if key not in ("model_type", "vision_config")}
    decoder = decoders.read_decoder(text, where, kinds=(kind,), tied=config.get("tie_word_embeddings"))
    if 2 * sum(decoder.rope.sections) != decoder.head_width:
        sections = list(decoder.rope.sections)
        raise UserError(f"{where}: mrope_section {sections} must add up to half the width of a head, {decoder.head_width // 2}")
    return decoder


def read_tower(v: Mapping[str, Any], where: str, **own: Any) -> VisionConfig:
    """The keys of a `vision_config` that all of these towers have, with the family's `own` fields.

    Raises:
      UserError: a switch that the towers do not have.
    """
    decoders.expect(v.get("in_channels", v.get("in_chans", 3)), (3,), "vision_config.in_channels", where)
    rope = v.get("rope_parameters") or {}
    decoders.expect(rope.get("rope_theta", 10_000.0), (10_000.0,), "vision_config.rope_parameters.rope_theta", where)
    decoders.expect(v["hidden_act"], decoders.ACTIVATIONS, "vision_config.hidden_act", where)
    return VisionConfig(
        image_size=0,
        patch_size=v["patch_size"],
        layers=v["depth"],
        heads=v["num_heads"],
        norm_eps=EPS,
        activation=v["hidden_act"],
        frames_per_patch=v["temporal_patch_size"],
        class_token=False,
        pre_norm=False,
        rotary=True,
        fused_qkv=True,
        merge=v["spatial_merge_size"],
        **own,
    )


def assemble(config: Mapping[str, Any], where: str, vision: VisionConfig, decoder: DecoderConfig, out_width: int) -> MllmConfig:
    """The whole model.

    Raises:
      UserError: the tower's features have another width than the decoder.
    """
    decoders.expect(out_width, (decoder.width,), "the tower's output width", where)
    connector = ConnectorConfig(kind="merger", scale=vision.merge, norm=vision.norm, norm_eps=EPS)
    return MllmConfig(
        family=config["model_type"],
        decoder=decoder,
        vision=vision,
        connector=connector,
        image_token_id=config.get("image_token_id", 151655),
        video_token_id=config.get("video_token_id", 151656),
    )


def name_table(config: MllmConfig, prefixes: Mapping[str, str], mlp: Mapping[str, str], merger: tuple[str, str, str]) -> NameTable:
    """The names of one model.

    Args:
      prefixes: see `NameTable`.
      mlp: our name of each linear of a layer's MLP -> the checkpoint's.
      merger: names of a merger's norm and of its two linears.
    """

    def unused(reduced: str) -> bool:
        return (reduced == HEAD and config.decoder.tied_head) or reduced.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"))

    v, names = config.vision, ("projector.", *(f"projector.deepstack_merger_list.{tap}." for tap in range(len(config.vision.taps))))
    mergers = [_merger(config, part, name, merger) for part, name in enumerate(names)]
    entries = (*_tower_entries(v, mlp), *(entry for part in mergers for entry in part), *decoders.decoder_entries(config.decoder))
    return NameTable(prefixes, entries, (), unused, MEMORY)


def _tower_entries(v: VisionConfig, mlp: Mapping[str, str]) -> tuple[Entry, ...]:
    path, name, count, bias = ("vision_tower", "layers"), "vision.blocks.{}.", v.layers, v.norm == "layer"
    embedding, split = ("vision_tower", "embedding"), (v.heads, v.width // v.heads)
    patch = (v.frames_per_patch, v.patch_size, v.patch_size, 3)
    shapes = ((v.width, 3, *patch[:3]), (patch[0] * patch[1] * patch[2] * 3, v.width))
    entries = [
        # a convolution (out, channel, frame, row, column) as a product with flattened patches (frame, row, column, channel)
        Entry((*embedding, "patch", "kernel"), "vision.patch_embed.proj.weight", *shapes, (2, 3, 4, 1, 0)),
        *norm((*path, "norm1"), name + "norm1", v.width, bias, count),
        *linear((*path, "attention", "qkv"), name + "attn.qkv", (v.width,), (3, *split), True, count),
        *linear((*path, "attention", "out"), name + "attn.proj", split, (v.width,), True, count),
        *norm((*path, "norm2"), name + "norm2", v.width, bias, count),
    ]
    for ours, theirs in mlp.items():
        ins, outs = (v.mlp_width, v.width) if ours == "down" else (v.width, v.mlp_width)
        entries += linear((*path, "mlp", ours), f"{name}mlp.{theirs}", (ins,), (outs,), True, count)
    if v.patch_bias:
        entries.append(Entry((*embedding, "patch", "bias"), "vision.patch_embed.proj.bias", (v.width,), (v.width,)))
    if v.positions == "interpolated":
        table = (v.position_side**2, v.width)
        entries.append(Entry((*embedding, "positions"), "vision.pos_embed.weight", table, table))
    return tuple(entries)


def _merger(config: MllmConfig, part: int, name: str, names: tuple[str, str, str]) -> tuple[Entry, ...]:
    c, v = config.connector, config.vision
    square, path = v.width * c.scale**2, ("projector", "merger" if part == 0 else f"tap{part - 1}")
    norm_name, first, second = names
    return (
        *norm((*path, "norm"), name + norm_name, square if part else v.width, c.norm == "layer", None),
        *linear((*path, "fc1"), name + first, (square,), (square,), True, None),
        *linear((*path, "fc2"), name + second, (square,), (config.decoder.width,), True, None),
    )
