"""A run from data to export: every part is written to the run's directory when it is done, and not done again by the same command."""

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mmalign_jax import losses, run_files
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, from_mapping, to_mapping
from mmalign_jax.data import builder
from mmalign_jax.data.device import process_slice
from mmalign_jax.data.images import decode_image
from mmalign_jax.data.loader import Loader, make_loader
from mmalign_jax.data.plan import Records, RowPlan, plan_rows
from mmalign_jax.data.sources.source import Source, stamp
from mmalign_jax.errors import UserError
from mmalign_jax.evaluation import world
from mmalign_jax.evaluation.generate import Answered, Generator
from mmalign_jax.hf.export import export
from mmalign_jax.hf.import_ import load_params, read_config
from mmalign_jax.hf.processor import Processor, load_processor
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.models.mllm import Mllm
from mmalign_jax.models.params import param_shardings
from mmalign_jax.pairs.bdhs import BdhsSampler, reference_of, sample_pairs
from mmalign_jax.pairs.online import OnlineBatches
from mmalign_jax.pairs.sentences import split_sentences
from mmalign_jax.report.console import Console
from mmalign_jax.report.environment import environment
from mmalign_jax.report.html import write_report
from mmalign_jax.report.records import Answer, GalleryItem, ScoreRow, SkippedRow, score_cells
from mmalign_jax.scenes import model as scenes_model
from mmalign_jax.scenes import splits
from mmalign_jax.training.checkpoint import abstract_policy, restore_params
from mmalign_jax.training.loop import Batches, Trained, train
from mmalign_jax.training.step import LossFunction, split_params
from mmalign_jax.types import PairBatch, PreferenceRecord

T = TypeVar("T")


def run(config: Config, workdir: Path) -> int:
    """Prepares data, measures, makes pairs, trains, measures again, exports and reports.

    Returns:
      0, or 128 + the signal's number when a signal stopped it; the same command then goes on.

    Raises:
      UserError: a mistake in config, data or checkpoint.
    """
    if config.mesh.distributed:
        known = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
        jax.distributed.initialize(**{name: None if value is None else int(value) for name, value in known.items()})
    console = Console(enabled=jax.process_index() == 0)
    if _first_process_first("claim", lambda: run_files.claim(config, workdir)) and jax.process_index() == 0:
        console.line(f"{workdir} holds this run already; going on with what is not done")
    policy = Policy.load(config, workdir, console)
    return _Run(config, workdir, policy, console)()


