"""Cells of a column of videos -> Media: frames as pictures, and the second at which each is shown. Encoded files are not decoded."""

from mmalign_jax.data.bad_rows import Place
from mmalign_jax.data.sources.source import MediaReader
from mmalign_jax.data.validate import MAX_RECORD_BYTES
from mmalign_jax.types import Media

_MEND = 'Give its frames as pictures with times: {"frames": [...], "times": [...]} in seconds, or {"frames": [...], "fps": 2.0}.'


def read_videos(cells: list, fps: object, media: MediaReader, max_frames: int, place: Place) -> tuple[Media, ...]:
    """The videos of a row.

    Args:
      cells: one a video: `{"frames": [...], "times": [...]}`, `{"frames": [...], "fps": 2.0}`, or a list of frames. A frame is what
        `MediaReader.read` takes.
      fps: the row's own frames a second: a number, a list with one a video, or None. For cells without a timing of their own.

    Raises:
      BadRow: an encoded file, no frames or too many, a frame that cannot be read, or no timing, two timings or a wrong one.
    """
    rates = fps if isinstance(fps, list) else [fps] * len(cells)
    if len(rates) != len(cells):
        raise place.bad("malformed_row", f"fps has {len(rates)} numbers for {len(cells)} videos", "Give one number, or one a video.")
    return tuple(_video(cell, rate, f"video {n}", media, max_frames, place) for n, (cell, rate) in enumerate(zip(cells, rates, strict=True)))


def _video(cell: object, row_fps: object, name: str, media: MediaReader, max_frames: int, place: Place) -> Media:
    frames, fps, times = (cell.get(key) for key in ("frames", "fps", "times")) if isinstance(cell, dict) else (cell, None, None)
    if frames is None or not isinstance(frames, list):
        raise _no_frames(cell, name, place)
    if len(frames) > max_frames:
        problem = f"{name} has {len(frames)} frames, over the limit of {max_frames}"
        raise place.bad("video_too_long", problem, "Give fewer frames or raise config.data.max_frames.")
    given = [timing for timing in (fps, row_fps, times) if timing is not None]
    if len(given) != 1:
        problem = f"{name} has frames but neither fps nor times" if not given else f"the frames of {name} are timed twice"
        raise place.bad("malformed_row", problem, _MEND)
    seconds = _times(times, name, place) if times is not None else _by_rate(given[0], len(frames), name, place)
    pictures, origins, size = [], [], 0
    for number, frame in enumerate(frames):
        data, origin = media.picture(frame, place, f"frame {number} of {name}")
        size += len(data)
        if size > MAX_RECORD_BYTES:
            problem = f"the frames of {name} take more than {MAX_RECORD_BYTES} bytes"
            raise place.bad("video_too_long", problem, "Give fewer or smaller frames.")
        pictures.append(data)
        origins.append(origin)
    try:
        return Media("video", origin=next(iter(origins), ""), frames=tuple(pictures), times=seconds)
    except ValueError as error:
        raise place.bad("malformed_row", f"{name}: {error}", _MEND) from error


def _no_frames(cell: object, name: str, place: Place):
    path = cell.get("path") if isinstance(cell, dict) else cell
    if isinstance(path, str) and path:
        return place.bad("unreadable_video", f"{name} is an encoded file ({path!r}), and no video decoder is shipped", _MEND)
    if isinstance(cell, bytes) or (isinstance(cell, dict) and cell.get("bytes")):
        return place.bad("unreadable_video", f"{name} is an encoded file, and no video decoder is shipped", _MEND)
    return place.bad("malformed_row", f"{name} has no list of frames", _MEND)


def _times(times: object, name: str, place: Place) -> tuple[float, ...]:
    numbers = [_number(value) for value in times] if isinstance(times, list) else [None]
    if None in numbers:
        raise place.bad("malformed_row", f"the times of {name} are not a list of numbers", _MEND)
    return tuple(numbers)


def _by_rate(fps: object, frames: int, name: str, place: Place) -> tuple[float, ...]:
    rate = _number(fps)
    if rate is None or not 0 < rate < float("inf"):
        raise place.bad("malformed_row", f"the fps of {name} is {fps!r}", "Give a number of frames a second above 0.")
    return tuple(number / rate for number in range(frames))


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:  # an integer of hundreds of digits
        return None
