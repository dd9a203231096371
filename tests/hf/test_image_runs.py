"""Rows of thousands of image tokens are tokenised as one token a run; the ids are those of the whole text."""

import numpy as np
import pytest
import transformers
from helpers.checkpoints import tiny_llava
from tokenizers import AddedToken

from mmalign_jax.hf.import_ import read_config
from mmalign_jax.hf.pictures import Expansion
from mmalign_jax.hf.processor import Processor, load_processor
from mmalign_jax.types import Part, Turn


def with_tokens(directory, *added):
    tiny_llava(directory, text={"vocab_size": 440})
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.save_pretrained(directory)
    return load_processor(directory, read_config(directory)), tokenizer


def plain(content: str, **options) -> AddedToken:
    return AddedToken(content, special=True, **{"normalized": False} | options)


@pytest.mark.parametrize(
    "added",
    [
        (),
        (plain("<image><image>"),),
        (plain("<image><image><image><image>"), plain("<image>\n")),
        (plain("><"), plain(">x")),
        (plain("x<"), plain("\n<image>")),
        (plain("<row>", lstrip=True, rstrip=True),),
        (plain("<image>b"), AddedToken("age>", normalized=True)),
    ],
    ids=str,
)
def test_ids_are_those_of_the_whole_text(tmp_path, added):
    ours, theirs = with_tokens(tmp_path, *added)
    random = np.random.default_rng(0)
    pieces = ["<image>", "<image>", "<image>", " ", "\n", "x", "b", "<row>", "a red cat. ", "<pad>", "é"]
    for length in (1, 2, 3, 5, 8, 40, 40, 40):
        for _ in range(8):
            text = "".join(str(piece) * int(random.integers(1, 4)) for piece in random.choice(pieces, length))
            np.testing.assert_array_equal(ours._encode_runs(text), theirs(text, add_special_tokens=False)["input_ids"], err_msg=repr(text))


def test_image_tokens_whose_neighbours_matter_are_left_alone(tmp_path):
    for token in (plain("<image>", single_word=True), plain("<image>", normalized=True), plain("<image>", lstrip=True, rstrip=True)):
        ours, theirs = with_tokens(tmp_path, token)
        for text in ("a<image><image> b", "<image> <image>", "a <image><image><image>b", "<image>"):
            np.testing.assert_array_equal(ours._encode_runs(text), theirs(text, add_special_tokens=False)["input_ids"], err_msg=repr(text))


def test_the_tokenizer_sees_one_token_of_2880(tmp_path, monkeypatch):
    ours, theirs = with_tokens(tmp_path)
    turns = (Turn("user", (Part(media=0), Part(text="What is in the picture?"))),)
    picture = Expansion("<image>" * 2880, np.arange(2880, dtype=np.int32), 5, (28, 28))
    ids = ours.prompt_ids(turns, [picture])
    assert ids.tolist() == theirs(ours.render(turns).replace("<image>", picture.text))["input_ids"]
    assert (ids == 3).sum() == 2880

    # the tokenizer saw one of them
    seen = []
    whole = Processor._encode
    monkeypatch.setattr(Processor, "_encode", lambda self, text: seen.append(text) or whole(self, text))
    assert np.array_equal(ours.prompt_ids(turns, [picture]), ids)
    assert [text.count("<image>") for text in seen] == [1]
