"""Stop strings against a search in the text."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax.sampling.stop_strings import automaton

TEXTS = ["a", "b", "ab", "ba", "aab", "", "x", "abc", "c", "bca", "\n", "\n\n", "a\nb"]


@pytest.mark.parametrize("strings", [("ab",), ("aab", "bca"), ("\n\n",), ("a", "abc"), ("abab", "ba"), ("cc", "aaab")])
def test_a_string_is_complete_where_the_text_first_holds_it(strings):
    stops = automaton(strings, TEXTS)
    tokens = np.random.default_rng(0).integers(0, len(TEXTS), (8, 40, 12))
    state, found = jnp.zeros((8, 40), jnp.int32), []
    for place in range(12):
        state, complete = stops.step(state, jnp.array(tokens[..., place]))
        found.append(complete)
    written = [["".join(TEXTS[token] for token in lane[: place + 1]) for lane in tokens.reshape(-1, 12)] for place in range(12)]
    expected = [[any(string in text for string in strings) for text in at] for at in written]
    assert 0 < np.mean(expected) < 1
    np.testing.assert_array_equal(np.reshape(found, (12, -1)), expected)


def test_an_empty_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        automaton(["", "a"], TEXTS)
