"""Training on the same pairs in rows of one shape, in eight buckets, and with several pairs a row: epochs, timed in turn in one process.

    python -m mmalign_jax.benchmark.packed_step text
    python -m mmalign_jax.benchmark.packed_step mixed

The lengths are those of `benchmark.packing`, a quarter of them, so that a CPU can do it: text alone, or half of the pairs with a picture. DPO with a
live reference and a frozen tower; a LLaVA of random weights (2 layers of width 256, vocabulary 4,096).
"""

import dataclasses
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import PIL.Image

from mmalign_jax import losses
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.benchmark import words
from mmalign_jax.benchmark.model import hf_config, write_model
from mmalign_jax.benchmark.packing import SETS, Lengths
from mmalign_jax.config import DataConfig, OptimizerConfig
from mmalign_jax.data.device import to_device
from mmalign_jax.data.loader import Loader, make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.report.console import format_table
from mmalign_jax.scenes.language import SPACE
from mmalign_jax.training.flops import Work, step_flops
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.optimizer import make_optimizer, make_schedule
from mmalign_jax.training.packed import cost_of
from mmalign_jax.training.step import init_state, make_train_step
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import Media, Part, Preference, PreferenceRecord, Response, Turn

PAIRS, BATCH, ROUNDS = 512, 16, 2
EPOCH = PAIRS // BATCH
STEPS = {"1 bucket": 2, "8 buckets": EPOCH, "packed": EPOCH}  # of a round; rows of one shape all cost the same, others only on average
_SHORTER, _SIDE, _VOCABULARY = 4, 168, 4096
_FROZEN = ("vision_tower",)
_SETS = {"text": SETS[4], "mixed": SETS[3]}


def model_config() -> dict:
    config = hf_config(_SIDE, small=True)
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "vocab_size": _VOCABULARY}
    return config


def records(lengths: Lengths, count: int, seed: int) -> list[PreferenceRecord]:
    """Pairs of random words whose lengths are a quarter of those drawn; pictures of noise, of 144 tokens."""
    known = [word[len(SPACE) :] for word in words.vocabulary(_VOCABULARY) if word.startswith(SPACE) and word[len(SPACE) :].isalpha()]
    random, out = np.random.default_rng(seed), []
    for number, size in enumerate(lengths.sizes(count, seed)):
        say = lambda tokens: " ".join(random.choice(known, max(1, tokens // _SHORTER)))  # noqa: E731
        media = ()
        if size.images:
            file = io.BytesIO()
            PIL.Image.fromarray(random.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)).save(file, "PNG", compress_level=1)
            media = (Media("image", file.getvalue()),)
        # behind a picture stands the one word that the tokenizer knows without a space in front
        text = ("Describe " if media else "") + say(size.prefix - 576 * size.images)
        parts = (*(Part(media=index) for index in range(len(media))), Part(text=text))
        answers = tuple(Response(say(tokens)) for tokens in size.answers)
        out.append(PreferenceRecord(str(number), media, (Turn("user", parts),), answers, (Preference(0, 1),)))
    return out


@dataclasses.dataclass
class Side:
    """One way to lay out the pairs: seconds a pair by round, and FLOPs a pair by the formula."""

    name: str
    loader: Loader
    steps: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    flops: float = 0.0
    empty: float = 0.0
    programs: int = 0


def measure(name: str) -> list[Side]:
    """The three sides, measured in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        policy = Pretrained.read(write_model(Path(scratch) / "model", model_config()), mesh_lib.make_mesh(devices=jax.devices()[:1]), "float32")
        objective, rule = losses.build("dpo"), Trainable(frozenset(_FROZEN))
        settings, work = OptimizerConfig(learning_rate=1e-6, schedule="constant"), Work(reference=True)
        optimizer = make_optimizer(settings, 1 << 20)
        step = make_train_step(LossFunction(policy.model, objective), optimizer, make_schedule(settings, 1 << 20))
        sides = [Side(which, _loader(policy, records(_SETS[name], PAIRS, seed=0), which, work), steps) for which, steps in STEPS.items()]
        with jax.set_mesh(policy.mesh):
            reference, frozen = rule.split(policy.params())
            state = init_state(jax.tree.map(lambda x: x.copy(), reference), frozen, optimizer, seed=0, objective=objective)
            for turn, side in itertools.product(range(ROUNDS + 1), sides):
                side.loader.set_state(side.loader.get_state() | {"rows": 0})
                shapes, started = set(), time.perf_counter()
                for _ in range(side.steps):
                    batch = next(side.loader)
                    if not turn:
                        shapes.add(batch.tokens.shape)
                        side.flops += step_flops(policy.sizes, batch, work=work, freeze=_FROZEN) / (side.steps * BATCH)
                        side.empty += float(np.mean(batch.role == 0)) / side.steps
                    state, metrics = step(state, reference, to_device(batch, policy.mesh))
                    jax.block_until_ready(metrics)
                side.programs = side.programs or len(shapes)
                if turn:  # the first round compiles
                    side.seconds.append((time.perf_counter() - started) / (side.steps * BATCH))
    return sides


def _loader(policy: Pretrained, some: list[PreferenceRecord], which: str, work: Work) -> Loader:
    plan = plan_rows(some, policy.processor, DataConfig(buckets=8 if which == "8 buckets" else 1), answers=2)
    cost: Callable | None = cost_of(policy.sizes, 2, work=work, freeze=_FROZEN) if which == "packed" else None
    return make_loader(some, policy.processor, plan, batch_size=BATCH, devices=1, packed=cost)


def main() -> None:
    """Prints the table."""
    if len(sys.argv) != 2 or sys.argv[1] not in _SETS:
        raise SystemExit(f"give one of {', '.join(_SETS)}")
    sides, rows = measure(sys.argv[1]), []
    packed = sides[-1]
    for side in sides:
        ratios = [own / ours for own, ours in zip(side.seconds, packed.seconds, strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        pairs_per_s = 1 / statistics.median(side.seconds)
        by_formula = f"{side.flops / packed.flops:.2f}"
        rows.append((side.name, str(side.programs), f"{side.empty:.0%}", f"{pairs_per_s:.2f}", spread, by_formula))
    print(format_table(rows, (sys.argv[1], "programs", "empty", "pairs/s", "time beside packed", "FLOPs beside packed")))


if __name__ == "__main__":
    main()
