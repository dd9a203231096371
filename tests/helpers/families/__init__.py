"""Tiny random checkpoints of every family, and transformers' own view of them, for the tests that run on all families."""

import importlib
import pathlib
import pkgutil
from collections.abc import Sequence

import pytest
from helpers.families.case import FamilyCase


def all_cases() -> dict[str, FamilyCase]:
    """Every case of the modules of this folder, by name."""
    found: dict[str, FamilyCase] = {}
    for module in pkgutil.iter_modules([str(pathlib.Path(__file__).parent)]):
        if module.name != "case":
            for case in importlib.import_module(f"helpers.families.{module.name}").cases():
                assert case.name not in found, case.name
                found[case.name] = case
    return found


# Families that differ from another one in little: what CI runs of that one stands for them.
LIKE = {"idefics3": "smolvlm", "llava_next_video": "llava_next", "qwen2_vl": "qwen2_5_vl"}


# Pictures of any size with turning positions, and tiles whose tokens see each other; LLaVA itself is in all other tests.
KINDS = ("qwen2_5_vl", "gemma3")


def one_a_family() -> list:
    """Parameters: every case by name, of which CI runs one a family, the others being nightly; a name begins with its family."""
    return _parameters({name.split()[0] for name in all_cases()} - set(LIKE))


def one_a_kind(kinds: Sequence[str] = KINDS) -> list:
    """The same for tests that take long: CI runs one case of each of `kinds`."""
    return _parameters(set(kinds))


def _parameters(families: set[str]) -> list:
    out = []
    for name in all_cases():
        family = name.split()[0]
        out.append(pytest.param(name, marks=() if family in families else pytest.mark.nightly))
        families = families - {family}
    return out
