"""The four splits, as records.

  sft             usual pictures, also read cell by cell; their annotator trusts the habit, so captions and answers sometimes claim an absent partner
  align           usual and habit-breaking pictures, described truly, with some questions
  test            usual pictures, described truly
  counterfactual  habit-breaking pictures, described truly

Picture i of a split is a function of (seed, split, i) alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mmalign_jax.scenes import language, render, world
from mmalign_jax.scenes.world import HABITS, KINDS, Habit, Scene, SceneObject
from mmalign_jax.types import Media, Part, PreferenceRecord, Response, Turn

VERSION = 1  # raised whenever a record of some seed changes
ORIGIN = "scenes/"  # what the ids of the world's records begin with
SPLITS = ("sft", "align", "test", "counterfactual")
FALSE_CLAIM = 0.5  # probability that the SFT annotator claims the absent partner of a head
ALIGN_BROKEN = 0.5  # share of habit-breaking pictures in the alignment split

_ASKED = {"sft": 1, "align": 2}  # yes/no questions a picture
_SCENE, _PIXELS, _TEXTS = range(3)  # separate streams, so that a change in one leaves the others as they are


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture with its truth, and what its annotator says about it."""

    id: str
    scene: Scene
    claimed: tuple[SceneObject, ...]  # differs from the scene's objects only in the SFT split
    seed: int
    split: str
    index: int

    def pixels(self) -> np.ndarray:
        """uint8 `[64, 64, 3]`."""
        return render.render(self.scene, _stream(self.seed, self.split, self.index, _PIXELS))


def item(seed: int, split: str, index: int) -> Item:
    """Picture `index` of a split."""
    rng = _stream(seed, split, index, _SCENE)
    broken = split == "counterfactual" or (split == "align" and rng.random() < ALIGN_BROKEN)
    scene = world.sample_scene(rng, Habit.BROKEN if broken else Habit.USUAL)
    claimed = _believed(scene, _stream(seed, split, index, _TEXTS)) if split == "sft" else scene.objects
    return Item(f"{ORIGIN}{split}/{index:06d}", scene, claimed, seed, split, index)


def records(seed: int, split: str, count: int) -> Iterator[PreferenceRecord]:
    """The records of the first `count` pictures: a caption each, and in `sft` and `align` yes/no questions.

    Every record has one image, one user turn and one reference answer. `meta` holds the truth:
    `{"split", "objects": [{"kind", "color", "count", "place", "cells"}, ...]}`, and for a question the `kind` asked for.
    """
    for index in range(count):
        yield from item_records(item(seed, split, index))


def item_records(it: Item) -> Iterator[PreferenceRecord]:
    media = (Media(kind="image", data=render.png(it.pixels()), origin=it.id + ".png"),)
    meta = {"split": it.split, "objects": [_plain(thing) for thing in it.scene.objects]}
    yield _record(it.id + "/caption", media, language.DESCRIBE, language.caption(it.claimed), meta)
    if it.split == "sft":
        what = ("kind", "color")[it.index % 2]
        prompt = {"kind": language.READ_KINDS, "color": language.READ_COLORS}[what]
        yield _record(f"{it.id}/{what}s", media, prompt, language.reading(it.scene.objects, lambda thing: getattr(thing, what)), meta)
    for number, (kind, answer) in enumerate(_questions(it)):
        yield _record(f"{it.id}/question{number}", media, language.question(kind), answer, meta | {"kind": kind})


def _record(record_id: str, media: tuple[Media, ...], prompt: str, answer: str, meta: dict) -> PreferenceRecord:
    turn = Turn("user", (Part(media=0), Part(text=prompt)))
    return PreferenceRecord(record_id, media, (turn,), (Response(answer, source="truth"),), meta=meta)


def _questions(it: Item) -> Sequence[tuple[str, str]]:
    rng = _stream(it.seed, it.split, it.index, _TEXTS)
    rng.random(len(HABITS))  # the draws of _believed
    claimed = [thing.kind for thing in it.claimed]
    absent = [kind for kind in KINDS if kind not in claimed]
    tempting = [HABITS[kind] for kind in it.scene.lonely_heads if HABITS[kind] in absent]
    there, missing = it.claimed[int(rng.integers(len(it.claimed)))], str(rng.choice(tempting or absent))
    both = [(there.kind, language.answer(there.kind, there)), (missing, language.answer(missing, None))]
    if it.index % 4 > 1:
        both.reverse()
    return both[: _ASKED.get(it.split, 0)]


def _believed(scene: Scene, rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """What an annotator sees who trusts the habit: beside a lonely head sometimes one partner, of the head's colour."""
    trust = dict(zip(HABITS, rng.random(len(HABITS)) < FALSE_CLAIM, strict=True))
    out = []
    for thing in scene.objects:
        out.append(thing)
        if thing.kind in scene.lonely_heads and trust[thing.kind]:
            out.append(SceneObject(HABITS[thing.kind], thing.color, 1, thing.place, ()))
    return tuple(out)


def _plain(thing: SceneObject) -> dict:
    return {"kind": thing.kind, "color": thing.color, "count": thing.count, "place": thing.place, "cells": list(thing.cells)}


def _stream(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    return world.generator(seed, SPLITS.index(split), index, purpose)
