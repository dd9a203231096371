"""What both sides of the benchmark are given: records and options, on disk, in a form that needs nothing of either side to be read.

Nothing here imports jax or torch, so that neither weighs on the other side's memory.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import PIL.Image

from mmalign_jax.benchmark import words

_FILE = "workload.json"
_SIDE = 336  # pixels of a picture


@dataclasses.dataclass(frozen=True)
class Options:
    """BDHS as both sides run it; the names are those of `config.PairsConfig`."""

    rho_th: float = 0.95
    n_iter: int = 5
    eps: float = 0.97
    temperature: float = 1.0
    top_p: float = 1.0
    max_sentence_tokens: int = 64
    max_answer_tokens: int = 256
    yes_no_swap: float = 0.5
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Item:
    """A record: its id, the file of its picture, what is asked, and the reference answer."""

    id: str
    picture: str
    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Numbered:
    """An item on its way: the number tells it from the same item in another round."""

    number: int
    item: Item


@dataclasses.dataclass(frozen=True)
class Workload:
    """Records and options; both sides make one rejected answer a record.

    Args:
      model: directory of the model.
      batch_size: rows of a device batch of ours; the other side has none.
    """

    model: str
    options: Options
    items: tuple[Item, ...]
    batch_size: int

    def write(self, directory: Path) -> None:
        (directory / _FILE).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    def pick(self, start: int, count: int) -> tuple["Numbered", ...]:
        """`count` items from number `start` on; behind the last one comes the first again."""
        return tuple(Numbered(number, self.items[number % len(self.items)]) for number in range(start, start + count))

    @classmethod
    def read(cls, directory: Path) -> "Workload":
        plain = json.loads((directory / _FILE).read_text(encoding="utf-8"))
        return cls(plain["model"], Options(**plain["options"]), tuple(Item(**item) for item in plain["items"]), plain["batch_size"])


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one record, on either side.

    Args:
      iteration: in which it ended.
      similarity: to the reference.
      accepted: whether the similarity is below eps.
      unchanged: whether it says nothing but the reference.
      words: of the rejected answer.
    """

    id: str
    iteration: int
    similarity: float
    accepted: bool
    unchanged: bool
    words: int


def make_items(directory: Path, count: int, seed: int) -> tuple[Item, ...]:
    """Noise pictures in `directory`, 336 pixels wide and high, with descriptions of 4 to 6 sentences (`words.description`)."""
    items = []
    for number in range(count):
        random = np.random.default_rng((seed, number))
        file = directory / f"{number}.png"
        PIL.Image.fromarray(random.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)).save(file, compress_level=1)
        items.append(Item(f"record {number}", str(file), words.PROMPT, words.description(random)))
    return tuple(items)


def result(item: Item, rejected: str, iteration: int, similarity: float, eps: float) -> Result:
    """What is kept of a rejected answer."""
    unchanged = rejected.split() == item.answer.split()
    return Result(item.id, iteration, similarity, similarity < eps, unchanged, len(rejected.split()))
