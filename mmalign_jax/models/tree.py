"""Parameter trees are nested dicts. They are taken apart leaf by leaf and put together again."""

from collections.abc import Callable, Mapping
from typing import Any

LeafPath = tuple[str, ...]


def split(tree: Mapping[str, Any], chosen: Callable[[LeafPath], bool]) -> tuple[dict, dict]:
    """(leaves whose path is chosen, the other leaves), both in the tree's form, without branches that have no leaf."""
    return _split(tree, chosen, ())


def _split(tree: Mapping[str, Any], chosen: Callable[[LeafPath], bool], above: LeafPath) -> tuple[dict, dict]:
    yes, no = {}, {}
    for key, value in tree.items():
        path = (*above, key)
        if isinstance(value, Mapping):
            for side, branch in zip((yes, no), _split(value, chosen, path), strict=True):
                if branch:
                    side[key] = branch
        else:
            (yes if chosen(path) else no)[key] = value
    return yes, no


def union(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict:
    """One tree of the leaves of two.

    Raises:
      ValueError: both have a leaf in the same place.
    """
    out = dict(first)
    for key, value in second.items():
        if key not in out:
            out[key] = value
        elif isinstance(value, Mapping) and isinstance(out[key], Mapping):
            out[key] = union(out[key], value)
        else:
            raise ValueError(f"both trees have a leaf {key!r} in the same place")
    return out
