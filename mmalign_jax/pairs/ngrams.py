"""How many words two texts share. Needs nothing but the standard library."""

import collections
import math
import re


def ngram_cosine(a: str, b: str) -> float:
    """Cosine of the counts of words and word pairs, case and punctuation aside: 1 for the same words in the same order, 0 for none shared.

    Unlike a sentence encoder it has no notion of meaning, and one changed word in a short answer already counts: with it, "similarity
    below 0.97" means "some word differs" for answers of up to 33 different words, and "a word inside differs" for up to 50.
    """
    left, right = _counts(a), _counts(b)
    if not left or not right:
        return 1.0 if left == right else 0.0
    dot = sum(count * right[gram] for gram, count in left.items())
    return dot / math.sqrt(sum(c * c for c in left.values()) * sum(c * c for c in right.values()))


def _counts(text: str) -> collections.Counter:
    words = re.findall(r"\w+", text.lower())
    return collections.Counter(words) + collections.Counter(zip(words, words[1:], strict=False))
