"""Which implementation computes the attention of packed rows: blocks of queries, splash on TPUs, or cuDNN's on CUDA GPUs."""

import dataclasses

from mmalign_jax.errors import UserError
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.config import DecoderConfig

IMPLEMENTATIONS = ("blocks", "splash", "cudnn")
SETTINGS = ("auto", *IMPLEMENTATIONS)

_PLATFORM = {"splash": "tpu", "cudnn": "cuda"}


@dataclasses.dataclass(frozen=True)
class Attention:
    """A choice, and what it depends on beside the rows.

    Args:
      setting: one of `SETTINGS`. "auto" is splash on TPUs in bfloat16 where it can run, and blocks elsewhere. It leaves cuDNN's to those who name it,
        until that path has run on a GPU.
      platform: what the rows are computed on: "cpu", "tpu", "cuda" or "rocm".
    """

    setting: str = "blocks"
    platform: str = "cpu"

    def __post_init__(self):
        if self.setting not in SETTINGS:
            raise ValueError(f"unknown attention {self.setting!r}; there are {', '.join(SETTINGS)}")

    def of(self, config: DecoderConfig, dtype: str, regions: Regions) -> str:
        """The implementation, one of `IMPLEMENTATIONS`, for rows with these regions.

        Raises:
          UserError: `setting` names one that cannot compute these rows, and why.
        """
        if self.setting == "auto":
            return "splash" if dtype == "bfloat16" and not self.problem("splash", config, dtype, regions) else "blocks"
        if problem := self.problem(self.setting, config, dtype, regions):
            raise UserError(f"config.model.attention: {self.setting} {problem}; auto or blocks can")
        return self.setting

    def problem(self, name: str, config: DecoderConfig, dtype: str, regions: Regions) -> str:
        """Why an implementation cannot compute these rows, "" where it can."""
        if name == "blocks":
            return ""
        if self.platform != _PLATFORM[name]:
            return f"runs on the platform {_PLATFORM[name]}, and this is {self.platform}"
        if config.bidirectional == "image":
            return "knows masks that are the same for all rows, and this model's images see themselves in both directions wherever they are"
        if window_binds(config, regions):
            slots = sum(regions.reach)
            return f"cannot count a window of {config.sliding_window} positions over padding, and a prefix and an answer have {slots} slots"
        if name == "cudnn" and regions.longest is not None:
            return "makes one causal sequence of an answer and the whole prefix before it, and rows hold several pairs (config.data.packed)"
        return "" if name == "splash" else _cudnn_problem(config, dtype)


def _cudnn_problem(config: DecoderConfig, dtype: str) -> str:
    if dtype not in ("bfloat16", "float16"):
        return f"computes in half precision, and this run in {dtype} (config.model.compute_dtype)"
    if config.head_width % 8 or config.head_width > 256:
        return f"wants heads of a multiple of 8 channels, at most 256; the model's have {config.head_width}"
    if config.attention_softcap is not None:
        return "has no soft cap of attention scores, which this model wants"
    if config.bidirectional != "none":
        return "is used where the prefix is causal, and this model's is not"
    return ""


def window_binds(config: DecoderConfig, regions: Regions) -> bool:
    """Whether some layer has a window that hides something: a prefix and an answer are more positions than it spans."""
    windowed = config.sliding_window is not None and (not config.local_layers or any(config.local_layers))
    return windowed and sum(regions.reach) > config.sliding_window
