"""Strings that end an answer, found while it is written, also where they begin and end inside of tokens.

A string is matched by an automaton over characters (Aho and Corasick, 1975): its state is the longest beginning of a stop string that the
text so far ends with. What a token's characters do to each state is worked out once, so that a step of decoding is one look-up. Characters
that a vocabulary spells with several tokens, a byte each, are not found.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from mmalign_jax import mesh


@dataclasses.dataclass(frozen=True, eq=False)
class StopStrings:
    """The automaton of some strings and a vocabulary; made by `automaton`. Static: it is closed over, and equal only to itself.

    Args:
      after: state after a token, by state and token. The last state is that of a complete string, and stays.
    """

    after: Int32[np.ndarray, "states V"]

    def step(self, state: Int[Array, "B S"], token: Int[Array, "B S"]) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
        """The state behind one more token of each lane, 0 at the beginning; and whether a string is complete."""
        states, vocabulary = self.after.shape
        place = state * vocabulary + token
        sharding = jax.typeof(token).sharding if mesh.active() else None
        after = jnp.asarray(self.after).reshape(-1).at[place].get(out_sharding=sharding)
        return after, after == states - 1


def automaton(strings: Sequence[str], texts: Sequence[str]) -> StopStrings:
    """Of stop strings, and every token's text as it stands within an answer ("" for those that write none).

    Raises:
      ValueError: a string is empty.
    """
    if not all(strings):
        raise ValueError("a stop string is empty")
    heads = sorted({string[:length] for string in strings for length in range(len(string) + 1)}, key=lambda head: (len(head), head))
    going = [head for head in heads if not any(string in head for string in strings)]
    number, complete = {head: index for index, head in enumerate(going)}, len(going)

    def behind(head: str, char: str) -> int:
        text = head + char
        if any(text.endswith(string) for string in strings):
            return complete
        return next(number[text[start:]] for start in range(len(text) + 1) if text[start:] in number)

    alphabet = set("".join(strings))
    moves = {(head, char): behind(head, char) for head in going for char in alphabet}
    after = np.zeros((complete + 1, len(texts)), np.int32)
    after[complete] = complete
    # tokens without a character of the strings, nearly all, lead back to the beginning
    spelled = collections.defaultdict(list)
    for token, text in enumerate(texts):
        if not text:
            after[:, token] = np.arange(complete + 1)
        elif alphabet & set(text):
            spelled[text].append(token)
    for text, tokens in spelled.items():
        for start in range(complete):
            state = start
            for char in text:
                if state == complete:
                    break
                state = moves.get((going[state], char), 0)
            after[start, tokens] = state
    return StopStrings(after)
