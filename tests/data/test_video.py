"""Videos: frames with times from a row to a prepared record, and every way in which they can be wrong."""

import dataclasses
import json

import pytest
from helpers.rows import encoded, record, write_parquet

from mmalign_jax.config import DataConfig
from mmalign_jax.data import builder, sources
from mmalign_jax.data.bad_rows import BadRow, Place
from mmalign_jax.data.validate import check_record
from mmalign_jax.types import Media, Part, Turn

FRAMES = [encoded((40 * n, 0, 0), kind="PNG") for n in range(4)]
NAMES = [f"clip/{n}.png" for n in range(4)]


def row(content="What happens?", **media):
    answers = ({"role": "assistant", "content": text} for text in ("A cat jumps.", "A dog sleeps."))
    return {"prompt": [{"role": "user", "content": content}]} | dict(zip(("chosen", "rejected"), ([a] for a in answers), strict=True)) | media


@pytest.fixture
def read(tmp_path):
    (tmp_path / "clip").mkdir()
    for name, data in zip(NAMES, FRAMES, strict=True):
        (tmp_path / name).write_bytes(data)

    def read(*lines, **settings):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return list(sources.read(DataConfig(path=str(tmp_path / "a.jsonl"), format="trl", **settings)).rows())

    return read


def video(times):
    return Media("video", origin="clip/0.png", frames=tuple(FRAMES[: len(times)]), times=tuple(times))


def test_every_way_to_write_a_video(read):
    found = read(
        row(videos=[NAMES], fps=2),
        row(videos=[NAMES[:2], NAMES[:3]], fps=[2, 4.0]),
        row(videos=[{"frames": NAMES[:3], "times": [0, 1.5, 9]}]),
        row(videos=[{"frames": NAMES[:3], "fps": 0.5, "times": None}]),
        row(video={"frames": [{"path": name, "bytes": None} for name in NAMES[:2]], "fps": 1}),
        row(videos=[], fps=2),
    )
    media = [
        [[0, 0.5, 1, 1.5]], [[0, 0.5], [0, 0.25, 0.5]], [[0, 1.5, 9]], [[0, 2, 4]], [[0, 1]], [],
    ]  # fmt: skip
    assert [row.media for row in found] == [tuple(map(video, times)) for times in media]


