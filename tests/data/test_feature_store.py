"""Features that are kept picture by picture: what is read is what was written, or an error that names the file."""

import errno
import json
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rows import LetterPictures, LetterProcessor, encoded, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data import feature_store
from mmalign_jax.data.feature_store import FeatureStore, FeatureWriter, strangers
from mmalign_jax.data.features import RowFeatures
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.data.shared_pictures import digest
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.types import Media, Preference, record_key

KEY = {"weights": "a"}
NAMES = [bytes([number]) * 16 for number in range(5)]


def features(number, width=4):
    """One more row than the picture's number."""
    return (np.arange((number + 1) * width).reshape(-1, width) + 100 * number).astype(np.float32)


def write(directory, *numbers, key=KEY, dtype="float32", alone=False):
    with FeatureWriter(directory, key, dtype, 4, alone=alone) as writer:
        for number in numbers:
            writer.add(NAMES[number], features(number).astype(dtype))
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", feature_store.TYPES)
def test_what_was_written_is_read(tmp_path, dtype):
    store = FeatureStore.open(write(tmp_path, 2, 0, dtype=dtype))
    assert len(store) == 2 and NAMES[2] in store and NAMES[1] not in store
    assert (store.key, store.width, store.dtype) == (KEY, 4, jnp.dtype(dtype))
    for number in (0, 2):
        found = store.read(NAMES[number])
        assert found.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(found, features(number).astype(dtype))


def test_a_directory_without_a_key_is_no_store(tmp_path):
    assert FeatureStore.open(tmp_path) is None and FeatureStore.open(tmp_path / "none") is None
    assert len(FeatureStore.open(write(tmp_path / "new"))) == 0  # a set without pictures


def parts(directory, ending=".json"):
    """Files of parts, in the order in which they were written."""
    return sorted(directory.glob(f"part-*{ending}"), key=lambda file: file.stat().st_mtime_ns)


def test_more_pictures_are_another_part(tmp_path):
    (before,) = parts(write(tmp_path, 0, 1), ".bin")
    content = before.read_bytes()
    write(tmp_path, 1, 2)
    lists, numbers = parts(tmp_path), parts(tmp_path, ".bin")
    assert len(names(tmp_path)) == 5 and [file.stem for file in lists] == [file.stem for file in numbers] and numbers[0] == before
    assert before.read_bytes() == content and numbers[1].stat().st_size == features(2).nbytes
    write(tmp_path, 0)
    assert len(names(tmp_path)) == 5 and len(FeatureStore.open(tmp_path)) == 3


def test_two_writers_at_once_harm_nothing(tmp_path):
    """On a file system without locks."""
    with FeatureWriter(tmp_path, KEY, "float32", 4) as one, FeatureWriter(tmp_path, KEY, "float32", 4, alone=True) as other:
        for number in (0, 1, 2, 3):
            one.add(NAMES[number], features(number))
            other.add(NAMES[3 - number], features(3 - number))
    store = FeatureStore.open(tmp_path)
    assert len(store) == 4 and len(parts(tmp_path)) == 2
    for number in range(4):
        np.testing.assert_array_equal(store.read(NAMES[number]), features(number))


def test_parts_are_kept_as_they_fill_and_the_last_one_when_something_stops_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "PART_BYTES", features(1).nbytes)
    with pytest.raises(KeyboardInterrupt), FeatureWriter(tmp_path, KEY, "float32", 4) as writer:
        writer.add(NAMES[0], features(0))
        writer.add(NAMES[1], features(1))
        assert len(FeatureStore.open(tmp_path)) == 2
        writer.add(NAMES[0], features(0))  # is there already
        writer.add(NAMES[3], features(0))
        writer._part.file.write(b"half of a picture")
        raise KeyboardInterrupt
    store = FeatureStore.open(tmp_path)
    assert len(store) == 3
    np.testing.assert_array_equal(store.read(NAMES[3]), features(0))


class Interrupted(dict):
    """A list of pictures during whose making, or behind it, a signal arrives."""

    def __init__(self, name, behind):
        super().__init__()
        self.name, self.behind = name, behind

    def __setitem__(self, name, value):
        if name == self.name and not self.behind:
            raise KeyboardInterrupt
        super().__setitem__(name, value)
        if name == self.name:
            raise KeyboardInterrupt


@pytest.mark.parametrize("behind", [False, True])
def test_a_part_lists_what_it_holds_wherever_it_is_interrupted(tmp_path, behind):
    with pytest.raises(KeyboardInterrupt), FeatureWriter(tmp_path, KEY, "float32", 4) as writer:
        writer.add(NAMES[0], features(0))
        listed, writer._part.pictures = writer._part.pictures, Interrupted(NAMES[1].hex(), behind)
        writer._part.pictures.update(listed)
        writer.add(NAMES[1], features(1))
    store = FeatureStore.open(tmp_path)
    assert len(store) == 1 + behind
    for number in range(1 + behind):
        np.testing.assert_array_equal(store.read(NAMES[number]), features(number))


