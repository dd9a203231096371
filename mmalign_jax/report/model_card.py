"""The model card of an export: README.md with the front matter that model hubs read."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import yaml

from mmalign_jax.config import Config
from mmalign_jax.report.records import ScoreRow, score_cells

FILE = "README.md"
PACKAGE = "mmalign_jax"
_PAPERS = {"bdhs": "2407.02477"}
_LICENCE = ("license", "license_name", "license_link")
_BDHS = (
    "rho_th", "noise_steps", "guided", "n_iter", "eps", "temperature", "top_p", "max_sentence_tokens", "yes_no_swap", "per_sentence", "gamma",
    "max_answer_tokens", "mask_scope", "split_unit", "stop", "similarity", "seed",
)  # fmt: skip
_MOST_FRONT_MATTER = 1 << 16  # characters

_LOADING = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH_OF_THIS_DIRECTORY")
processor = AutoProcessor.from_pretrained("PATH_OF_THIS_DIRECTORY")
```"""

_SCORING = """

`transformers` reads the model without its score head, which is in `score_head.safetensors` (`score.weight`, `score.bias`): a linear map from the
last hidden state of an answer's end token to its score. With the package:

```python
from mmalign_jax.mesh import make_mesh
from mmalign_jax.pairs.reward_model import RewardModel

scores = RewardModel.read("PATH_OF_THIS_DIRECTORY", make_mesh()).scores(records, answers)
```"""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card says beyond the settings. What is not known is not said.

    Attributes:
      base: name of the model that training started from, a hub's name where it has one; "" for random weights.
      licence: `license`, `license_name` and `license_link` as the base model's own card states them.
      dataset: the data set's name.
      on_hub: whether `dataset` is a hub's name.
      records: records in the data set, None when not known.
      skipped: rows left out of it on import, by reason.
      pairs: what became of the records that pairs were made from, such as `{"pairs": 290, "unchanged": 10}`.
      hyperparameters: all of the objective.
      preferences: whether the objective compares answers.
      scores_answers: whether it is a reward model, whose log-probs did not train.
      paper: arXiv number of the objective's paper.
      step: after which the exported weights were taken.
      trained: which parts were trained, and which were not, in words.
      scores: of the weights after `Config.train.steps` steps, beside those of the base; empty when nothing was measured.
      held_out: what the exported weights do on pairs that training did not see.
      environment: names and versions, see `environment.environment`.
    """

    base: str
    step: int
    trained: str
    hyperparameters: Mapping[str, Any]
    preferences: bool = True
    scores_answers: bool = False
    paper: str = ""
    licence: Mapping[str, str | list[str]] = dataclasses.field(default_factory=dict)
    dataset: str = ""
    on_hub: bool = False
    records: int | None = None
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pairs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    scores: Sequence[ScoreRow] = ()
    held_out: Sequence[ScoreRow] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def model_card(config: Config, facts: Facts) -> str:
    """The card as Markdown behind YAML front matter."""
    name = config.objective.name
    start = f"`{facts.base}`" if facts.base else "random weights"
    verb = f"aligned with preferences ({_objective(config, facts)})" if facts.preferences else "fine-tuned on answers"
    if facts.scores_answers:
        verb = f"trained to score answers ({_objective(config, facts)})"
    sections = [
        f"# {name} on {facts.base or 'random weights'}",
        f"{start[:1].upper()}{start[1:]}, {verb} with {PACKAGE}. This card was written by the export and states what the run recorded.",
        "## Training\n\n" + _table(("", ""), _training(config, facts)),
        "## Scores\n\n" + _scores(config, facts),
        "## Loading\n\n" + _LOADING + (_SCORING if facts.scores_answers else ""),
        "## Versions\n\nOf the process that wrote this directory.\n\n" + _table(("", ""), list(facts.environment.items())),
    ]
    front = yaml.safe_dump(_front_matter(config, facts), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(card: str) -> dict[str, object]:
    """The front matter of a model card, empty when it has none that can be read."""
    head, mark, rest = card.partition("---\n")
    text, end, _ = rest[:_MOST_FRONT_MATTER].partition("\n---")
    if head.strip() or not mark or not end:
        return {}
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def licence_of(card: str) -> dict[str, str | list[str]]:
    """What a card's front matter states of the model's licence."""
    found = {name: value for name, value in front_matter(card).items() if name in _LICENCE}
    plain = lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))  # noqa: E731
    return {name: value for name, value in found.items() if plain(value)}


def base_of(card: str) -> str:
    """The model that a card's front matter names as its base, "" where it names none."""
    found = front_matter(card).get("base_model")
    return found if isinstance(found, str) else ""