def test_parts_in_order(read):
    typed = [{"type": "video"}, {"type": "text", "text": "or"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"}]
    media = {"images": [NAMES[3]], "videos": [NAMES[:2], NAMES[:3]], "fps": 1}
    in_order, plain, tagged = read(row(typed, **media), row(**media), row("<video>\nA <image> B\n<video>", **media))
    for found in (in_order, plain, tagged):
        assert [medium.kind for medium in found.media] == ["image", "video", "video"]
        assert [len(medium.frames) for medium in found.media] == [0, 2, 3]
    assert in_order.turns[0].parts == (Part(media=1), Part(text="or"), Part(media=0), Part(media=2), Part(text="?"))
    assert plain.turns[0].parts == (Part(media=0), Part(media=1), Part(media=2), Part(text="What happens?"))
    assert tagged.turns[0].parts == (Part(media=1), Part(text="A "), Part(media=0), Part(text=" B"), Part(media=2))


@pytest.mark.parametrize(
    "wrong,reason,problem",
    [
        (row(videos=["a.mp4"]), "unreadable_video", r"video 0 is an encoded file \('a.mp4'\), and no video decoder is shipped. Give its frames"),
        (row(videos=[NAMES[:2], {"path": "b.mp4", "bytes": None}], fps=1), "unreadable_video", r"video 1 is an encoded file \('b.mp4'\)"),
        (row(videos=[NAMES]), "malformed_row", "video 0 has frames but neither fps nor times"),
        (row(videos=[{"frames": NAMES, "fps": 1, "times": [0, 1, 2, 3]}]), "malformed_row", "timed twice"),
        (row(videos=[{"frames": NAMES, "fps": 1}], fps=2), "malformed_row", "timed twice"),
        (row(videos=[NAMES], fps=[1, 2]), "malformed_row", "fps has 2 numbers for 1 videos"),
        (row(videos=[NAMES], fps=0), "malformed_row", "the fps of video 0 is 0"),
        (row(videos=[NAMES], fps=float("nan")), "malformed_row", "the fps of video 0 is nan"),
        (row(videos=[NAMES], fps=True), "malformed_row", "the fps of video 0 is True"),
        (row(videos=[NAMES], fps=1e-320), "malformed_row", "video 0: the times of a video's frames must be finite"),
        (row(videos=[{"frames": NAMES, "times": [0, 1, 2]}]), "malformed_row", "video 0: a video of 4 frames has 3 times"),
        (row(videos=[{"frames": NAMES, "times": [0, 1, 1, 2]}]), "malformed_row", "must increase strictly"),
        (row(videos=[{"frames": NAMES, "times": [0, 1, 3, 2]}]), "malformed_row", "must increase strictly"),
        (row(videos=[{"frames": NAMES, "times": [0, 1, 3, float("inf")]}]), "malformed_row", "must be finite"),
        (row(videos=[{"frames": NAMES, "times": [0, 1, 2, "3"]}]), "malformed_row", "the times of video 0 are not a list of numbers"),
        (row(videos=[{"frames": NAMES, "times": [0, 1, 2, 10**400]}]), "malformed_row", "the times of video 0 are not a list of numbers"),
        (row(videos=[{"frames": NAMES, "times": 3}]), "malformed_row", "the times of video 0 are not a list of numbers"),
        (row(videos=[{"frames": [], "fps": 1}]), "malformed_row", "at least one"),
        (row(videos=[None], fps=1), "malformed_row", "video 0 has no list of frames"),
        (row(videos=NAMES[0], fps=1), "malformed_row", "videos is not a list"),
        (row(videos=[[*NAMES, NAMES[0]]], fps=1), "video_too_long", "video 0 has 5 frames, over the limit of 4"),
        (row(videos=[["clip/0.png", "clip/9.png"]], fps=1), "missing_image", "frame 1 of video 0: there is no image file 'clip/9.png'"),
        (row(videos=[["../a.png"]], fps=1), "missing_image", "frame 0 of video 0: the image path '../a.png' leaves"),
        (row(videos=[["clip/0.png", None]], fps=1), "missing_image", "there is no frame 1 of video 0"),
        (row("<video> or <video>?", videos=[NAMES], fps=1), "placeholder_mismatch", "2 video placeholders for 1 videos"),
        (row("<image>", videos=[NAMES], fps=1), "placeholder_mismatch", "1 image placeholders for 0 images"),
        (row([{"type": "text", "text": "?"}], videos=[NAMES], fps=1), "placeholder_mismatch", "0 video placeholders for 1 videos"),
        (row([{"type": "video", "video": "a.mp4"}]), "malformed_row", "a part of type video in prompt holds the video itself. Move it to videos"),
    ],
)
def test_rows_that_are_refused(read, wrong, reason, problem):
    good, bad, after = read(row(videos=[NAMES], fps=1), wrong, row(videos=[NAMES], fps=1), max_frames=4)
    assert isinstance(bad, BadRow) and bad.reason == reason
    with pytest.raises(BadRow, match=f"a.jsonl, row 1: .*{problem}"):
        raise bad
    assert good.media == after.media == (video([0, 1, 2, 3]),)


def test_a_large_frame_is_not_read(read):
    (bad,) = read(row(videos=[NAMES], fps=1), max_image_bytes=len(FRAMES[0]) - 1)
    assert bad.reason == "image_too_large" and "frame 0 of video 0: the image file 'clip/0.png' has" in str(bad)


def test_import_and_open(read, tmp_path):
    table = [row(videos=[[{"bytes": data, "path": "x.png"} for data in FRAMES]], fps=[4.0]), row(videos=None, fps=None)]
    (tmp_path / "set").mkdir()
    config = DataConfig(path=write_parquet(tmp_path / "set" / "a.parquet", table))
    opened = builder.open_records(builder.obtain(config, tmp_path / "out").dir)
    assert opened[0].media == (Media("video", origin="x.png", frames=tuple(FRAMES), times=(0.0, 0.25, 0.5, 0.75)),)
    assert opened[0].turns[0].parts == (Part(media=0), Part(text="What happens?"))
    assert opened[1].media == ()
    with pytest.raises(BadRow, match="video 0 has 4 frames, over the limit of 3"):
        builder.obtain(dataclasses.replace(config, max_frames=3), tmp_path / "out")


def test_many_frames_are_written_in_small_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_CHUNK_BYTES", 3 * len(FRAMES[0]))
    made = [made_record(frames=(FRAMES[0],) * (1 + n % 3), name=f"r{n}") for n in range(7)]
    done = builder.prepare(DataConfig(), sources.Source("made here", "1", lambda: iter(made)), tmp_path / "set")
    opened = builder.open_records(done.dir)
    assert [opened[index] for index in range(len(opened))] == made


def made_record(frames=tuple(FRAMES[:2]), name="r", prompt="?", **changes):
    media = (Media("video", frames=frames, times=tuple(map(float, range(len(frames))))),)
    return dataclasses.replace(record(name, images=0), media=media, turns=(Turn("user", (Part(media=0), Part(text=prompt))),), **changes)


@pytest.mark.parametrize(
    "wrong,reason,problem",
    [
        (made_record(frames=(FRAMES[0], FRAMES[1][:45])), "unreadable_image", "frame 1 of medium 0: the image is truncated"),
        (made_record(frames=(FRAMES[0], b"\0\0\0\x18ftypmp42")), "unreadable_image", "frame 1 of medium 0: the bytes are not an image"),
        (made_record(frames=(FRAMES[0], encoded(size=(500, 20)))), "image_too_large", "frame 1 of medium 0: the image is 500 x 20"),
        (made_record(frames=(FRAMES[0], encoded(size=(8, 12)))), "malformed_row", "frame 1 of medium 0 is 8 x 12, the first one 12 x 8"),
        (made_record(frames=tuple(FRAMES[:3])), "video_too_long", "medium 0 has 3 frames, over the limit of 2"),
        (made_record(prompt="a <video>"), "placeholder_mismatch", "a text still holds <video>"),
        (dataclasses.replace(made_record(), turns=(Turn("user", (Part(text="?"),)),)), "placeholder_mismatch", "the row has 1"),
        (record(images=0, chosen="a <video>"), "placeholder_mismatch", "an answer holds <video>"),
    ],
)
def test_records_that_are_refused(wrong, reason, problem):
    with pytest.raises(BadRow, match=problem) as caught:
        check_record(wrong, Place("f", "1"), max_pixels=9000, max_bytes=10**6, max_frames=2)
    assert caught.value.reason == reason
    check_record(made_record(), Place("f", "1"), max_pixels=9000, max_bytes=10**6, max_frames=2)
