"""Answers scored by their similarity with the pictures of their record."""

import dataclasses
import io

import numpy as np
import PIL.Image
import pytest
from helpers.image_text import tiny_clip
from helpers.tiny import noise_png, record

from mmalign_jax.config import DataConfig
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.pairs.clip_score import ClipScorer
from mmalign_jax.types import Media, Part, Turn


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return ClipScorer.read(tiny_clip(tmp_path_factory.mktemp("clip") / "model"))


def cosine(scorer, seed, text):
    return float(scorer.encoder.similarity([PIL.Image.open(io.BytesIO(noise_png(seed)))], [text])[0])


def test_an_answer_is_the_mean_of_its_sentences(scorer):
    first, second, none = record("a", "What?", images=[1]), record("b", "What?", images=[2]), record("c", "What?", images=[1])
    long = "There is a red cat. A dog sits! On the left"
    found = scorer.scores([first, none, second], [[long, "A dog sits!"], [], [long]])
    parts = ["There is a red cat.", "A dog sits!", "On the left"]
    one, two = ([cosine(scorer, seed, part) for part in parts] for seed in (1, 2))
    assert [len(each) for each in found] == [2, 0, 1]
    np.testing.assert_allclose([*found[0], *found[2]], [np.mean(one), one[1], np.mean(two)], atol=2e-6)
    assert abs(found[0][0] - found[2][0]) > 1e-3
    assert scorer.scores([first], [[""]])[0][0] == pytest.approx(cosine(scorer, 1, ""), abs=2e-6)
    assert scorer.scores([], []) == []


def test_a_sentence_that_does_not_fit_counts_as_the_mean_of_its_pieces(scorer):
    words = "a dog sits next to the blue chair and " * 9
    pieces = scorer.encoder.pieces(words)
    assert len(pieces) > 1
    mean = np.mean([cosine(scorer, 1, piece) for piece in pieces])
    expected = np.mean([cosine(scorer, 1, "There is a cat."), mean])
    assert scorer.scores([record("a", "What?", images=[1])], [["There is a cat. " + words]])[0][0] == pytest.approx(expected, abs=2e-6)


def test_several_pictures_count_as_their_mean_and_come_in_once(scorer, monkeypatch):
    text, seen = "There is a cat.", []
    wanted = np.mean([cosine(scorer, seed, text) for seed in (1, 2)])
    video = Media("video", frames=(noise_png(1), noise_png(2)), times=(0.0, 1.0))
    shows = Turn("user", (Part(media=0), Part(text="What?")))
    clips = dataclasses.replace(record("v", "What?"), media=(video, Media("image", noise_png(9))), turns=(shows,))
    encode = type(scorer.encoder).pictures
    monkeypatch.setattr(type(scorer.encoder), "pictures", lambda self, shown: encode(self, (seen.append(one) or one for one in shown)))
    found = scorer.scores([record("a", "What?", images=[1, 2]), clips, record("b", "What?", images=[2])], [[text]] * 3)
    np.testing.assert_allclose(np.ravel(found)[:2], wanted, atol=2e-6)  # what the prompt does not show does not count
    assert len(seen) == 2


def test_a_record_without_a_picture_is_named(scorer):
    plain = record("no. 7", "What?")
    with pytest.raises(UserError, match="record no. 7: its prompt shows no picture"):
        scorer.scores([record("a", "What?", images=[1]), plain], [["cat"], ["dog"]])
    assert scorer.scores([plain], [[]]) == [[]]


def test_pictures_are_bounded_before_they_are_decoded(scorer):
    small = ClipScorer(scorer.encoder, limits=DataConfig(max_image_pixels=700))
    with pytest.raises(DataError, match="records, row big: the image is 28 x 28, over the limit of 700 pixels"):
        small.scores([record("big", "What?", images=[1])], [["cat"]])
