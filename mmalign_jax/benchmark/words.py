"""The words of the benchmark: descriptions in plain English for any model, and a vocabulary for one with random weights.

A tokenizer of whole words, so that a model with random weights writes text that can be read back. One word in twelve ends with a full
stop, so that its sentences end as often as those of a description do: behind a split in the middle about twelve words are left.
"""

import itertools
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from mmalign_jax.errors import UserError
from mmalign_jax.scenes.language import CHAT_TEMPLATE, SPACE, SPECIAL_TOKENS, write_word_tokenizer

PROMPT = "Describe this picture in detail."
SENTENCES = (4, 6)  # fewest and most of a description
WORDS_TO_STOP = 12
VOCABULARY = 32064  # tokens of the benchmark's own model, as LLaVA has

_COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "gray", "orange", "purple")
_THINGS = (
    "cup", "table", "chair", "dog", "cat", "bird", "tree", "car", "bench", "lamp", "clock", "book", "bottle", "plate", "window", "door",
    "bicycle", "umbrella", "vase", "boat", "house", "fence", "bag", "hat", "ball", "kite", "train", "horse", "sheep", "cake",
)  # fmt: skip
_MOODS = ("small", "large", "old", "new", "wooden", "bright", "dark", "round", "tall", "shiny")
_PLACES = ("street", "kitchen", "garden", "room", "park", "field", "beach", "station", "market", "garage")
_FORMS = (
    "The picture shows a {mood} {color} {thing} that stands beside a {mood} {thing} in the {mood} {place}.",
    "There is a {color} {thing} on the left side of the scene and a {mood} {thing} on the right.",
    "In the background a {color} {thing} can be seen behind the {mood} {thing} near the {place}.",
    "A {mood} {thing} lies on top of the {color} {thing} while a {color} {thing} is placed in front of it.",
    "Two people walk past the {color} {thing} and look at the {mood} {thing} in the {place}.",
    "The {mood} {place} is full of light and the {color} {thing} next to the {thing} stands out.",
    "Next to the {thing} there are several {color} objects including a {mood} {thing} and a {thing}.",
)


def description(random: np.random.Generator) -> str:
    """A reference answer of 4 to 6 sentences, about 16 words each."""
    count = int(random.integers(SENTENCES[0], SENTENCES[1] + 1))
    forms = random.permutation(len(_FORMS))[:count]
    return " ".join(_fill(_FORMS[form], random) for form in forms)


def _fill(form: str, random: np.random.Generator) -> str:
    lists = {"color": _COLORS, "thing": _THINGS, "mood": _MOODS, "place": _PLACES}
    return re.sub(r"{(\w+)}", lambda slot: str(random.choice(lists[slot[1]])), form)


def vocabulary(size: int) -> tuple[str, ...]:
    """`size` different tokens: the special ones, every word of the descriptions, and made-up words.

    Raises:
      UserError: the descriptions alone take more.
    """
    frame = re.findall(r"\S+", "USER: ASSISTANT: " + PROMPT) + [".", "?"]
    fixed = [word for form in _FORMS for word in re.sub(r"{\w+}", " ", form).split() if word != "."]
    lists = [*_COLORS, *_THINGS, *_MOODS, *_PLACES]
    ends = [f"{word}." for word in (*_THINGS, *_PLACES)]
    known = [*SPECIAL_TOKENS, SPACE, "\n", *dict.fromkeys(SPACE + word for word in (*frame, *fixed, *lists, *ends)), "Describe"]
    if len(known) > size:
        raise UserError(f"--model: its vocabulary has {size} tokens; the benchmark's words take {len(known)}; give a model with more")
    stops, out = sum(word.endswith(".") for word in known), list(known)
    for word in _made_up():
        if len(out) == size:
            return tuple(out)
        due = len(out) // WORDS_TO_STOP > stops  # the ends that the descriptions have count, too
        if SPACE + word not in known:
            stops += due
            out.append(SPACE + word + ("." if due else ""))
    raise ValueError(f"there are not so many made-up words as a vocabulary of {size} tokens takes")


def _made_up() -> Iterator[str]:
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    return ("".join(parts) for parts in itertools.product(syllables, repeat=3))


def write_tokenizer(directory: pathlib.Path, size: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` with the `vocabulary` of this size."""
    # TRL tokenizes chats without what the tokenizer would add: the first token is the template's
    template = "{{ bos_token + ' ' }}" + CHAT_TEMPLATE  # words stand behind spaces
    write_word_tokenizer(directory, vocabulary(size), apart="\n", longest=4096, template=template)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
