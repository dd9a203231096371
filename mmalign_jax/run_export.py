"""A run's model as a Hugging Face directory with its card: at the end of the run, or any of its checkpoints later."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mmalign_jax import losses, run_files
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.evaluation import held_out
from mmalign_jax.evaluation.benchmark import rows
from mmalign_jax.files import read_json, replace_text
from mmalign_jax.hf.adapters import export_adapter
from mmalign_jax.hf.export import MARKER, export
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.losses import Need
from mmalign_jax.report import model_card
from mmalign_jax.report.environment import environment
from mmalign_jax.training.checkpoint import abstract_policy, find_step, restore_params
from mmalign_jax.training.trainable import Trainable, describe


def export_run(config: Config, workdir: Path, policy: Pretrained, params: Mapping[str, Any], step: int, out: Path) -> Path:
    """Writes what trained of `params` over a copy of the base model, low-rank factors merged, and a model card. All processes call it.

    Args:
      workdir: the run's directory; the card tells what it holds: scores, statistics of pairs, counts of records.
      step: after which `params` were taken.

    Raises:
      UserError: see `hf.export.export`.
    """
    rule = Trainable.of(config, policy.sizes)
    trained, _ = rule.split(params)
    out = export(trained, policy.path, out, dtype=config.export.dtype, lora=policy.sizes.lora)
    if jax.process_index() == 0:
        kept = ", ".join(rule.untouched(policy.sizes))
        parts = describe(rule, policy.sizes) + (f"; as in the base: {kept}" if kept else "")
        replace_text(out / model_card.FILE, model_card.model_card(config, _facts(config, workdir, policy.path, step, parts)))
    return out


def export_step(workdir: Path, step: int | None, out: Path, *, adapter: bool = False) -> Path:
    """Writes the checkpoint of a step (None: the newest) of the run in `workdir` as a Hugging Face directory.

    Args:
      adapter: low-rank factors are written as an adapter of the base model, instead of being merged into its weights.

    Raises:
      UserError: the directory holds no run or no such checkpoint, or `out` holds something else than an export.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir: {workdir} holds no run (no config.json)")
    config = from_mapping(read_json(workdir / "config.json"))
    step = find_step(workdir / "checkpoints", step)
    # the run's mesh is not needed here: a laptop exports what a pod trained
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    policy = Pretrained.read(run_files.base_model(config, workdir), mesh, config.model.compute_dtype).adapted(config)
    like, _ = Trainable.of(config, policy.sizes).split(abstract_policy(policy.sizes, policy.mesh))
    trained = restore_params(workdir / "checkpoints", step, like)
    if adapter:
        return export_adapter(trained, policy.sizes, policy.path, out)
    return export_run(config, workdir, policy, trained, step, out)


def _facts(config: Config, workdir: Path, base: Path, step: int, trained: str) -> model_card.Facts:
    """What the run's directory and the base model's tell. Parts of a run that were not done leave nothing to tell."""
    card = base / model_card.FILE
    dataset, on_hub = ("the built-in world", False) if config.data.format == "scenes" else _name(Path(config.data.path), "datasets")
    data, pairs = (read_json(file) if file.exists() else {} for file in (workdir / run_files.DATA, workdir / run_files.PAIR_COUNTS))
    objective = losses.build(config.objective.name, **config.objective.hyperparameters)
    # the export of a round before is nobody's base
    of_export = model_card.base_of(card.read_text(encoding="utf-8")) if (base / MARKER).is_file() and card.is_file() else ""
    return model_card.Facts(
        base="" if config.model.init else of_export or _name(base, "models")[0],
        step=step,
        trained=trained,
        hyperparameters=objective.hyperparameters,
        preferences=objective.answers > 1 or objective.reads != "prefs" or Need.OTHER_IMAGE in objective.needs,
        scores_answers=not objective.reads_logps,
        paper=next(iter(re.findall(r"arXiv (\d{4}\.\d{4,5})", losses.summary(objective.name))), ""),
        licence=model_card.licence_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {},
        dataset=dataset,
        on_hub=on_hub,
        records=data.get("records"),
        skipped=data.get("skipped", {}),
        pairs={name: count for name, count in pairs.items() if name in ("records", "pairs", "unchanged", "unusable")},
        scores=_scores(workdir),
        held_out=held_out.rows(read_json(file)) if (file := run_files.held_out(workdir, step)).exists() else (),
        environment=environment(),
    )


def _scores(workdir: Path) -> list:
    before, after = (workdir / "eval" / f"{when}.json" for when in ("before", "after"))
    return rows(read_json(before) if before.exists() else None, read_json(after)) if after.exists() else []


def _name(path: Path, kind: str) -> tuple[str, bool]:
    """The name of a model or data set, and whether it is a hub's: a hub's cache tells it, other directories only how they are called."""
    path = path.absolute()
    for part in path.parts:
        if found := re.fullmatch(rf"{kind}--([\w.-]+?)--([\w.-]+)", part):
            return "/".join(found.groups()), True
    return path.name, False
