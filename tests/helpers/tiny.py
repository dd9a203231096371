"""A tiny LLaVA as the package loads it, rows for it, and what the tests of model, sampler and step compute with them."""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmalign_jax.data.layout import RowLayout, lay_out, stack_rows, tokenize
from mmalign_jax.data.shared_pictures import places
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import Processor, load_processor
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.mllm import Mllm, Prefill
from mmalign_jax.models.params import param_shardings
from mmalign_jax.sampling import DecodeOptions, LaneStart, Samples, decode_lanes, lane_keys
from mmalign_jax.training.branches import Side, branch_logps
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import Media, PairBatch, Part, Preference, PreferenceRecord, Response, Turn

# Most of the time of these tests is XLA's; its optimisations are of no use to functions that run once on tiny arrays.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FROZEN_TOWER = Trainable(frozenset({"vision_tower"}))


@dataclasses.dataclass(frozen=True)
class Tiny:
    directory: pathlib.Path
    config: MllmConfig
    processor: Processor
    model: Mllm
    params: dict

    @classmethod
    def load(cls, directory: pathlib.Path, **changes) -> "Tiny":
        config = read_config(directory)
        processor = load_processor(directory, config)
        return cls(directory, config, processor, Mllm(config, processor.mean, processor.std, **changes), load_params(directory, config))

    def sharded(self, mesh: jax.sharding.Mesh) -> dict:
        return load_params(self.directory, self.config, param_shardings(self.config, mesh))


def noise_png(seed: int, side: int = 28) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def record(name: str, prompt: str, *answers: str, images: Sequence[int] = ()) -> PreferenceRecord:
    """A record whose pictures are noise from the seeds `images`."""
    media = tuple(Media("image", noise_png(seed)) for seed in images)
    parts = (*(Part(media=index) for index in range(len(media))), Part(text=prompt))
    prefs = (Preference(0, 1),) if len(answers) > 1 else ()
    return PreferenceRecord(name, media, (Turn("user", parts),), tuple(map(Response, answers)), prefs)


# Two unlike pictures in a row each, both in one row, and a row of text; prompts and answers of unlike lengths.
MIXED = (
    record("red", "What is in the picture?", "There is a red cat.", "There is a blue dog on the table.", images=[1]),
    record("two", "Describe this image in detail.", "A dog sits next to a blue chair.", "A cup.", images=[1, 2]),
    record("text", "Is there a bird?", "No, there is not any bird!", "Yes, there are two birds."),
    record("blue", "Describe?", "A yellow car and three people.", "No.", images=[2]),
)


def batch_of(
    records: Sequence[PreferenceRecord], processor, *, prefix_slots: int = 64, answer_slots: int = 24, answers: int = 2, images: int = 2
) -> PairBatch:
    """The records as one batch `[B, ...]`, with at least so many slots and images."""
    prefs = [record.prefs[0] if record.prefs else None for record in records]
    sizes = [tokenize(*pair, processor, answers).size for pair in zip(records, prefs, strict=True)]
    canvases = [processor.pictures.blank.canvas, *(size.canvas for size in sizes)]
    layout = RowLayout(
        prefix_slots=max(prefix_slots, *(size.prefix for size in sizes)),
        answer_slots=max(answer_slots, *(size.longest for size in sizes)),
        answers=answers,
        images=max(images, *(size.images for size in sizes)),
        canvas=(max(y for y, _ in canvases), max(x for _, x in canvases)),
        patch_slots=max(processor.pictures.blank.slots, *(size.patch_slots for size in sizes)),
    )
    rows = [lay_out(*pair, processor, layout) for pair in zip(records, prefs, strict=True)]
    return jax.tree.map(jnp.asarray, stack_rows(rows, layout))


def prompt_ids(processor, turns: Sequence[Turn]) -> np.ndarray:
    """Ids of a prompt whose pictures all take the same."""
    media = sum(part.media is not None for turn in turns for part in turn.parts)
    return processor.prompt_ids(turns, [processor.pictures.blank] * media)


def parts(batch: PairBatch, count: int = 1) -> PairBatch:
    """`[B, ...]` -> `[A, B / A, ...]`, what a training step takes."""
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def rows(batch: PairBatch, *wanted: int) -> PairBatch:
    return jax.tree.map(lambda x: x[np.array(wanted)], batch)


def shared(batch: PairBatch, groups: int = 1) -> PairBatch:
    """The rows `[B]` with the distinct pictures of each group of rows once."""
    leaves, known = jax.tree.leaves((batch.images, batch.patches)), {}
    content = (b"".join(np.asarray(leaf[row]).tobytes() for leaf in leaves) for row in range(batch.tokens.shape[0]))
    place, first = places(np.array([known.setdefault(one, len(known)) for one in content]).reshape(groups, -1))
    size = int(first.sum(axis=1).max())
    kept = [[*found, *found[:1] * (size - len(found))] for found in (np.flatnonzero(group).tolist() for group in first)]
    kept = np.concatenate([np.array(found) + number * first.shape[1] for number, found in enumerate(kept)])
    images, patches = jax.tree.map(lambda x: x[kept], (batch.images, batch.patches))
    return dataclasses.replace(batch, images=images, patches=patches, picture=jnp.asarray(place))


def prefill(model: Mllm, params: dict, batch: PairBatch, visible=None) -> Prefill:
    features = model.encode_images(params, batch.images, batch.patches)
    return model.prefill(params, features, batch, visible)


def answer_sums(model: Mllm, params: dict, batch: PairBatch) -> jax.Array:
    """Log-prob sums `[B, K]` of the answers."""
    return branch_logps(Side(model, params), model.tower(params, batch.images, batch.patches), batch)[0]


def sample(model: Mllm, params: dict, batch: PairBatch, options: DecodeOptions, lanes: int = 1, seed: int = 0) -> Samples:
    """`lanes` continuations behind every row's prefix."""
    filled = prefill(model, params, batch)
    keys = lane_keys(jax.random.key(seed), batch.record_key, jnp.zeros_like(batch.record_key, jnp.int32), lanes)
    start = LaneStart.behind_prefix(batch.role, lanes)
    return decode_lanes(model, params, filled, batch, start, keys, options)