@dataclasses.dataclass(frozen=True)
class Policy:
    """The SFT model of a run: where it is, its definition, processor and mesh."""

    path: Path
    sizes: MllmConfig
    model: Mllm
    processor: Processor
    mesh: Mesh

    @classmethod
    def load(cls, config: Config, workdir: Path, console: Console, mesh: Mesh | None = None) -> "Policy":
        """Reads everything but the weights.

        Raises:
          UserError: no such model, or the mesh does not fit the devices or the batch.
        """
        if mesh is None:
            mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
            mesh_lib.check_batch(mesh, config.train.batch_size // config.train.accumulate)
        path = Path(config.model.path)
        if config.model.init == "scenes":
            path = workdir / "initial_model"
            _first_process_first("initial_model", lambda: path.exists() or scenes_model.write_initial(path, seed=config.train.seed))
        elif not config.model.path:
            raise UserError("config.model.path: give the directory of a Hugging Face model")
        sizes = read_config(path)
        processor = load_processor(path, sizes)
        dtype = config.model.compute_dtype
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = Mllm(sizes, processor.mean, processor.std, dtype, remat=config.model.remat == "full")
        console.line(f"Model {path}; {mesh.size} {jax.devices()[0].device_kind} devices, mesh {dict(mesh.shape)}, compute {dtype}")
        return cls(path, sizes, model, processor, mesh)

    def params(self, dtype: str = "float32", parts: Collection[str] | None = None) -> dict:
        """The SFT model's tree, in its shards; only these parts of it, where they are named."""
        return load_params(self.path, self.sizes, param_shardings(self.sizes, self.mesh), dtype, parts)


@dataclasses.dataclass
class _Run:
    config: Config
    workdir: Path
    policy: Policy
    console: Console

    def __post_init__(self):
        c = self.config
        self.objective = losses.build(c.objective.name, **c.objective.hyperparameters)
        self.skipped: list[SkippedRow] = []
        options = {"batch_size": c.eval.batch_size, "max_new_tokens": c.eval.max_new_tokens, "data": c.data}
        self.generator = Generator(self.policy.model, self.policy.processor, self.policy.mesh, **options)

    def __call__(self) -> int:
        tests = self._tests()
        records = self._records()
        before = self._measure("before", tests) if self.config.eval.before else None
        pairs = self._offline_pairs(records)
        batches, plan = self._batches(records if pairs is None else pairs)
        self._preflight(pairs or records, plan)
        trained = self._train(batches)
        if trained.stopped_by:
            return 128 + int(signal.Signals[trained.stopped_by])
        after = self._measure("after", tests, trained.params)
        if self.config.export.enabled:
            with self.console.phase("Exporting to Hugging Face"):
                changed = {part: tree for part, tree in trained.params.items() if part not in self.config.model.freeze}
                out = export(changed, self.policy.path, self.workdir / "export", dtype=self.config.export.dtype)
            self.console.line(f"Exported to {out}")
        self._report(before, after, records if pairs is None else pairs, trained.params)
        return 0

    def _records(self) -> builder.RecordSource:
        """The checked records of the data set: opened, rendered or imported."""
        c, target, source = self.config, self.workdir / "data", None
        if c.data.format == "scenes":
            target, source = target / c.data.split, scenes_source(c, c.data.split)
        with self.console.phase("Preparing data") as progress:
            read = lambda rows, skipped: progress(rows, None)  # noqa: E731
            prepared = _first_process_first("data", functools.partial(builder.obtain, c.data, target, source, progress=read))
        self.skipped += _skipped(prepared)
        left_out = ", ".join(f"{count} {reason}" for reason, count in prepared.skipped.items())
        self.console.line(f"{prepared.count} records of {prepared.read} rows" + (f"; skipped: {left_out}" if left_out else ""))
        return builder.open_records(prepared.dir)

    def _offline_pairs(self, records: builder.RecordSource) -> builder.RecordSource | None:
        """BDHS pairs for all records, made by the SFT model and kept in WORKDIR/pairs; None when the run makes none before training."""
        c = self.config.pairs
        if c.maker == "none" or c.when == "online":
            return None
        target, statistics = self.workdir / "pairs", self.workdir / "pairs.json"
        # pairs of other records or of another model, under the same names, are made again
        weights = [(file.name, *stamp(file)) for file in sorted(self.policy.path.glob("*.safetensors"))]
        identity = json.dumps([to_mapping(self.config)["pairs"], records.prepared.fingerprint, weights])
        if not (target.exists() and statistics.exists() and run_files.read_json(statistics)["identity"] == identity):
            with self.console.phase(f"Making rejected answers for {len(records)} records (BDHS)") as progress:
                sampler, plan = self._sampler(records)
                fitting = [int(index) for index, _ in plan.items]
                with jax.set_mesh(self.policy.mesh):
                    params = self.policy.params(self.policy.model.dtype)
                made, counts = sample_pairs(sampler, params, map(records.__getitem__, fitting), c, lambda done: progress(done, len(fitting)))
                if not made:
                    raise UserError("config.pairs: BDHS made no pair: every rejected answer equals its reference; raise rho_th or the temperature")
                builder.prepare(self.config.data, Source("BDHS", identity, lambda: iter(made)), target)
                left_out = [dataclasses.asdict(row) for row in plan.left_out]
                run_files.write_json(statistics, {**dataclasses.asdict(counts), "left_out": left_out, "identity": identity})
        counts = run_files.read_json(statistics)
        self.skipped += [SkippedRow("records", row["record_id"], f"{row['policy']}: {row['problem']}") for row in counts["left_out"]]
        by_iteration = ", ".join(f"{count} in iteration {number}" for number, count in counts["by_iteration"].items())
        self.console.line(
            f"{counts['pairs']} pairs from {counts['records']} records; {counts['unchanged']} came out as their reference, "
            f"{counts['unusable']} could not be read back; {counts['unfinished']} sentences ran out of slots; ended: {by_iteration}"
        )
        if counts["left_out"]:
            self.console.line(f"{len(counts['left_out'])} records left out before that, listed in the report")
        return builder.open_records(target)

    def _sampler(self, records: Records) -> tuple[BdhsSampler, RowPlan]:
        c, p = self.config, self.policy
        plan = plan_rows(records, p.processor, c.data, answers=1)
        lanes = max(len(split_sentences(reference_of(records[int(index)]).text)) for index, _ in plan.items)
        return BdhsSampler(p.model, p.processor, p.mesh, c.pairs, plan.layout, lanes), plan

    def _batches(self, records: Records) -> tuple[Batches, RowPlan]:
        c, p = self.config, self.policy
        if c.pairs.maker == "bdhs" and c.pairs.when == "online" and self.objective.answers == 2:
            sampler, plan = self._sampler(records)
            # a rejected answer may be longer than its reference
            slots = min(2 * plan.layout.answer_slots, c.data.answer_tokens or 2 * plan.layout.answer_slots)
            layout = dataclasses.replace(plan.layout, answers=2, answer_slots=slots)
            return OnlineBatches(records, p.processor, sampler, plan, layout, c.train), plan
        plan = plan_rows(records, p.processor, c.data, answers=self.objective.answers)
        index, count = process_slice(p.mesh)
        options = {"batch_size": c.train.batch_size, "accumulate": c.train.accumulate, "seed": c.train.seed, "workers": c.data.workers}
        return _Offline(make_loader(records, p.processor, plan, process_index=index, process_count=count, **options)), plan

    def _preflight(self, records: Records, plan: RowPlan) -> None:
        """Says what the model will see, before any of it is computed."""
        first, layout = records[int(plan.items[0][0])], plan.layout
        self.console.line(f"First prompt, as the model reads it: {self.policy.processor.render(first.turns)!r}")
        images = f"{layout.images} x {self.policy.sizes.image_tokens} image tokens"
        self.console.line(
            f"{plan.counts['kept']} of {plan.counts['rows']} rows; up to {layout.prefix_slots} tokens of prefix ({images}) and "
            f"{layout.answers} x {layout.answer_slots} of answers; {plan.padding_fraction:.0%} padding"
        )
        for reason in ("dropped_long", "dropped_bad", "shortened_answer"):
            if plan.counts[reason]:
                self.console.line(f"{plan.counts[reason]} rows {reason.replace('_', ' ')}, listed in the report")
        self.skipped += [SkippedRow("records", row.record_id, f"{row.policy}: {row.problem}") for row in plan.left_out]

    def _train(self, batches: Batches) -> Trained:
        p = self.policy
        loss = LossFunction(p.model, self.objective)
        return train(self.config, self.workdir, p.mesh, p.sizes, loss, p.params, batches, self.console)

    def _tests(self) -> tuple[world.WorldTest, ...]:
        c = self.config
        if not c.eval.benchmarks:
            return ()
        if c.data.format != "scenes":
            raise UserError("config.eval.benchmarks: during a run only the built-in world is measured (data.format = 'scenes'); leave it empty")
        return world.make_tests(c.scenes, c.eval.benchmarks)

    def _measure(self, when: str, tests: tuple[world.WorldTest, ...], params: dict | None = None) -> dict | None:
        """Scores of the model before or after training, kept in WORKDIR/eval."""
        if not tests:
            return None

        def make() -> dict:
            with self.console.phase(f"Measuring hallucination {when} training"), jax.set_mesh(self.policy.mesh):
                tree = self.policy.params() if params is None else params
                return world.measure(tests, lambda records: self.generator(tree, records))

        return run_files.once(self.workdir / "eval" / f"{when}.json", make)

    def _report(self, before: dict | None, after: dict | None, records: Records, params: dict) -> None:
        scores = world.rows(before, after) if after else []
        with self.console.phase("Writing the report"):
            gallery = self._gallery(records, params)
            if jax.process_index() == 0:
                run_files.write_json(self.workdir / "summary.json", _summary(self.config, scores))
                title = f"{self.config.objective.name} on {self.policy.path.name}"
                content = {"scores": scores, "gallery": gallery, "skipped": self.skipped, "environment": environment()}
                write_report(self.workdir, title=title, config=to_mapping(self.config), **content)
        for group in dict.fromkeys(row.group for row in scores):
            self.console.line(f"\n{group}")
            self.console.table([score_cells(row) for row in scores if row.group == group], ("", "before", "after", "change"))
        self.console.line(f"Report: {self.workdir / 'report.html'}")

    def _gallery(self, records: Records, params: dict) -> tuple[GalleryItem, ...]:
        """The first pairs with their pictures, and what the model says to the same prompt before and after. Generation runs in one process."""
        chosen: dict[str, PreferenceRecord] = {}
        if jax.process_count() == 1:
            for record in _each(records):
                if len(chosen) == self.config.report.gallery:
                    break
                if record.prefs and not record.prefix:
                    chosen.setdefault((record.media[0].origin if record.media else "") or record.id, record)
        if not chosen:
            return ()
        with jax.set_mesh(self.policy.mesh):
            before = self.generator(self.policy.params(), tuple(chosen.values()))
            after = self.generator(params, tuple(chosen.values()))
        return tuple(self._item(*one) for one in zip(chosen.values(), before, after, strict=True))

    def _item(self, record: PreferenceRecord, before: Answered, after: Answered) -> GalleryItem:
        truth = world.objects_of(record) if "objects" in record.meta else None
        mark = lambda text: Answer(text, () if truth is None else world.hallucinated(text, truth))  # noqa: E731
        limits = {"max_pixels": self.config.data.max_image_pixels, "max_bytes": self.config.data.max_image_bytes}
        # of a video at most four frames, evenly apart
        shown = [data for medium in record.media for data in medium.pictures[:: -(-len(medium.pictures) // 4)]]
        images = tuple(np.asarray(decode_image(data, file="records", row=record.id, **limits)) for data in shown)
        prompt = " ".join(part.text for turn in record.turns for part in turn.parts if part.text is not None)
        texts = [record.responses[index].text for index in (record.prefs[0].win, record.prefs[0].lose)]
        return GalleryItem(record.id, images, prompt, mark(texts[0]), mark(texts[1]), mark(_ended(before)), mark(_ended(after)))


def _ended(answer: Answered) -> str:
    return answer.text if answer.finished else answer.text + " …"


class _Offline:
    """A loader as the loop wants it: the rows do not depend on the policy."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self.get_state, self.set_state = loader.get_state, loader.set_state

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        return next(self._loader), {}


def export_step(workdir: Path, step: int | None, out: Path) -> Path:
    """Writes the checkpoint of a step (None: the newest) of the run in `workdir` as a Hugging Face directory.

    Raises:
      UserError: the directory holds no run or no such checkpoint.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir: {workdir} holds no run (no config.json)")
    config = from_mapping(run_files.read_json(workdir / "config.json"))
    # the run's mesh is not needed here: a laptop exports what a pod trained
    policy = Policy.load(config, workdir, Console(enabled=False), mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    like, _ = split_params(abstract_policy(policy.sizes, policy.mesh), config.model.freeze)
    trained = restore_params(workdir / "checkpoints", step, like)
    return export(trained, policy.path, out, dtype=config.export.dtype)


def scenes_source(config: Config, split: str) -> Source:
    """A split of the built-in world as a data set to prepare."""
    pictures = {"sft": config.scenes.sft, "align": config.scenes.align}[split]
    identity = json.dumps([splits.VERSION, config.scenes.seed, split, pictures])
    return Source(f"scenes/{split}", identity, lambda: splits.records(config.scenes.seed, split, pictures))


def _first_process_first(name: str, work: Callable[[], T]) -> T:
    """What `work` returns, after the first process has done it: on a shared file system the others then find it done."""
    if jax.process_count() == 1:
        return work()
    result = work() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices(f"mmalign_jax.pipeline.{name}")
    return work() if jax.process_index() else result


def _each(records: Records) -> Iterator[PreferenceRecord]:
    return (records[index] for index in range(len(records)))


def _skipped(prepared: builder.PreparedSet) -> list[SkippedRow]:
    file = prepared.dir / "skipped.jsonl"
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [SkippedRow(line["file"], line["row"], f"{line['reason']}: {line['problem']}") for line in lines]


def _summary(config: Config, scores: Sequence[ScoreRow]) -> dict:
    plain = lambda score: None if score is None else dataclasses.asdict(score)  # noqa: E731
    rows = [{"group": row.group, "name": row.name, "before": plain(row.before), "after": plain(row.after)} for row in scores]
    return {"objective": config.objective.name, "steps": config.train.steps, "scores": rows}