def test_keeping_may_be_interrupted(tmp_path, monkeypatch):
    def stop(file, value):
        write_json(file, value)
        monkeypatch.undo()
        raise KeyboardInterrupt

    writer, write_json = FeatureWriter(tmp_path, KEY, "float32", 4), feature_store.write_json
    with pytest.raises(KeyboardInterrupt), writer:
        writer.add(NAMES[1], features(1))
        monkeypatch.setattr(feature_store, "write_json", stop)
        writer._keep()
    assert len(FeatureStore.open(tmp_path)) == 1 and len(parts(tmp_path)) == len(parts(tmp_path, ".bin")) == 1


def test_lists_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "PART_PICTURES", 2)
    assert len(parts(write(tmp_path, 0, 1, 2))) == 2
    monkeypatch.setattr(feature_store, "_MAX_JSON", 100)
    with pytest.raises(DataError, match="bytes, more than the 100 that such a file may have"):
        FeatureStore.open(tmp_path)


def test_what_a_killed_process_leaves_behind_is_no_part_and_is_removed_when_it_is_old(tmp_path):
    killed = FeatureWriter(tmp_path, KEY, "float32", 4)
    killed.add(NAMES[0], features(0))
    killed._part.file.flush()
    (numbers,) = parts(tmp_path, ".bin")
    assert names(tmp_path) == ["key.json", numbers.name]
    killed._part.file.close()
    (tmp_path / f".{numbers.stem}.json.tmp").write_text("{")
    write(tmp_path, 1, alone=True)
    assert numbers.exists()  # it may be another machine's, whose locks are not seen here
    old = time.time() - 2 * feature_store.STALE_S
    for file in tmp_path.iterdir():
        os.utime(file, (old, old))
    write(tmp_path, 2)
    assert numbers.exists()
    store = FeatureStore.open(write(tmp_path, alone=True))
    assert len(store) == 2 and len(names(tmp_path)) == 5 and not numbers.exists()
    for number in (1, 2):
        np.testing.assert_array_equal(store.read(NAMES[number]), features(number))


def test_files_of_others_are_not_read_and_are_named(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    (tmp_path / "000000.json").write_text("{}")
    (tmp_path / ".features.lock").touch()
    assert len(FeatureStore.open(write(tmp_path, 0))) == 1
    assert strangers(tmp_path) == ["000000.json", "config.json"]


def test_the_advice_to_delete_a_directory_is_for_stores_alone(tmp_path):
    for plain in ({"key": {}, "dtype": "float32", "width": 4}, {"format": "log-probs 1"}, []):
        (tmp_path / "key.json").write_text(json.dumps(plain))
        with pytest.raises(DataError, match="not the key of vision features") as caught:
            FeatureStore.open(tmp_path)
        assert "Delete" not in str(caught.value) and "Choose another directory" in str(caught.value)
    (tmp_path / "key.json").write_text(json.dumps({"format": feature_store.FORMAT_NAME + " 0"}))
    with pytest.raises(DataError, match="of another version .* Delete"):
        FeatureStore.open(tmp_path)


def test_numbers_are_little_endian(tmp_path):
    (file,) = parts(write(tmp_path, 1), ".bin")
    assert file.read_bytes() == features(1).astype("<f4").tobytes()


def test_a_full_disk_is_told_and_what_was_kept_stays(tmp_path, monkeypatch):
    write(tmp_path, 0)
    writer = FeatureWriter(tmp_path, KEY, "float32", 4)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="config.features.cache: no space is left"), writer:
        writer.add(NAMES[1], features(1))
        monkeypatch.setattr(feature_store.os, "fsync", full)
    monkeypatch.undo()
    assert len(parts(tmp_path, ".bin")) == 1
    assert len(FeatureStore.open(write(tmp_path, 2))) == 2


def test_another_key_type_or_width_is_not_added_to(tmp_path):
    write(tmp_path, 0)
    for key, dtype, width in (({"weights": "b"}, "float32", 4), (KEY, "bfloat16", 4), (KEY, "float32", 8)):
        with pytest.raises(ValueError, match="another key"):
            FeatureWriter(tmp_path, key, dtype, width)
    with pytest.raises(ValueError, match=r"bfloat16\(2, 4\) for a store of float32"), FeatureWriter(tmp_path, KEY, "float32", 4) as writer:
        writer.add(NAMES[1], features(1).astype(jnp.bfloat16))


def set_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lists(directory):
    return parts(directory)[0]


def numbers(directory):
    return parts(directory, ".bin")[0]


def key(directory):
    return directory / "key.json"


def place(*values):
    return lambda file: set_json(file.with_suffix(".json"), pictures={NAMES[0].hex(): list(values)})