def _front_matter(config: Config, facts: Facts) -> dict[str, object]:
    out: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if facts.base:
        out |= {"base_model": facts.base, "base_model_relation": "finetune"}
    if facts.dataset and facts.on_hub:
        out["datasets"] = [facts.dataset]
    tags = [PACKAGE, config.objective.name]
    if facts.preferences:
        tags.append("preference-alignment")
    if config.pairs.maker != "none":
        tags.append(config.pairs.maker)
    return out | dict(facts.licence) | {"tags": tags}


def _training(config: Config, facts: Facts) -> list[tuple[str, str]]:
    train, optimizer = config.train, config.optimizer
    of_all = "" if facts.step == train.steps else f" of the run's {train.steps}"
    rate = f"{optimizer.learning_rate:g}, {optimizer.schedule}"
    if optimizer.warmup_fraction:
        rate += f" behind a warm-up over {optimizer.warmup_fraction:.0%} of the steps"
    if optimizer.schedule != "constant":
        rate += f", to {optimizer.final_fraction:g} of the peak"
    clip = f"gradients clipped to a norm of {optimizer.clip_norm:g}" if optimizer.clip_norm else "gradients not clipped"
    rows = [
        ("objective", _objective(config, facts)),
        *((f"objective.{name}", f"{value:g}" if isinstance(value, float) else str(value)) for name, value in facts.hyperparameters.items()),
        ("steps", f"{facts.step}{of_all}, of {train.batch_size} rows each"),
        ("learning rate", rate),
        ("optimizer", f"AdamW, b1 {optimizer.b1:g}, b2 {optimizer.b2:g}, weight decay {optimizer.weight_decay:g}; {clip}"),
        ("trained parts", facts.trained),
        ("seed", str(train.seed)),
        ("data", _data(config, facts)),
    ]
    return rows + ([("rejected answers", _pairs(config, facts))] if config.pairs.maker != "none" else [])


def _data(config: Config, facts: Facts) -> str:
    text = f"{facts.dataset or 'not named'} (format {config.data.format})"
    if facts.records is not None:
        text += f", {facts.records} records"
    if facts.skipped:
        text += "; rows left out on import: " + ", ".join(f"{count} {reason}" for reason, count in facts.skipped.items())
    return text


def _pairs(config: Config, facts: Facts) -> str:
    by = "the base model, before training" if config.pairs.when == "offline" else "the policy itself, between steps"
    settings = ", ".join(f"{name} {getattr(config.pairs, name)}" for name in _BDHS)
    text = f"{_linked(config.pairs.maker)} by {by}: {settings}"
    return text + ("; " + ", ".join(f"{count} {name}" for name, count in facts.pairs.items()) if facts.pairs else "")


def _scores(config: Config, facts: Facts) -> str:
    if not facts.scores:
        return _held_out(config, facts) or "The run measured nothing."
    steps = config.train.steps
    said = [f"Before: the model that training started from. After: the weights of step {steps}."]
    if facts.step != steps:
        said.append(f"**The weights in this directory are those of step {facts.step}, which the run did not measure.**")
    said += [
        f"Greedy answers of at most {config.eval.max_new_tokens} tokens, to {config.scenes.test} pictures of each split of the package's "
        "built-in world: drawn scenes, whose scores say nothing about photographs.",
        "In brackets: 95 % intervals over pictures. They do not hold the spread over seeds: this is one run. pp: percentage points.",
    ]
    out = [" ".join(said)]
    for group, rows in groupby(facts.scores, key=lambda row: row.group):
        out += [f"### {group}"] if group else []
        out.append(_table(("metric", "before", "after", "change"), [score_cells(row) for row in rows]))
    return "\n\n".join([*out, *([_held_out(config, facts)] if facts.held_out else [])])


def _held_out(config: Config, facts: Facts) -> str:
    if not facts.held_out:
        return ""
    said = (
        f"Pairs that training did not see: a share of {config.data.holdout:g} of the records, by their pictures. In brackets: 95 % intervals "
        "over records, which do not hold the spread over seeds."
    )
    return f"### Held-out pairs\n\n{said}\n\n" + _table(("metric", "value"), [(row.name, score_cells(row)[2]) for row in facts.held_out])


def _objective(config: Config, facts: Facts) -> str:
    name = config.objective.name
    return f"[{name}](https://arxiv.org/abs/{facts.paper})" if facts.paper else name


def _linked(method: str) -> str:
    return f"[{method}](https://arxiv.org/abs/{_PAPERS[method]})" if method in _PAPERS else method


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cell = lambda text: " ".join(text.split()).replace("|", "\\|")  # noqa: E731
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
