"""The world's language: captions, questions and answers, the closed list of its words, and the tokenizer that goes with it."""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mmalign_jax.scenes.world import COLORS, GRID, KINDS, PLACES, SceneObject

DESCRIBE = "Describe the picture."
READ_KINDS, READ_COLORS = "Read the kinds in the cells.", "Read the colors in the cells."
NOTHING = "nothing"

IMAGE_TOKEN = "<image>"
BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
SPECIAL_TOKENS = (UNK, BOS, EOS, PAD, IMAGE_TOKEN)  # ids 0 to 4

_COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
SPACE = "▁"

# LLaVA-1.5's layout: images first, then the text; an answer ends with </s>.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] %}
{%- if message['role'] == 'user' %}{{ 'USER: ' }}
{%- for part in parts if part['type'] == 'image' %}{{ '<image>\n' }}{%- endfor %}
{%- for part in parts if part['type'] == 'text' %}{{ part['text'] + ' ' }}{%- endfor %}
{%- else %}{{ 'ASSISTANT: ' }}
{%- for part in parts if part['type'] == 'text' %}{{ part['text'] }}{%- endfor %}{{ '</s>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"""


def caption(objects: Sequence[SceneObject]) -> str:
    """One sentence a place, in the given order: "At the top left there are two red cups and a red spoon."."""
    places = itertools.groupby(objects, key=lambda thing: thing.place)
    return " ".join(_sentence(place, list(things)) for place, things in places)


def _sentence(place: str, things: Sequence[SceneObject]) -> str:
    return f"At the {place} there {_verb(things[0])} {' and '.join(map(_noun, things))}."


def _verb(thing: SceneObject) -> str:
    return "is" if thing.count == 1 else "are"


def _noun(thing: SceneObject) -> str:
    return f"{_COUNT_WORDS[thing.count]} {thing.color} {thing.kind if thing.count == 1 else KINDS[thing.kind]}"


def reading(objects: Sequence[SceneObject], what: Callable[[SceneObject], str]) -> str:
    """One word a cell, row by row: dense labels for the vision tower, whose patches are the cells."""
    cells = [NOTHING] * GRID**2
    for thing in objects:
        for cell in thing.cells:
            cells[cell] = what(thing)
    return " ".join(cells)


def question(kind: str) -> str:
    return f"Is there a {kind} in the picture?"


def answer(kind: str, thing: SceneObject | None) -> str:
    """The answer to `question`: what there is of the kind, or that there is none."""
    return f"No, there is no {kind}." if thing is None else f"Yes, there {_verb(thing)} {_noun(thing)}."


def synonyms() -> dict[str, tuple[str, ...]]:
    """Kind -> every word that names it: the table that CHAIR needs."""
    return {kind: tuple(dict.fromkeys((kind, plural))) for kind, plural in KINDS.items()}


def words() -> tuple[str, ...]:
    """Every word and punctuation mark of the language, without the special tokens."""
    choices = itertools.product(KINDS, COLORS, _COUNT_WORDS, PLACES)
    things = [SceneObject(kind, color, count, place, ()) for kind, color, count, place in choices]
    answers = [answer(thing.kind, shown) for thing in things for shown in (thing, None)]
    captions = [caption([thing, thing]) for thing in things]
    texts = [DESCRIBE, READ_KINDS, READ_COLORS, NOTHING, *map(question, KINDS), *answers, *captions, "USER: ASSISTANT:"]
    return tuple(dict.fromkeys(itertools.chain(*(re.findall(r"[^\s.,?]+|[.,?]", text) for text in texts), ("\n",))))


def vocabulary() -> tuple[str, ...]:
    """Every token, in the order of the ids."""
    marks = [word for word in words() if not word[0].isalnum()]
    after_newline = [word for word in words() if word[0].isalnum() and word[0].isupper()]
    spaced = [SPACE + word for word in words() if word[0].isalnum()]
    return (*SPECIAL_TOKENS, SPACE, *marks, *spaced, *after_newline)


def build_tokenizer(directory: str | os.PathLike) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` of the language into an existing directory.

    One token a word, or punctuation mark; see `write_word_tokenizer`.
    """
    write_word_tokenizer(directory, vocabulary(), apart=r"[.,?\n]", longest=256)


def write_word_tokenizer(
    directory: str | os.PathLike, tokens: Sequence[str], *, apart: str, longest: int, template: str = CHAT_TEMPLATE
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` with one token a word, by default with the template of LLaVA-1.5.

    As in LLaMA's tokenizer a word carries the space before it, so a text that starts with a word and the same text after a space have the
    same tokens, and decoding gives the text back.

    Args:
      tokens: the vocabulary, in the order of the ids; the first are `SPECIAL_TOKENS`.
      apart: pattern of what is a token of its own.
      longest: most tokens of a text, as the files state it.
      template: of chats. One that writes the first token itself has a tokenizer that does not, as in newer families.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first"),
        pre_tokenizers.Split(tokenizers.Regex(apart), behavior="isolated"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="first")
    if "bos_token" not in template:
        bos = (BOS, SPECIAL_TOKENS.index(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos])
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD,
        "additional_special_tokens": [IMAGE_TOKEN], "image_token": IMAGE_TOKEN, "padding_side": "left", "model_max_length": longest,
        "clean_up_tokenization_spaces": False, "chat_template": template,
    }  # fmt: skip
    out = pathlib.Path(directory)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
