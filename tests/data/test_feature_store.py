"""Features that are kept picture by picture: what is read is what was written, or an error that names the file."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rows import LetterPictures, LetterProcessor, encoded, record

from mmalign_jax.config import DataConfig
from mmalign_jax.data import feature_store
from mmalign_jax.data.feature_store import FeatureStore, FeatureWriter
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


def write(directory, *numbers, key=KEY, dtype="float32"):
    with FeatureWriter(directory, key, dtype, 4) as writer:
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


def test_more_pictures_are_another_part(tmp_path):
    before = write(tmp_path, 0, 1) / "000000.bin"
    content = before.read_bytes()
    write(tmp_path, 1, 2)
    assert names(tmp_path) == ["000000.bin", "000000.json", "000001.bin", "000001.json", "key.json"]
    assert before.read_bytes() == content and (tmp_path / "000001.bin").stat().st_size == features(2).nbytes
    write(tmp_path, 0)
    assert len(names(tmp_path)) == 5 and len(FeatureStore.open(tmp_path)) == 3


def test_parts_are_kept_as_they_fill_and_the_last_one_when_something_stops_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "PART_BYTES", features(1).nbytes)
    with pytest.raises(KeyboardInterrupt), FeatureWriter(tmp_path, KEY, "float32", 4) as writer:
        writer.add(NAMES[0], features(0))
        writer.add(NAMES[1], features(1))
        assert len(FeatureStore.open(tmp_path)) == 2
        writer.add(NAMES[0], features(0))  # is there already
        writer.add(NAMES[3], features(0))
        writer._opened.write(b"half of a picture")
        raise KeyboardInterrupt
    store = FeatureStore.open(tmp_path)
    assert len(store) == 3
    np.testing.assert_array_equal(store.read(NAMES[3]), features(0))


def test_what_a_killed_process_leaves_behind_is_no_part(tmp_path):
    killed = FeatureWriter(tmp_path, KEY, "float32", 4)
    killed.add(NAMES[0], features(0))
    killed._opened.flush()
    assert names(tmp_path) == [".part.tmp", "key.json"]
    killed._opened.close()
    # a part whose list was not written is written again
    (tmp_path / "000000.bin").write_bytes(b"numbers alone")
    store = FeatureStore.open(write(tmp_path, 1))
    assert len(store) == 1 and names(tmp_path) == ["000000.bin", "000000.json", "key.json"]
    np.testing.assert_array_equal(store.read(NAMES[1]), features(1))


def test_a_full_disk_is_told_and_what_was_kept_stays(tmp_path, monkeypatch):
    write(tmp_path, 0)
    writer = FeatureWriter(tmp_path, KEY, "float32", 4)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="config.features.cache: no space is left"), writer:
        writer.add(NAMES[1], features(1))
        monkeypatch.setattr(feature_store.os, "fsync", full)
    monkeypatch.undo()
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


def place(directory, *values):
    file = directory / "000000.json"
    return lambda: set_json(file, pictures={NAMES[0].hex(): list(values)})


DAMAGES = {
    "truncated": ("000000.bin", lambda d: (d / "000000.bin").write_bytes((d / "000000.bin").read_bytes()[:-1]), "truncated: 47 bytes, 48 were"),
    "grown": ("000000.bin", lambda d: (d / "000000.bin").write_bytes(bytes(49)), "has grown: 49 bytes, 48 were"),
    "missing": ("000000.bin", lambda d: (d / "000000.bin").unlink(), "missing"),
    "no JSON": ("000000.json", lambda d: (d / "000000.json").write_text("{"), "damaged, not readable as JSON"),
    "fields": ("000000.json", lambda d: set_json(d / "000000.json", more=1), "damaged"),
    "digest": ("000000.json", lambda d: set_json(d / "000000.json", pictures={"zz" * 16: [0, 3, 1]}), "damaged"),
    "beyond the end": ("000000.bin", lambda d: place(d, 0, 1 << 40, 1)(), "truncated"),
    "behind a gap": ("000000.json", lambda d: place(d, 1, 2, 1)(), "damaged"),
    "negative": ("000000.json", lambda d: place(d, 0, -3, 1)(), "damaged"),
    "another key": ("000000.json", lambda d: set_json(d / "key.json", key={"weights": "b"}), "does not belong to key.json"),
    "key": ("key.json", lambda d: set_json(d / "key.json", dtype="float64"), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_before_anything_is_read(tmp_path, damage):
    name, do, words = DAMAGES[damage]
    do(write(tmp_path, 0, 1))
    with pytest.raises(DataError, match=words) as caught:
        FeatureStore.open(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "Delete" in str(caught.value)


def test_damage_that_leaves_the_size_shows_where_it_is_read(tmp_path):
    file = write(tmp_path, 0, 1) / "000000.bin"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    store = FeatureStore.open(tmp_path)
    np.testing.assert_array_equal(store.read(NAMES[0]), features(0))
    for change, words in ((lambda: None, "corrupt"), (lambda: file.write_bytes(data[:20]), "truncated"), (file.unlink, "missing")):
        change()
        with pytest.raises(DataError, match=words) as caught:
            store.read(NAMES[1])
        assert f"{file}: " in str(caught.value) and f"Delete {tmp_path / '000000.json'} and 000000.bin" in str(caught.value)


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
