"""A Hugging Face directory as a model that this package runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config
from mmalign_jax.hf.adapters import import_adapter, with_adapter
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import Processor, load_processor
from mmalign_jax.hf.score_head import load_head
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.implementation import Attention
from mmalign_jax.models.lora import initial_factors, is_factor
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.params import param_shardings
from mmalign_jax.models.score_head import PART as SCORE_HEAD
from mmalign_jax.models.tree import LeafPath, split, union


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Where the model is, its definition, processor and mesh: everything but the weights, which are read when they are asked for.

    Args:
      adapter: directory that low-rank factors are read from; "": new ones are made, from `seed`, where `sizes` has some.

    A score head, where `sizes` has one, is that of the adapter's directory, else of `path`, else new, from `seed`.
    """

    path: Path
    sizes: MllmConfig
    model: Mllm
    processor: Processor
    mesh: Mesh
    adapter: str = ""
    seed: int = 0

    @classmethod
    def read(cls, path: Path, mesh: Mesh, compute_dtype: str = "auto", *, remat: str = "dots", attention: str = "auto") -> "Pretrained":
        """Reads config, tokenizer and processor.

        Args:
          compute_dtype: "float32", "bfloat16", or "auto", see `mesh.compute_dtype`.
          remat: see `models.remat`.
          attention: see `models.implementation`.

        Raises:
          UserError: `path` is not the directory of a model that this package knows.
        """
        sizes = read_config(path)
        processor = load_processor(path, sizes)
        dtype = mesh_lib.compute_dtype(compute_dtype, jax.default_backend())
        how = {"remat": remat, "attention": Attention(attention, mesh_lib.platform(mesh))}
        return cls(path, sizes, Mllm(sizes, processor.mean, processor.std, dtype, **how), processor, mesh)

    def adapted(self, config: Config) -> "Pretrained":
        """The model with the adapter and the score head that a run asks for, if it does.

        Raises:
          UserError: see `adapters.with_adapter`.
        """
        sizes = dataclasses.replace(with_adapter(config, self.sizes), score_head=config.objective.score_head)
        model = dataclasses.replace(self.model, config=sizes)
        return dataclasses.replace(self, sizes=sizes, model=model, adapter=config.model.adapter, seed=config.train.seed)

    def params(self, dtype: str = "float32", wanted: Callable[[LeafPath], bool] = lambda path: True) -> dict:
        """The parameter tree, in its shards; only the leaves whose path is wanted. A score head stays float32."""
        shardings = param_shardings(self.sizes, self.mesh)
        base = load_params(self.path, self.sizes, shardings, dtype, wanted)
        if self.sizes.score_head:
            head = load_head([Path(self.adapter), self.path] if self.adapter else [self.path], self.sizes, self.seed, shardings)
            base |= split({SCORE_HEAD: head}, wanted)[0]
        if not self.sizes.lora:
            return base
        if self.adapter:
            factors = import_adapter(self.adapter, self.sizes, shardings, dtype)
        elif not split(shardings, lambda path: is_factor(path) and wanted(path))[0]:
            return base
        else:
            factors = initial_factors(self.sizes, self.seed, shardings, dtype)
        return union(base, split(factors, wanted)[0])
