"""docs/objectives.md tells what there is: its generated parts are what the files say."""

import dataclasses
import re
from pathlib import Path

import pytest

from mmalign_jax import losses
from mmalign_jax.config import PairsConfig, SamplesConfig, from_mapping
from mmalign_jax.pairs import scorers, sources, views

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")


def generated(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", PAGE, re.DOTALL)
    assert found, f"docs/objectives.md has no part between <!-- {marker} --> and <!-- /{marker} -->"
    return found[1].strip()


def test_every_objective_is_listed_as_its_file_says():
    rows = [f"| `{name}` | {losses.summary(name)} |" for name in losses.names()]
    assert generated("objectives") == "\n".join(["| name | |", "|---|---|", *rows])


def test_the_example_is_the_file():
    source = (ROOT / "configs/objectives/alpha_po.py").read_text(encoding="utf-8").strip()
    assert generated("alpha_po") == f"```python\n{source}\n```"


def test_every_objective_file_is_short():
    for path in (ROOT / "configs/objectives").glob("*.py"):
        assert len(path.read_text().splitlines()) < 20, path.name


@pytest.mark.parametrize("name", views.names())
def test_every_view_is_named(name):
    assert name == "identity" or f"`{name}" in PAGE


def test_the_page_on_bdhs_has_every_setting_with_its_default():
    page = (ROOT / "docs/bdhs.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in page.splitlines() if row.startswith("| `")]
    fields = {field.name: field.default for field in dataclasses.fields(PairsConfig)}
    assert sorted(name for row in rows for name in row) == sorted(fields.keys() - {"maker", "when", "seed"})
    for name in ("rho_th", "eps", "n_iter", "max_sentence_tokens", "max_answer_tokens", "batch_size", "yes_no_swap"):
        (row,) = (row for row in page.splitlines() if row.startswith("| `") and f"`{name}`" in row.split("|")[1])
        assert f"{fields[name]:g}" in row.split("|")[2], name


def test_the_page_on_own_answers_has_every_setting_and_scorer():
    page = (ROOT / "docs/own_answers.md").read_text(encoding="utf-8")
    settings = page[page.index("## What can be chosen") : page.index("## Sources")]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in settings.splitlines() if row.startswith("| `")]
    fields = {field.name: field.default for field in dataclasses.fields(SamplesConfig)}
    assert sorted(name for row in rows for name in row) == sorted(fields)
    for name in ("count", "max_tokens", "batch_size", "gap", "offline_share"):
        (row,) = (row for row in settings.splitlines() if row.startswith("| `") and f"`{name}`" in row.split("|")[1])
        assert f"{fields[name]:g}" in row.split("|")[2], name
    for marker, parts in (("scorers", scorers), ("sources", sources)):
        listed = re.search(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", page, re.DOTALL)[1]
        assert listed == "\n".join(["| name | |", "|---|---|", *(f"| `{name}` | {parts.summary(name)} |" for name in parts.names())])


def test_settings_that_the_page_names_exist():
    named = set(re.findall(r"`((?:reference|monitor|stop|eval|train|data|optimizer)\.\w+)`", PAGE))
    assert named
    for setting in named:
        group, field = setting.split(".")
        assert hasattr(getattr(from_mapping({}), group), field), setting
