"""Sizes and switches of a model. `hf/families/` reads them from a `config.json`; nothing here knows a family by name."""

import dataclasses
from collections.abc import Mapping

LORA_A, LORA_B = "lora_a", "lora_b"  # leaves beside a kernel


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank factors beside the linears of one part (LoRA, arXiv 2106.09685, equation 3): x W + alpha / rank (x A) B.

    Args:
      rank: columns of A and rows of B.
      targets: names of the linears in the parameter tree, such as "query" or "down".
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, linear: str) -> bool:
        return linear in self.targets


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. `kind` is default, linear or llama3; factors as in transformers' rope_parameters.

    `sections` are the frequencies that turn with time, row and column (M-RoPE, arXiv 2409.12191); () is one position a token.
    `interleaved`: the three take turns among the frequencies (Qwen3-VL) instead of following one another.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    sections: tuple[int, ...] = ()
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama line: Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3.

    Args:
      attention_bias, out_bias, mlp_bias: biases of query, key and value; of the attention's output; of the MLP.
      qk_norm: an RMS norm of every query and key head.
      norm_offset: norms multiply by 1 + scale (Gemma).
      sandwich: attention and MLP are followed by a norm of their own (Gemma 2 and 3).
      embedding_scale: factor on token embeddings, not on image features.
      query_scale: factor on attention scores; None: head_width ** -0.5.
      attention_softcap, final_softcap: scores and logits become cap * tanh(x / cap).
      sliding_window: counts positions, None is full attention.
      local_layers: which layers the window is for; () is all of them.
      local_rope: rotary positions of these layers, where they differ.
      bidirectional: what is not causal: "none", "image" (tokens of one image see each other) or "prefix" (images and prompt do).
      lora: factors that the linears have besides. So in the other parts.
    """

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    activation: str = "silu"
    tied_head: bool = False
    attention_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: bool = False
    sandwich: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope: RopeConfig | None = None
    bidirectional: str = "none"
    lora: Lora | None = None


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer over square tiles of one size, or over the patches of pictures of any size.

    Args:
      image_size: side of a tile; 0: pictures of any size (`types.Patches`).
      patch_size: side of a patch.
      frames_per_patch: frames that one patch spans; a still picture is repeated.
      patch_bias, class_token, pre_norm, post_norm: of the embedding and around the stack. A tower without `post_norm` gives its last
        hidden state as it is.
      norm: "layer" or "rms".
      positions: "learned" (a table entry a patch), "interpolated" (a square table, resampled to the picture's grid) or "none".
      position_side: side of the interpolated table.
      rotary: rotary positions by row and column.
      attention_bias, mlp_bias: every linear's bias; the attention's output always has one.
      fused_qkv: query, key and value are one tensor in checkpoints and here.
      qk_norm: RMS norms of queries and keys over all heads, with `qk_norm_eps`.
      layer_scale: a learned factor on what attention and MLP add.
      gated: the MLP has a gate.
      window: merged cells along the side of an attention window, 0: no windows.
      full_layers: layers that see the whole picture though there are windows.
      merge: side of the square of patches that becomes one image token; patches arrive in this order.
      taps: layers whose outputs go to the decoder's first layers besides (DeepStack, arXiv 2406.04334).
      causal: no token sees those behind it. For towers of texts, which are made of the same blocks (`models.image_text`).
    """

    image_size: int
    patch_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    norm_eps: float
    activation: str = "quick_gelu"
    frames_per_patch: int = 1
    patch_bias: bool = False
    class_token: bool = True
    pre_norm: bool = True
    post_norm: bool = False
    norm: str = "layer"
    positions: str = "learned"
    position_side: int = 0
    rotary: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    fused_qkv: bool = False
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    layer_scale: bool = False
    gated: bool = False
    window: int = 0
    full_layers: tuple[int, ...] = ()
    merge: int = 1
    taps: tuple[int, ...] = ()
    causal: bool = False
    lora: Lora | None = None

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def window_slots(self) -> int:
        """Patches of one attention window; patches come in runs of this many. 1 without windows."""
        return (self.window * self.merge) ** 2 if self.window else 1


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """From tower features to decoder inputs.

    Args:
      kind: "mlp" (two linears: LLaVA), "linear" (PaliGemma), "shuffle" (pixel shuffle, one linear: Idefics3), "shuffle_mlp" (pixel
        shuffle, norm, two linears: InternVL), "pool" (average, norm, one matrix: Gemma 3) or "merger" (norm, squares of patches, two
        linears: Qwen).
      scale: side of the square of patches that becomes one image token.
      norm: "layer" or "rms", where the kind has a norm.
      newline: a learned feature stands before the others; it ends rows of image tokens (LLaVA-NeXT).
      frame_pool: "average" or "max" of squares of a tile's tower features: what the tile gives as a frame of a video, behind what it
        gives as a picture, and through the same linears (LLaVA-NeXT-Video). "" where there are no such features.
      frame_scale: side of these squares.
    """

    kind: str = "mlp"
    activation: str = "gelu"
    bias: bool = True
    scale: int = 1
    norm: str = "layer"
    norm_eps: float = 1e-6
    newline: bool = False
    frame_pool: str = ""
    frame_scale: int = 2
    lora: Lora | None = None


