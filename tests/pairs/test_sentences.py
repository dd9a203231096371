"""Sentences, the yes/no swap, splits of real tokens, and the built-in similarity."""

import numpy as np
import pytest
from helpers import checkpoints

from mmalign_jax.hf.import_ import read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.pairs.sentences import split_sentences, swap_yes_no
from mmalign_jax.pairs.similarity import ngram_cosine
from mmalign_jax.pairs.splits import Reference, draw_split


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Yes.", ["Yes."]),
        ("A cat", ["A cat"]),
        ("A cat. A dog", ["A cat.", " A dog"]),
        ("It is 3.5 m. Really?! Yes!", ["It is 3.5 m.", " Really?!", " Yes!"]),
        ("  A cat.\n\nA dog. \n", ["  A cat.", "\n\nA dog. \n"]),
        ('He said "Stop." Then he (quietly.) left.', ['He said "Stop."', " Then he (quietly.)", " left."]),
        ("Wait... what", ["Wait...", " what"]),
        ("", []),
        ("  ", []),
    ],
)
def test_sentences_cover_the_text(text, sentences):
    spans = split_sentences(text)
    assert [text[slice(*span)] for span in spans] == sentences


@pytest.mark.parametrize(
    "sentence, swapped",
    [("Yes.", "No."), (" no, it is", " yes, it is"), ("\nNo", "\nYes"), ("yes it is", "no it is"), ("No 3.5", "Yes 3.5")],
)
def test_swap(sentence, swapped):
    text, end = swap_yes_no(sentence)
    assert text == swapped and text[:end].strip() in ("Yes", "yes", "No", "no")


@pytest.mark.parametrize(
    "sentence", ["None of them.", "Nothing.", "North.", "Not so.", "Yesterday.", "YES", "It is. No", "No-one.", "Now", "No's"]
)
def test_words_that_only_begin_alike_are_not_swapped(sentence):
    assert swap_yes_no(sentence) is None


def test_similarity():
    words = [f"w{i}" for i in range(60)]
    a = " ".join(words)
    assert ngram_cosine(a, a.upper() + "!") == 1.0 and ngram_cosine(a, "other text") == 0.0
    assert ngram_cosine("", "") == 1.0 and ngram_cosine("", "a") == 0.0
    assert ngram_cosine("a b", "b a") < 1

    def change(count, at):
        return ngram_cosine(" ".join(words[:count]), " ".join([*words[:at], "other", *words[at + 1 : count]]))

    # what the docstring promises for an acceptance threshold of 0.97
    assert change(33, 32) < 0.97 <= change(34, 33)
    assert change(50, 7) < 0.97 <= change(51, 7)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    directory = checkpoints.tiny_llava(tmp_path_factory.mktemp("tiny"))
    return load_processor(directory, read_config(directory))


def splits_of(text, number, processor, swap=0.0):
    reference = Reference.read(text, processor)
    return [draw_split(reference, number, swap, np.random.default_rng(seed), processor) for seed in range(60)]


def test_every_start_of_a_word_is_a_split_and_nothing_else(processor):
    text = "  A dog. There is 3.5 café-au-lait  é chair!\n"
    found = {split.kept for split in splits_of(text, 1, processor)}
    assert found == {" ", " There", " There is", " There is 3.5", " There is 3.5 café-au-lait", " There is 3.5 café-au-lait  é"}
    assert {split.kept for split in splits_of(text, 0, processor)} == {"  ", "  A"}
    for split in splits_of(text, 1, processor):
        # the tokens are those of the text in front of the split, with no space behind
        assert processor.decode(split.tokens) == (text[: text.index(" There")] + split.kept).strip()
        assert split.context == text and not split.swapped


def test_tokens_as_the_unit(processor):
    text = "There is a red cat. Four café!"
    reference = Reference.read(text, processor)
    splits = [draw_split(reference, 1, 0.0, np.random.default_rng(seed), processor, "token") for seed in range(200)]
    words = {split.kept for split in splits_of(text, 1, processor)}
    assert words < {split.kept for split in splits}
    for split in splits:
        assert (" Four café!").startswith(split.kept) and processor.decode(split.tokens) == (text[:19] + split.kept).strip()


def test_draws_are_uniform(processor):
    text = "A cat is on a table."
    reference = Reference.read(text, processor)
    kept = [draw_split(reference, 0, 0.0, np.random.default_rng(seed), processor).kept for seed in range(3000)]
    counts = np.unique_counts(kept).counts
    assert len(counts) == 6 and np.all(np.abs(counts - 500) < 100)


def test_a_split_lies_behind_the_swapped_word(processor):
    splits = splits_of("A dog. Yes, there are two. A cup.", 1, processor, swap=1.0)
    assert {split.kept for split in splits} == {" No", " No,", " No, there", " No, there are"}
    assert {split.context for split in splits} == {"A dog. No, there are two."} and all(split.swapped for split in splits)
    (only,) = {split.kept for split in splits_of("Yes.", 0, processor, swap=1.0)}
    assert only == "No"
    bare = splits_of("No", 0, processor, swap=1.0)[0]
    assert bare.tokens is None and bare.kept == "Yes" and bare.join("") == "Yes"
    (clean,) = {split.kept for split in splits_of("Nothing.", 0, processor, swap=1.0)}
    assert clean == "" and {split.swapped for split in splits_of("Yes.", 0, processor, swap=0.5)} == {True, False}


def test_joins(processor):
    first, second = (splits_of("A dog. A cup.", number, processor)[0:60] for number in (0, 1))
    start = next(split for split in second if split.kept == " ")
    assert start.join(" A cat.") == " A cat." and start.join("A cat.") == " A cat." and start.join(" ") == ""
    inside = next(split for split in second if split.kept == " A")
    assert inside.join(" cat.") == " A cat." and inside.join("") == " A" and inside.join("s.") == " As."
    assert next(split for split in first if split.kept == "").join(" No.") == "No."
