"""A Hugging Face directory as a model that this package runs."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import jax
from jax.sharding import Mesh

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import Processor, load_processor
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.params import param_shardings


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Where the model is, its definition, processor and mesh: everything but the weights, which are read when they are asked for."""

    path: Path
    sizes: MllmConfig
    model: Mllm
    processor: Processor
    mesh: Mesh

    @classmethod
    def read(cls, path: Path, mesh: Mesh, compute_dtype: str = "auto", *, remat: bool = False) -> "Pretrained":
        """Reads config, tokenizer and processor.

        Args:
          compute_dtype: "float32", "bfloat16", or "auto", see `mesh.compute_dtype`.
          remat: recompute every layer in the backward pass.

        Raises:
          UserError: `path` is not the directory of a model that this package knows.
        """
        sizes = read_config(path)
        processor = load_processor(path, sizes)
        dtype = mesh_lib.compute_dtype(compute_dtype, jax.default_backend())
        return cls(path, sizes, Mllm(sizes, processor.mean, processor.std, dtype, remat=remat), processor, mesh)

    def params(self, dtype: str = "float32", parts: Collection[str] | None = None) -> dict:
        """The parameter tree, in its shards; only these parts of it, where they are named."""
        return load_params(self.path, self.sizes, param_shardings(self.sizes, self.mesh), dtype, parts)