@dataclasses.dataclass(frozen=True)
class MllmConfig:
    """A multimodal LLM: vision tower, connector, decoder.

    Args:
      family: the `model_type` of its `config.json`.
      feature_layers: hidden states of the tower that are concatenated; 0 is the embedding, -1 the last layer's output.
      keep_class_token: the class token is an image token, too.
      score_head: a fourth part gives every hidden state a number (`models.score_head`). No `config.json` asks for it, an objective does.
    """

    family: str
    decoder: DecoderConfig
    vision: VisionConfig
    connector: ConnectorConfig
    image_token_id: int
    video_token_id: int | None = None
    feature_layers: tuple[int, ...] = (-1,)
    keep_class_token: bool = False
    score_head: bool = False

    @property
    def image_tokens(self) -> int:
        """N, image tokens of one tile."""
        return self.vision.patches // self.connector.scale**2 + int(self.keep_class_token)

    @property
    def frame_tokens(self) -> int:
        """Image tokens of one tile that is a frame of a video, where these are features of their own."""
        return self.vision.patches // self.connector.frame_scale**2 if self.connector.frame_pool else 0

    @property
    def tile_features(self) -> int:
        """Features of one tile: those of a picture, then those of a frame."""
        return self.image_tokens + self.frame_tokens

    @property
    def used_vision_layers(self) -> int:
        """Layers of the tower that reach the features; those behind them are neither built nor trained, only copied on export."""
        return max(layer if layer >= 0 else self.vision.layers + 1 + layer for layer in self.feature_layers)

    @property
    def tower_tile(self) -> int:
        """Features of the tower of one tile, before the connector; 0 where pictures have any size and each patch has one."""
        return self.vision.patches + int(self.keep_class_token) if self.vision.image_size else 0

    @property
    def tower_width(self) -> int:
        """Z of the tower's features: its hidden states that are concatenated."""
        return self.vision.width * (len(self.feature_layers) + len(self.vision.taps))

    @property
    def feature_parts(self) -> int:
        """Decoder inputs that one image feature holds side by side: its own, and one for each tap of the tower."""
        return 1 + len(self.vision.taps)

    @property
    def lora(self) -> dict[str, Lora]:
        """The adapters, by part of the parameter tree."""
        parts = {"vision_tower": self.vision.lora, "projector": self.connector.lora, "decoder": self.decoder.lora}
        return {part: lora for part, lora in parts.items() if lora is not None}

    def with_lora(self, lora: Mapping[str, Lora]) -> "MllmConfig":
        """The same model with these adapters, by part, and no others."""
        return dataclasses.replace(
            self,
            vision=dataclasses.replace(self.vision, lora=lora.get("vision_tower")),
            connector=dataclasses.replace(self.connector, lora=lora.get("projector")),
            decoder=dataclasses.replace(self.decoder, lora=lora.get("decoder")),
        )
