"""Prefill and decode with a KV cache as argument and result; the lanes of a row share its cache."""

from mmalign_jax.sampling.compiled import compiler_options
from mmalign_jax.sampling.decode import DecodeOptions, LaneStart, Samples, decode_lanes, lane_keys
from mmalign_jax.sampling.hidden_slots import kept_slots, without_hidden
from mmalign_jax.sampling.turns import LaneTokens, Turns

__all__ = [
    "DecodeOptions", "LaneStart", "LaneTokens", "Samples", "Turns", "compiler_options", "decode_lanes", "kept_slots", "lane_keys",
    "without_hidden",
]  # fmt: skip
