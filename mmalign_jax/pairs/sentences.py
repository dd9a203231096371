"""Sentences of an answer, and the yes/no swap of BDHS."""

import re

# they belong to the sentence, as they do in the tokens that end one (`Processor.sentence_end_ids`)
CLOSING = "\"'”’)]"
_END = re.compile(rf"[.!?]+[{re.escape(CLOSING)}]*(?=\s|$)")
# arXiv 2407.02477 tests `^[\s]*(Yes|yes|No|no)`, which also fires on "Not", "None", "North" and "No-one": a boundary is added
_YES_NO = re.compile(r"^\s*(Yes|yes|No|no)\b(?![-'’])")
_SWAP = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the sentences of a text, in characters; together they cover it.

    A sentence ends with `.`, `!` or `?` before white space or the end of the text, so "3.5" stays whole. The white space that follows
    belongs to the next sentence; behind the last sentence it belongs to that one.
    """
    spans, start = [], 0
    for match in _END.finditer(text):
        spans.append((start, match.end()))
        start = match.end()
    if text[start:].strip():
        spans.append((start, len(text)))
    elif spans and start < len(text):
        spans[-1] = (spans[-1][0], len(text))
    return spans


def swap_yes_no(sentence: str) -> tuple[str, int] | None:
    """The sentence with its leading Yes or No exchanged, and where the exchanged word ends; None when it starts with neither."""
    match = _YES_NO.match(sentence)
    if match is None:
        return None
    word = _SWAP[match.group(1)]
    start = match.start(1)
    return sentence[:start] + word + sentence[match.end(1) :], start + len(word)
