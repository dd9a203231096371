"""What the sides of the step benchmark are given: pairs, pictures and settings, on disk. Nothing here imports jax or torch."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from mmalign_jax.benchmark import words
from mmalign_jax.scenes.language import SPACE

_FILE = "pairs.json"


@dataclasses.dataclass(frozen=True)
class Shape:
    """How large the work is.

    Args:
      batch: pairs of a step.
      images: pictures of a prompt, each of its own kind.
      side: height and width in pixels of those that are made; so many has the benchmark's own model.
      prompt_words, answer_words: of each; a word is a token of the benchmark's own model.
      pairs_of_image: so many pairs one behind the other show the same pictures.
    """

    batch: int = 4
    images: int = 1
    side: int = 224
    prompt_words: int = 20
    answer_words: int = 63
    pairs_of_image: int = 1


@dataclasses.dataclass(frozen=True)
class Pair:
    pictures: tuple[str, ...]
    prompt: str
    chosen: str
    rejected: str


@dataclasses.dataclass(frozen=True)
class PairWorkload:
    """Preference pairs and how they are trained on; all sides do the same.

    Every step is on the same pairs, a batch of them, in whatever order: so that what the sides report of their first steps is of the same rows.

    Args:
      model: directory of the model.
      objective: name in the registry.
      beta: of the objective.
      reference: "live", or "none" for an objective without.
    """

    model: str
    shape: Shape
    pairs: tuple[Pair, ...]
    objective: str = "dpo"
    beta: float = 0.1
    learning_rate: float = 1e-6
    reference: str = "live"

    def write(self, directory: Path) -> None:
        (directory / _FILE).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "PairWorkload":
        plain = json.loads((directory / _FILE).read_text(encoding="utf-8"))
        pairs = tuple(Pair(tuple(one.pop("pictures")), **one) for one in plain.pop("pairs"))
        return cls(shape=Shape(**plain.pop("shape")), pairs=pairs, **plain)


def make_pairs(directory: Path, shape: Shape, seed: int, vocabulary: int = words.VOCABULARY, photographs: Sequence[Path] = ()) -> tuple[Pair, ...]:
    """A batch of pairs of random words, with photographs in turn, or else with JPEG pictures of noise, which are written to `directory`."""
    known = words.vocabulary(vocabulary)
    # words that come again in another word's place are no problem; full stops and what stands without a space in front are none of ours
    plain = [word[len(SPACE) :] for word in known if word.startswith(SPACE) and word[len(SPACE) :].isalpha()]
    out = []
    for number in range(shape.batch):
        random = np.random.default_rng((seed, number))
        text = lambda count, random=random: " ".join(random.choice(plain, count))  # noqa: E731
        pictures = []
        for index in range(shape.images):
            shown = number // shape.pairs_of_image
            if photographs:
                file = photographs[(shown * shape.images + index) % len(photographs)]
            else:
                file = directory / f"{shown}-{index}.jpg"
                PIL.Image.fromarray(random.integers(0, 256, (shape.side, shape.side, 3), np.uint8)).save(file)
            pictures.append(str(file))
        # "Describe" is the word that needs no space in front
        prompt = f"Describe {text(shape.prompt_words - 1)}"
        out.append(Pair(tuple(pictures), prompt, text(shape.answer_words), text(shape.answer_words)))
    return tuple(out)
