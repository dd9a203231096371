"""Which tokens of two answers were replaced: the segments that dense objectives weigh more (RLHF-V, arXiv 2312.00849)."""

import difflib

import numpy as np

SHORTEST_MATCH = 3


def replaced(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks of the tokens that stand where the other answer has other ones, bool of each answer's length.

    The two are aligned by token ids. Equal stretches of fewer than 3 tokens between two differences count as part of them; at the ends
    they stay. What one answer has and the other has nothing for (an insertion) is not marked, as in the authors' code.

    Args:
      chosen, rejected: int[n] and int[m] token ids of one tokenizer.
    """
    marks = np.zeros(len(chosen), bool), np.zeros(len(rejected), bool)
    blocks = difflib.SequenceMatcher(None, chosen.tolist(), rejected.tolist(), autojunk=False).get_matching_blocks()
    ends = {(0, 0), (len(chosen), len(rejected))}
    kept = [
        block for block in blocks
        if block.size >= SHORTEST_MATCH or not block.size or {(block.a, block.b), (block.a + block.size, block.b + block.size)} & ends
    ]  # fmt: skip
    i = j = 0
    for block in kept:
        if block.a > i and block.b > j:
            marks[0][i : block.a], marks[1][j : block.b] = True, True
        i, j = block.a + block.size, block.b + block.size
    return marks
