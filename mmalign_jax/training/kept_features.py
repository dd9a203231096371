"""What a frozen vision tower makes of pictures, computed once: one sweep before training, whose steps then have neither pixels nor the tower."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config
from mmalign_jax.data import media as media_lib
from mmalign_jax.data.bad_rows import place_of
from mmalign_jax.data.device import process_slice, to_device
from mmalign_jax.data.feature_store import KEY, START_AGAIN, FeatureStore, FeatureWriter, strangers
from mmalign_jax.data.features import RowFeatures, features_of
from mmalign_jax.data.loader import bucket_pass
from mmalign_jax.data.plan import Records, RowPlan
from mmalign_jax.data.shared_pictures import digest
from mmalign_jax.errors import DataError, UserError
from mmalign_jax.files import claimed
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.report.console import Console
from mmalign_jax.training.cache_key import differences, tower_key
from mmalign_jax.training.cached_reference import from_first
from mmalign_jax.training.trainable import check_features
from mmalign_jax.types import PairBatch

PART = "vision_tower"
Shown = dict[int, list[tuple[bytes, int]]]  # an item -> digest of each of its pictures, and how many features that has
ROWS = 4  # sets of pictures at a time, a device
SEEN_S = 15.0  # for so long a network file system may show one machine an older listing than another
_GIB = 1 << 30
_BLOCK = 256  # records that are looked at in parallel


@dataclasses.dataclass(frozen=True)
class KeptFeatures:
    """Finds or makes the features of the pictures of a plan. All processes call it; they share a file system.

    Args:
      directory: of the features (`data.feature_store`); runs with the same tower and processor may share it, whichever records they have.
      policy: the model, of whose tower nothing trains.
      tower_dtype: type in which the tower's parameters are kept.
      rows: sets of pictures at a time.
      workers: threads that read and decode.
    """

    directory: Path
    policy: Pretrained
    tower_dtype: str
    rows: int
    workers: int
    console: Console

    @classmethod
    def of(cls, config: Config, policy: Pretrained, console: Console) -> "KeptFeatures | None":
        """What a run asks for, None where that is nothing.

        Raises:
          UserError: the adapter that goes on training has factors in the tower.
        """
        c, kept = config, config.model.reference_dtype
        if not c.features.cache:
            return None
        check_features(c, policy.sizes)
        few = min(ROWS * mesh_lib.batch_divisor(policy.mesh), c.train.batch_size // c.train.accumulate)
        rows = mesh_lib.batch_rows(policy.mesh, c.features.batch_size or few)
        kept = policy.model.dtype if kept == "auto" else kept
        return cls(Path(c.features.cache), policy, kept, rows, c.data.workers, console)

    def __call__(self, records: Records, plan: RowPlan) -> RowFeatures:
        """What the loader gives rows in the place of pixels. No parameter stays in memory.

        Raises:
          UserError: the directory holds features of another tower, or computed otherwise (the message names each field), or other files; it cannot
            be written, or there is no room for features that are missing; a feature is not finite.
          DataError: a file of the directory is damaged, or a picture is, or is over the limits.
        """
        with self.console.phase("Checking which vision features are kept") as progress:
            key, shown = self._key, self._shown(records, plan, progress)
            store = self._open(key)
        wanted = {picture: count for pictures in shown.values() for picture, count in pictures}
        # what each process sees of a shared directory may differ: the first decides
        to_add = from_first(np.append(_lacking(store, shown, len(plan.items)), store is None))
        if to_add.any():
            self.console.line(self._room(store, wanted)[0])
            self._add(key, shown, wanted, records, plan)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("mmalign_jax.kept_features")
        else:
            self.console.line(f"Vision features: those of {len(wanted)} pictures in {self.directory} are reused")
        return RowFeatures(self._complete(key, wanted), self.policy.sizes.tower_tile)

    @functools.cached_property
    def _key(self) -> dict:
        """Reading it takes all of the tower's weights, and it is that of every set of a run."""
        return tower_key(self.policy, self.tower_dtype)

    def _shown(self, records: Records, plan: RowPlan, progress: Callable[[int, int], None]) -> Shown:
        """The pictures of the first item of each set of them."""
        _, first = np.unique(plan.pictures, return_index=True)
        numbers = sorted(int(number) for number in first if plan.pictures[number] >= 0)
        limits = {"max_pixels": plan.layout.max_pixels, "max_bytes": plan.layout.max_bytes}
        pictures, tile = self.policy.processor.pictures, self.policy.sizes.tower_tile

        def of(number: int) -> list[tuple[bytes, int]]:
            record = records[int(plan.items[number, 0])]
            media, place = [record.media[part.media] for turn in record.turns for part in turn.parts if part.media is not None], place_of(record)
            if not pictures.needs_size:  # a picture that is kept is never decoded, and is refused like any other
                for medium in media:
                    media_lib.sizes(medium, place, **limits)
            expansions = [media_lib.expand(medium, pictures, place, **limits) for medium in media]
            return [(digest([medium]), features_of(one, tile)) for medium, one in zip(media, expansions, strict=True)]

        found: list[list[tuple[bytes, int]]] = []
        with concurrent.futures.ThreadPoolExecutor(max(self.workers, 1)) as pool:
            for start in range(0, len(numbers), _BLOCK):
                found += pool.map(of, numbers[start : start + _BLOCK])
                progress(len(found), len(numbers))
        return dict(zip(numbers, found, strict=True))

    def _open(self, key: dict) -> FeatureStore | None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"config.features.cache: {self.directory} is not a directory")
        try:
            store = FeatureStore.open(self.directory)
            others = strangers(self.directory) if store is None and self.directory.is_dir() else []
        except PermissionError as error:
            raise UserError(f"config.features.cache: {self.directory} cannot be read ({error}); choose another directory") from error
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise UserError(
                f"config.features.cache: {self.directory} holds other files ({shown}) and no vision features (no {KEY}); give a directory that is "
                "theirs alone"
            )
        if store is not None and (differing := differences(store.key, key)):
            raise UserError(
                f"{self.directory / KEY}: the vision features that are kept there were computed from something else: {'; '.join(differing)}. "
                f"Delete {self.directory}, or choose another config.features.cache"
            )
        return store

    def _complete(self, key: dict, wanted: Mapping[bytes, int]) -> FeatureStore:
        """The store, once it shows all that was added."""
        end = time.monotonic() + (SEEN_S if jax.process_count() > 1 else 0.0)
        while True:
            last, store = time.monotonic() >= end, None
            try:
                store = self._open(key)
            except DataError:  # a list may be seen before the numbers
                if last:
                    raise
            absent = sum(store is None or picture not in store for picture in wanted)
            if store is not None and not absent:
                return store
            if last:
                problem = f"the features of {absent} of {len(wanted)} pictures are not there, though they were computed"
                mend = f"Look whether something removes its files, or the file system shows them late. {START_AGAIN}"
                raise DataError(problem, file=str(self.directory), mend=mend)
            time.sleep(0.5)

    def _room(self, store: FeatureStore | None, wanted: Mapping[bytes, int]) -> tuple[str, bool]:
        """What will be written, in words, and whether there is room for it."""
        missing = [count for picture, count in wanted.items() if store is None or picture not in store]
        size = sum(missing) * self.policy.sizes.tower_width * np.dtype(self.policy.model.dtype).itemsize
        there = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        told = f"those of {len(missing)} pictures take {size / _GIB:.3g} GiB, and {self.directory} has {free / _GIB:.3g} GiB free"
        return f"Vision features: those of {len(wanted) - len(missing)} of {len(wanted)} pictures are reused; {told}", size <= free

    def _add(self, key: dict, shown: Shown, wanted: Mapping[bytes, int], records: Records, plan: RowPlan) -> None:
        """Computes what is missing. The first process decides what that is, and writes."""
        count = len(plan.items)
        if jax.process_index():
            found = from_first(np.zeros(count + 1, bool))
            if found[-1]:
                raise UserError("config.features.cache: the first process cannot keep vision features, and says why")
            self._compute(found[:-1], shown, records, plan, lambda *_: None)
            return
        with contextlib.ExitStack() as stack:
            try:
                writer, missing = self._claim(stack, key, shown, wanted, count)
            except UserError:
                from_first(np.ones(count + 1, bool))
                raise
            from_first(np.append(missing, False))
            self._compute(missing, shown, records, plan, writer.add)

    def _claim(
        self, stack: contextlib.ExitStack, key: dict, shown: Shown, wanted: Mapping[bytes, int], count: int
    ) -> tuple[FeatureWriter, Bool[np.ndarray, " items"]]:
        """The directory for this run alone, where there are locks, and what is missing then: another run may have added it meanwhile."""
        waiting = lambda: self.console.line(f"Another run adds to {self.directory}; waiting for it")  # noqa: E731
        try:
            alone = stack.enter_context(claimed(self.directory / "features", waiting))
            store = self._open(key)
            told, fits = self._room(store, wanted)
            if not fits:
                raise UserError(f"config.features.cache: no room. {told}; choose another directory, or leave it empty")
            how = (key, self.policy.model.dtype, self.policy.sizes.tower_width)
            writer = stack.enter_context(FeatureWriter(self.directory, *how, alone=alone))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise UserError(
                f"config.features.cache: {self.directory} cannot be written ({error}), and vision features are missing there; make it writable, or "
                "choose another directory"
            ) from error
        return writer, _lacking(store, shown, count)

    def _compute(
        self,
        missing: Bool[np.ndarray, " items"],
        shown: Shown,
        records: Records,
        plan: RowPlan,
        add: Callable[[bytes, np.ndarray], None],
    ) -> None:
        """Gives the features of every picture of these items, which are laid out as in training."""
        if not missing.any():
            return
        p, mesh, done = self.policy, self.policy.mesh, 0
        index, count = process_slice(mesh)
        options = {"batch_size": self.rows, "process_index": index, "process_count": count, "workers": self.workers}

        def encode(params: dict, batch: PairBatch, numbers: Int[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, "B G Z"]]:
            found = numbers, p.model.tower(params, batch.images, batch.patches)
            if jax.process_count() == 1:
                return found
            # the first process writes them all
            return jax.tree.map(lambda x: mesh_lib.constrain(x, *(None,) * x.ndim), found)

        run = jax.jit(encode)
        with self.console.phase("Computing vision features") as progress, jax.set_mesh(mesh):
            params = p.params(self.tower_dtype, lambda path: path[0] == PART)
            for bucket in plan.buckets:
                numbers = bucket.members[missing[bucket.members]]
                if not len(numbers):
                    continue
                for batch, own in bucket_pass(records, p.processor, plan, numbers, **options):
                    found = run(params, *to_device((batch, own), mesh, batch_axis=0))
                    for number, features in zip(*jax.device_get(found), strict=True):
                        if number < 0:
                            continue
                        at = 0
                        for picture, held in shown[int(number)]:
                            values = features[at : at + held]
                            if not np.isfinite(values).all():
                                record = records[int(plan.items[number, 0])]
                                raise UserError(f"record {record.id}: the vision tower's features are not finite; look at its picture")
                            add(picture, values)
                            at += held
                        done += 1
                    progress(done, int(missing.sum()))


def _lacking(store: FeatureStore | None, shown: Shown, items: int) -> Bool[np.ndarray, " items"]:
    """The items of whose pictures some are missing: these are computed."""
    missing = np.zeros(items, bool)
    for number, pictures in shown.items():
        missing[number] = any(store is None or picture not in store for picture, _ in pictures)
    return missing