DAMAGES = {
    "truncated": (numbers, lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated: 47 bytes, 48 were"),
    "grown": (numbers, lambda file: file.write_bytes(bytes(49)), "has grown: 49 bytes, 48 were"),
    "missing": (numbers, lambda file: file.unlink(), "missing"),
    "no JSON": (lists, lambda file: file.write_text("{"), "damaged, not readable as JSON"),
    "deep": (lists, lambda file: file.write_text("[" * 200_000), "damaged, not readable as JSON"),
    "fields": (lists, lambda file: set_json(file, more=1), "damaged"),
    "digest": (lists, lambda file: set_json(file, pictures={"zz" * 16: [0, 3, 1]}), "damaged"),
    "beyond the end": (numbers, place(0, 1 << 40, 1), "truncated"),
    "behind a gap": (lists, place(1, 2, 1), "damaged"),
    "negative": (lists, place(0, -3, 1), "damaged"),
    "a bool": (lists, place(0, True, 1), "damaged"),
    "another key": (lists, lambda file: set_json(file.parent / "key.json", key={"weights": "b"}), "does not belong to key.json"),
    "key": (key, lambda file: set_json(file, dtype="float64"), "damaged"),
    "width": (key, lambda file: set_json(file, width=True), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_before_anything_is_read(tmp_path, damage):
    find, do, words = DAMAGES[damage]
    file = find(write(tmp_path, 0, 1))
    do(file)
    with pytest.raises(DataError, match=words) as caught:
        FeatureStore.open(tmp_path)
    assert str(file) in str(caught.value) and "Delete" in str(caught.value)


def test_damage_that_leaves_the_size_shows_where_it_is_read(tmp_path):
    file = numbers(write(tmp_path, 0, 1))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    store = FeatureStore.open(tmp_path)
    np.testing.assert_array_equal(store.read(NAMES[0]), features(0))
    for change, words in (
        (lambda: None, "corrupt"),
        (lambda: file.write_bytes(data[:20]), "truncated"),
        (file.unlink, "missing"),
        (file.mkdir, "cannot be read"),
    ):
        change()
        with pytest.raises(DataError, match=words) as caught:
            store.read(NAMES[1])
        assert f"{file}: " in str(caught.value) and f"Delete {file.with_suffix('.json')} and {file.name}" in str(caught.value)


def test_a_picture_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match="the features of a picture that a row shows are not there. Start the run again") as caught:
        FeatureStore.open(write(tmp_path, 0)).read(NAMES[1])
    assert caught.value.file == str(tmp_path)


class NoPictures(LetterPictures):
    """They cannot be made."""

    def pixels(self, frames, times=None):
        raise AssertionError("a picture was decoded")


class Blind(LetterProcessor):
    pictures = NoPictures()


MEDIA = [Media("image", encoded((40 * number, 10, 200))) for number in range(3)]
RECORDS = [
    record("one", media=(MEDIA[0],), prefs=(Preference(0, 1), Preference(1, 0))),
    record("two", media=(MEDIA[1], MEDIA[0]), images=2),
    record("text", images=0),
    record("other", media=(MEDIA[2],)),
]  # fmt: skip


@pytest.mark.parametrize("devices", [0, 2])
def test_rows_hold_features_in_the_place_of_pixels(tmp_path, devices):
    """Of each picture in order, zeros behind them; and no picture is decoded."""
    tile = 2
    of = {digest([medium]): features(tile - 1) + number for number, medium in enumerate(MEDIA)}
    with FeatureWriter(tmp_path, KEY, "float32", 4) as writer:
        for name, values in of.items():
            writer.add(name, values)
    processor, found = Blind(), RowFeatures(FeatureStore(tmp_path), tile)
    plan = plan_rows(RECORDS, processor, DataConfig(), answers=2)
    assert plan.layout.images == 2
    options = {"batch_size": 8, "workers": 2, "devices": devices, "order": "by_image"}
    loader = make_loader(RECORDS, processor, plan, **options, features=found)
    form, batch = loader.begin(), next(loader)
    assert batch.images is None and batch.features.dtype == np.float32 and (batch.picture is not None) == (devices > 0)
    assert (form.features.shape, form.features.dtype) == (batch.features.shape, batch.features.dtype) and form.images is None
    rows = batch.features[0]
    if devices:
        assert len(rows) < 8
        rows = np.concatenate([group[place] for group, place in zip(rows.reshape(devices, -1, 4, 4), batch.picture[0], strict=True)])
    blank = np.zeros((4, 4), np.float32)
    by_key = {record_key(one.id): np.concatenate([*(of[digest([medium])] for medium in one.media), blank])[:4] for one in RECORDS}
    for row, key in zip(rows, batch.record_key[0], strict=True):
        np.testing.assert_array_equal(row, by_key[int(key)])


def test_features_of_another_number_are_no_row(tmp_path):
    with FeatureWriter(tmp_path, KEY, "float32", 4) as writer:
        writer.add(digest([MEDIA[2]]), features(0))
    plan = plan_rows(RECORDS[3:], LetterProcessor(), DataConfig(), answers=2)
    loader = make_loader(RECORDS[3:], LetterProcessor(), plan, batch_size=1, workers=0, features=RowFeatures(FeatureStore(tmp_path), 2))
    with pytest.raises(DataError, match="1 features of a picture of record other, which takes 2"):
        next(loader)
