"""Runs up to training, with the tower's features on disk."""

import dataclasses
import io
import json
import shutil

import jax
from helpers.tiny import MIXED, record

from mmalign_jax.config import from_mapping
from mmalign_jax.data.loader import make_loader
from mmalign_jax.data.plan import plan_rows
from mmalign_jax.mesh import make_mesh
from mmalign_jax.report.console import Console
from mmalign_jax.training.kept_features import KeptFeatures


def settings(directory, **groups):
    data = {"workers": 0} | groups.pop("data", {})
    return from_mapping({"train": {"batch_size": 4}, "features": {"cache": str(directory)}, "data": data} | groups)


def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


class Case:
    """A run up to training: its rows, and its features."""

    def __init__(self, policy, directory, records=MIXED, **groups):
        self.policy, self.records, self.config = policy, records, settings(directory, **groups)
        self.plan = plan_rows(records, policy.processor, self.config.data, answers=2)
        self.said = io.StringIO()

    def kept(self):
        return KeptFeatures.of(self.config, self.policy, Console(self.said))(self.records, self.plan)

    def batch(self, features=None, devices=0):
        """The rows `[B, ...]` of the first step."""
        options = {"batch_size": self.config.train.batch_size, "workers": 0, "devices": devices, "order": self.config.data.order}
        loader = make_loader(self.records, self.policy.processor, self.plan, **options, features=features)
        return jax.tree.map(lambda x: x[0], next(loader))


# two rows of each of four sets of the same two pictures
FOUR = (*MIXED[:2], MIXED[3], record("turned", "What?", "A red cat.", "No, a dog.", images=[2, 1]))
EIGHT = [dataclasses.replace(one, id=f"{one.id} {half}") for one in FOUR for half in range(2)]


def pictures(directory):
    """Digests of the pictures of a store, in the order in which they were added."""
    files = sorted(directory.glob("part-*.json"), key=lambda file: file.stat().st_mtime_ns)
    parts = [json.loads(file.read_text()) for file in files]
    return [bytes.fromhex(digest) for part in parts for digest in part["pictures"]]


def changed(base, directory, name, change):
    shutil.copytree(base, directory)
    file = directory / name
    data = file.read_bytes()
    file.write_bytes(change(data))
    assert file.read_bytes() != data
    return directory
