"""Where a sentence of a reference answer is split, and how what the policy writes there is joined to it again."""

import dataclasses

import numpy as np
from jaxtyping import Int32

from mmalign_jax.hf.processor import Answer, Processor
from mmalign_jax.pairs.sentences import split_sentences, swap_yes_no


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference answer: its text, its sentences as character spans, and its tokens."""

    text: str
    spans: tuple[tuple[int, int], ...]
    answer: Answer

    @classmethod
    def read(cls, text: str, processor: Processor) -> "Reference":
        """Raises UserError when the text cannot be an answer (`Processor.answer`)."""
        return cls(text, tuple(split_sentences(text)), processor.answer(text))


@dataclasses.dataclass(frozen=True)
class Split:
    """One sentence in one attempt.

    Args:
      sentence: its number in the reference.
      swapped: whether its leading yes or no is exchanged.
      context: the answer that the policy goes on from: the clean reference, or the reference up to the swapped sentence.
      tokens: of `context`, in front of the split; None when no token of the sentence is left to write.
      kept: characters of the sentence in front of the split (the white space before it included).
    """

    sentence: int
    swapped: bool
    context: str
    tokens: Int32[np.ndarray, " n"] | None
    kept: str

    def join(self, written: str) -> str:
        """The corrupted sentence: what is kept, and what the policy wrote behind it. "" when there is nothing but white space."""
        if self.tokens is None or self.kept.strip():
            return self.kept + written
        return self.kept + written.lstrip() if written.strip() else ""


def draw_split(
    reference: Reference, number: int, swap_probability: float, random: np.random.Generator, processor: Processor, unit: str = "word"
) -> Split:
    """Splits a sentence before a word drawn uniformly, words being what white space separates; it may be the first one.

    With `unit` "token" it may be any token, inside of words too.

    A leading yes or no is exchanged with `swap_probability`. Then the split lies behind the exchanged word, or else the policy would
    write it anew; a full stop right behind it may be written anew too.

    Raises:
      UserError: the swapped sentence has a word for which the tokenizer has no token.
    """
    start, end = reference.spans[number]
    source, behind = reference, start
    swap = swap_yes_no(reference.text[start:end])
    swapped = swap is not None and random.random() < swap_probability
    if swapped:
        source = Reference.read(reference.text[:start] + swap[0], processor)
        behind, end = start + swap[1], len(source.text)
    inside = _tokens_inside(source, start, end)
    starts = {"word": _starts_word, "token": _starts_token}[unit]
    choices = [index for index in inside if starts(source, index) and source.answer.spans[index, 0] >= behind]
    if swapped:
        choices += [index for index in inside if source.answer.spans[index, 0] >= behind][:1]
    choices = sorted({_before_space(source, index, inside[0]) for index in choices})
    if not choices:  # the swapped word with its full stop is one token, or there is no word
        return Split(number, swapped, source.text, None, source.text[start:end])
    split = int(random.choice(choices))
    kept = source.text[start : max(start, int(source.answer.spans[split - 1, 1]))].rstrip() if split > inside[0] else ""
    space = source.text[start:end]
    return Split(number, swapped, source.text, source.answer.ids[:split], kept or space[: len(space) - len(space.lstrip())])


def _tokens_inside(source: Reference, start: int, end: int) -> list[int]:
    """Tokens that end in the sentence; the first sentence owns the empty token that some tokenizers begin with."""
    ends = source.answer.spans[:-1, 1]  # without the end token
    return np.flatnonzero(((ends > start) | (start == 0)) & (ends <= end)).tolist()


def _starts_word(source: Reference, index: int) -> bool:
    """Whether the token begins with a character behind white space, or with the answer; never in the middle of a character's bytes."""
    start, stop = map(int, source.answer.spans[index])
    first = start + len(source.text[start:stop]) - len(source.text[start:stop].lstrip())
    return _starts_token(source, index) and first < stop and not source.text[:first][-1:].strip()


def _starts_token(source: Reference, index: int) -> bool:
    """Whether the token begins with a character of its own, and is more than white space."""
    start, stop = map(int, source.answer.spans[index])
    return bool(source.text[start:stop].strip()) and (index == 0 or start >= int(source.answer.spans[index - 1, 1]))


def _before_space(source: Reference, index: int, first: int) -> int:
    """The split in front of the tokens of nothing but white space before a word: behind one of them, models expect other words."""
    while index > first and not source.text[slice(*source.answer.spans[index - 1])].strip():
        index -= 1
    return index
