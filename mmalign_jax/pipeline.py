"""A run from data to export: every part is written to the run's directory when it is done, and not done again by the same command."""

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from mmalign_jax import losses, run_files
from mmalign_jax import mesh as mesh_lib
from mmalign_jax.config import Config, DataConfig, to_mapping
from mmalign_jax.data import builder, holdout
from mmalign_jax.data.device import process_slice
from mmalign_jax.data.features import RowFeatures
from mmalign_jax.data.loader import Extra, Loader, make_loader
from mmalign_jax.data.other_images import OtherImages
from mmalign_jax.data.plan import LeftOut, Records, RowPlan, plan_rows
from mmalign_jax.data.sources import scenes
from mmalign_jax.errors import UserError
from mmalign_jax.evaluation import gallery, held_out, pope, world
from mmalign_jax.evaluation.generate import Generator
from mmalign_jax.files import write_json
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.losses import Need
from mmalign_jax.models.remat import least
from mmalign_jax.pairs.answers import check_settings as check_answers
from mmalign_jax.pairs.answers import plan_answers
from mmalign_jax.pairs.offline import make_cached, make_offline, plan_sampler
from mmalign_jax.pairs.online import BdhsBatches
from mmalign_jax.pairs.online_samples import GroupBatches, PairBatches
from mmalign_jax.pairs.selectors import parse as parse_selector
from mmalign_jax.report.console import Console
from mmalign_jax.report.environment import environment
from mmalign_jax.report.html import write_report
from mmalign_jax.report.records import GalleryItem, ScoreRow, SkippedRow, score_cells
from mmalign_jax.run_export import export_run
from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.scenes.model import write_initial
from mmalign_jax.scenes.splits import ORIGIN
from mmalign_jax.training.cached_reference import CachedReference
from mmalign_jax.training.flops import Work
from mmalign_jax.training.held_out import HeldOut
from mmalign_jax.training.kept_features import KeptFeatures
from mmalign_jax.training.loop import Batches, Trained, train
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.training.monitors import Monitor
from mmalign_jax.training.packed import check_packed, cost_of, in_words
from mmalign_jax.training.reference import Reference
from mmalign_jax.training.trainable import Trainable
from mmalign_jax.types import FORMS, PairBatch, TrainState

T = TypeVar("T")

SUMMARY = "summary.json"  # scores before and after; written when all else is done


def run(config: Config, workdir: Path) -> int:
    """Prepares data, measures, makes pairs, trains, measures again, exports and reports.

    Returns:
      0, or 128 + the signal's number when a signal stopped it; the same command then goes on.

    Raises:
      UserError: a mistake in config, data or checkpoint.
    """
    console = Console(enabled=first_process(config))
    if first_process_first("claim", lambda: run_files.claim(config, workdir)) and jax.process_index() == 0:
        console.line(f"{workdir} holds this run already; going on with what is not done")
    return _Run(config, workdir, _policy(config, workdir, console), console)()


def first_process(config: Config) -> bool:
    """Whether this is the first of the run's processes, which find each other here when there are several."""
    if config.mesh.distributed and not jax.distributed.is_initialized():
        known = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
        jax.distributed.initialize(**{name: None if value is None else int(value) for name, value in known.items()})
    return jax.process_index() == 0


def _policy(config: Config, workdir: Path, console: Console) -> Pretrained:
    """The model that training starts from, spread over all devices."""
    mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh_lib.check_batch(mesh, config.train.batch_size // config.train.accumulate)
    path = run_files.base_model(config, workdir)
    if config.model.init == "scenes":
        first_process_first("initial_model", lambda: path.exists() or write_initial(path, seed=config.train.seed))
    elif not config.model.path:
        raise UserError("config.model.path: give the directory of a Hugging Face model")
    how = {"remat": least(config.model.remat), "attention": config.model.attention}
    policy = Pretrained.read(path, mesh, config.model.compute_dtype, **how).adapted(config)
    devices = f"{mesh.size} {jax.devices()[0].device_kind} devices, mesh {dict(mesh.shape)}"
    console.line(f"Model {path}; {devices}, compute {policy.model.dtype}")
    return policy


@dataclasses.dataclass
class _Run:
    config: Config
    workdir: Path
    policy: Pretrained
    console: Console

    def __post_init__(self):
        c, p = self.config, self.policy
        self.objective = losses.build(c.objective.name, **c.objective.hyperparameters)
        self.reference = Reference.of(c, Trainable.of(c, p.sizes), self.objective)
        self.objective = dataclasses.replace(self.objective, reference_free=self.reference.free)
        self.loss = LossFunction(p.model, self.objective, c.train.redraw_views == "epoch")
        if self.loss.view is not None:
            self.console.line(f"Corrupted images: {self.loss.view}")
        self.features = KeptFeatures.of(c, p, self.console)
        if c.pairs.maker == "samples":  # mistakes in them are told before anything is measured
            check_answers(c, p.processor, of_samples=self.objective.of_samples)
        self._check_rows()
        if c.data.packed:
            check_packed(p.processor.traits, c.train.batch_size // (c.train.accumulate * mesh_lib.batch_divisor(p.mesh)))
        self.skipped: list[SkippedRow] = []
        options = {"batch_size": c.eval.batch_size, "max_new_tokens": c.eval.max_new_tokens, "data": c.data}
        self.generator = Generator(p.model, p.processor, p.mesh, **options)

    def _check_rows(self) -> None:
        """Refuses an objective that does not read what the run itself makes."""
        c, reads = self.config, self.objective.reads
        if c.pairs.maker == "none" or c.pairs.when == "online":
            return
        made = parse_selector(c.samples.selector, "config.samples.selector").makes if c.pairs.maker == "samples" else "prefs"
        if made != reads:
            setting = "config.samples.selector" if c.pairs.maker == "samples" else "config.pairs.maker"
            mend = {"prefs": "choose one that makes pairs", "labels": "unpaired makes them", "groups": "group makes them"}[reads]
            raise UserError(f"{setting}: makes {FORMS[made]}, and {self.objective.name} reads {FORMS[reads]}; {mend} (config.samples.selector)")

    def __call__(self) -> int:
        c = self.config
        self._check_world()
        tests = world.make_tests(c.scenes, c.eval.benchmarks) if c.eval.benchmarks else ()
        records = self._records()
        self._check_world(records)
        before = self._measure("before", tests) if c.eval.before else None
        if c.pairs.maker != "none" and c.pairs.when == "offline":
            records = self._pairs(records, c)
        elif c.samples.offline_share and c.samples.offline_pairs == "bdhs":
            records = self._pairs(records, dataclasses.replace(c, pairs=dataclasses.replace(c.pairs, maker="bdhs", when="offline")))
        kept_out: Records | None = None
        if c.data.holdout:
            records, kept_out = holdout.split(records, c.data.holdout, c.train.seed)
            self.console.line(f"{len(kept_out)} of {len(records) + len(kept_out)} records are held out of training")
        batches, plan = self._batches(records)
        trained = self._train(batches, plan, None if kept_out is None else self._held_out(kept_out))
        if trained.stopped_by:
            return 128 + int(signal.Signals[trained.stopped_by])
        after = self._measure("after", tests, trained.params)
        if c.export.enabled:
            with self.console.phase("Exporting to Hugging Face"):
                out = export_run(c, self.workdir, self.policy, trained.params, trained.step, self.workdir / "export")
            self.console.line(f"Exported to {out}")
        with self.console.phase("Writing the report"):
            scores = (world.rows(before, after) if after else []) + held_out.rows(trained.held_out)
            self._report(scores, self._gallery(records, plan, trained.params), trained)
        self._print(scores)
        return 0

    def _records(self) -> builder.RecordSource:
        """The checked records of the data set: opened, drawn or imported."""
        return self._obtain(self.config.data, self.workdir / "data", "Preparing data", counts=self.workdir / run_files.DATA)

    def _obtain(self, data: DataConfig, target: Path, title: str, counts: Path | None = None) -> builder.RecordSource:
        source = None
        if data.format == "scenes":
            target, source = target / data.split, scenes.read(self.config.scenes, data.split)
        with self.console.phase(title) as progress:
            read = lambda rows, skipped: progress(rows, None)  # noqa: E731
            prepared = first_process_first(target.name, lambda: builder.obtain(data, target, source, progress=read))
        if counts is not None and jax.process_index() == 0:
            write_json(counts, {"records": prepared.count, "skipped": dict(prepared.skipped)})
        self.skipped += _skipped(prepared)
        left_out = ", ".join(f"{count} {reason}" for reason, count in prepared.skipped.items())
        self.console.line(f"{prepared.count} records of {prepared.read} rows" + (f"; skipped: {left_out}" if left_out else ""))
        return builder.open_records(prepared.dir)

    def _pairs(self, records: builder.RecordSource, config: Config) -> builder.RecordSource:
        """Pairs for all records, made by the model that training starts from."""
        own = config.pairs.maker == "samples"
        what = f"{parse_selector(config.samples.selector).rows_in_words} of the model's own answers" if own else "rejected answers (BDHS)"
        title = f"Making {what} for {len(records)} records"
        if config.pairs.cache:
            made = make_cached(self.policy, records, config, self.console, title)
            self.console.line(f"Pairs in {made.prepared.dir}" + (", made before" if made.prepared.reused else ""))
        else:
            made = make_offline(self.policy, records, config, self.workdir / run_files.PAIRS, self.console, title)
        self.skipped += [*_skipped(made.prepared), *_not_fitting(made.left_out)]
        counts = made.statistics
        if jax.process_index() == 0:
            write_json(self.workdir / run_files.PAIR_COUNTS, dataclasses.asdict(counts))
        self.console.line(made.in_words())
        if made.left_out:
            self.console.line(f"{len(made.left_out)} records left out before that, listed in the report")
        return builder.open_records(made.prepared.dir)

    def _batches(self, records: Records) -> tuple[Batches, RowPlan]:
        c, p = self.config, self.policy
        if c.pairs.maker == "samples" and c.pairs.when == "online":
            return self._own_answers(records)
        if c.pairs.maker == "bdhs" and c.pairs.when == "online":
            sampler, plan = plan_sampler(p, records, c)
            self._preflight(records, plan)
            # a rejected answer may be longer than its reference
            slots = min(2 * plan.layout.answer_slots, c.data.answer_tokens or 2 * plan.layout.answer_slots)
            layout = dataclasses.replace(plan.layout, answers=2, answer_slots=slots, mark_changes=Need.CHANGED in self.objective.needs)
            return self._online(BdhsBatches(records, p.processor, sampler, plan, layout, c.train)), plan
        plan = self._plan(records)
        self._preflight(records, plan)
        if Need.MARGIN in self.objective.needs and not any(records[index].prefs[pref].margin for index, pref in plan.items.tolist()):
            raise UserError(f"config.objective.name: {self.objective.name} goes by the pairs' margins, and in this data set all are 0")
        if self.objective.by_rank and any(pref >= 0 and records[index].prefs[pref].weight != 1.0 for index, pref in plan.items.tolist()):
            raise UserError(
                f"config.objective.name: {self.objective.name} sorts the losses of a step, so that none belongs to a pair, and pairs of this set "
                "have weights other than 1; use another objective"
            )
        cache = Path(c.reference.cache) if c.reference.cache else self.workdir / run_files.REFERENCE
        features = self.features and self.features(records, plan)
        extras = self._extras(records, plan, self.loss, cache, features)
        return self._with_auxiliary(_Offline(self._loader(records, plan, c.data.order, extras, features, packed=c.data.packed))), plan

    def _plan(self, records: Records) -> RowPlan:
        objective = self.objective
        options = {"mark_changes": Need.CHANGED in objective.needs, "whole_answers": objective.whole_answers, "reads": objective.reads}
        return plan_rows(records, self.policy.processor, self.config.data, answers=objective.answers, **options)

    def _extras(self, records: Records, plan: RowPlan, loss: LossFunction, cache: Path, features: RowFeatures | None) -> list[Extra]:
        """What rows hold beside their own tokens and images."""
        extras: list[Extra] = []
        if loss.view is not None and "other_images" in loss.view.needs:
            extras.append(OtherImages(records, self.policy.processor, plan))
        if self.reference.kind == "cached":
            extras += CachedReference(self.config, cache, self.policy, loss, self.console, features)(records, plan, extras)
        return extras

    def _held_out(self, records: Records) -> Callable[[int, TrainState, dict | None], dict[str, Any]]:
        """Measures the held-out pairs after a step, once, and keeps what it finds in WORKDIR/eval."""
        c, p = self.config, self.policy
        plan = self._plan(records)
        self.skipped += _not_fitting(plan.left_out)
        loss = dataclasses.replace(self.loss, objective=self.objective.compares)
        cache = Path(c.reference.cache) / "held_out" if c.reference.cache else self.workdir / f"{run_files.REFERENCE}_held_out"
        features = self.features and self.features(records, plan)
        rows = {"extras": self._extras(records, plan, loss, cache, features), "features": features}
        measure = HeldOut(records, p.processor, plan, loss, p.mesh, batch_size=c.eval.batch_size, workers=c.data.workers, **rows)

        def after(step: int, state: TrainState, reference: dict | None) -> dict[str, Any]:
            theirs = state.reference or None if reference is None else reference
            make = lambda: measure(state.params, state.frozen, theirs, state.key)  # noqa: E731
            file = run_files.held_out(self.workdir, step)
            if jax.process_count() == 1:
                return run_files.once(file, make)
            found = make()  # by all processes, whatever each of them sees of the file
            if jax.process_index() == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, found)
            return found

        return after

    def _own_answers(self, records: Records) -> tuple[Batches, RowPlan]:
        """Answers that the policy draws between steps: groups for objectives that learn from rewards, pairs for others."""
        c, p = self.config, self.policy
        of_samples = self.objective.of_samples
        selector = parse_selector(c.samples.selector, "config.samples.selector")
        if Need.MARGIN in self.objective.needs and c.samples.offline_share:
            raise UserError(f"config.samples.offline_share: {self.objective.name} goes by margins, and those of the set's pairs are of another kind")
        if Need.MARGIN in self.objective.needs and not selector.compares:
            raise UserError(f"config.samples.selector: {self.objective.name} goes by margins, and {selector.name} gives none")
        reads_reference = selector.reads_reference
        # what rows may hold beside answers of the policy
        own = 0 if of_samples else 2 if c.samples.offline_share else int(reads_reference)
        rows, replies = min(c.samples.batch_size, c.train.batch_size), self.workdir / "replies.jsonl"
        answerer, plan = plan_answers(p, records, c, answers=own, rows=rows, replies=replies)
        slots = max(c.samples.max_tokens, plan.layout.answer_slots if own else 0)
        marked = Need.CHANGED in self.objective.needs
        layout = dataclasses.replace(plan.layout, answers=c.samples.count if of_samples else 2, answer_slots=slots, mark_changes=marked)
        planned = dataclasses.replace(plan, layout=layout)  # what the monitor goes by, too
        self._preflight(records, planned)
        batches = GroupBatches if of_samples else PairBatches
        return self._online(batches(records, plan, layout, answerer, c.samples, c.train)), planned

    def _online(self, batches: Batches) -> Batches:
        """The batches of a maker that uses the policy, with what else their rows hold."""
        if self.loss.view is not None and "other_images" in self.loss.view.needs:
            raise UserError("config.objective.view: other rows' pictures are not at hand for online pairs; choose another view")
        return self._with_auxiliary(batches)

    def _loader(
        self, records: Records, plan: RowPlan, order: str, extras: Sequence[Extra] = (), features: RowFeatures | None = None,
        packed: bool = False,
    ) -> Loader:  # fmt: skip
        """The loader of a set. Where rows of a device share pictures, it is said how many are encoded; where pairs share rows, what that saves."""
        c, mesh, (index, count) = self.config, self.policy.mesh, process_slice(self.policy.mesh)
        options = {"batch_size": c.train.batch_size, "accumulate": c.train.accumulate, "seed": c.train.seed, "workers": c.data.workers}
        options |= {"process_index": index, "process_count": count, "devices": mesh_lib.batch_divisor(mesh) // count, "order": order}
        processor, sizes, answers = self.policy.processor, self.policy.sizes, plan.layout.answers
        work = Work.of(self.objective, live_reference=self.reference.kind in ("live", "adapter_off", "ema"))
        cost = cost_of(sizes, answers, work=work, freeze=Trainable.of(c, sizes).frozen) if packed else None
        make = functools.partial(make_loader, records, processor, plan, **options, extras=extras, features=features, packed=cost)
        if cost is None:
            loader = make()
        else:
            with self.console.phase("Choosing the shapes of rows with several pairs"):
                loader = make()
            for line in in_words(loader.packing, answers, self.policy.model.attention_of):
                self.console.line(line)
        if len(loader.sizes) > 1:
            sizes, done = " or ".join(map(str, loader.sizes)), "encoded" if features is None else "read"
            self.console.line(f"Rows share their pictures: those of {sizes} rows are {done} for the {loader.sizes[-1]} rows of a device")
        return loader

    def _with_auxiliary(self, batches: Batches) -> Batches:
        """The batches with rows of the other data set that the objective reads, where it does."""
        if Need.AUXILIARY not in self.objective.needs:
            return batches
        data = self.config.auxiliary
        if not data.path and data.format != "scenes":
            raise UserError(f"config.auxiliary.path: {self.objective.name} also reads rows of another data set, such as the SFT data; give it")
        records = self._obtain(data, self.workdir / "auxiliary", "Preparing the auxiliary data")
        plan = plan_rows(records, self.policy.processor, data, answers=1)
        self.skipped += _not_fitting(plan.left_out)
        return WithAuxiliary(batches, self._loader(records, plan, data.order, features=self.features and self.features(records, plan)))

    def _preflight(self, records: Records, plan: RowPlan) -> None:
        """Says what the model will see, before any of it is computed."""
        first, layout = records[int(plan.items[0][0])], plan.layout
        media = [first.media[part.media] for turn in first.turns for part in turn.parts if part.media is not None]
        videos = [number for number, medium in enumerate(media) if medium.kind == "video"]
        prompt = self.policy.processor.render(first.turns, videos)
        self.console.line(f"First prompt, before its pictures are expanded: {prompt!r}")
        pictures = f"{layout.images} images of up to {layout.canvas[0]} x {layout.canvas[1]} pixels"
        self.console.line(
            f"{plan.counts['kept']} of {plan.counts['rows']} rows; up to {layout.prefix_slots} tokens of prefix ({pictures}) and "
            f"{layout.answers} x {layout.answer_slots} of answers" + ("" if self.config.data.packed else f"; {plan.padding_fraction:.0%} padding")
        )
        if len(plan.buckets) > 1:
            for bucket in plan.buckets:
                shape, patches = bucket.layout, f", {bucket.layout.patch_slots} patches" if bucket.layout.patch_slots else ""
                self.console.line(
                    f"  {len(bucket.members)} rows of {shape.prefix_slots} + {shape.answers} x {shape.answer_slots} tokens, {shape.images} images"
                    f" of up to {shape.canvas[0]} x {shape.canvas[1]} pixels{patches}; {bucket.padding_fraction:.0%} padding"
                )
        shapes = [bucket.layout for bucket in plan.buckets] or [layout]
        attention = dict.fromkeys(self.policy.model.attention_of(shape.prefix_slots, shape.answer_slots) for shape in shapes)
        self.console.line(f"Attention by {' and '.join(attention)} (config.model.attention={self.config.model.attention})")
        for reason in ("dropped_long", "dropped_bad", "shortened_answer"):
            if plan.counts[reason]:
                self.console.line(f"{plan.counts[reason]} rows {reason.replace('_', ' ')}, listed in the report")
        self.skipped += _not_fitting(plan.left_out)

    def _train(
        self, batches: Batches, plan: RowPlan, measure: Callable[[int, TrainState, dict | None], dict[str, Any]] | None = None
    ) -> Trained:
        p = self.policy
        c, slots = self.config, plan.layout.answer_slots
        options = DecodeOptions(slots, c.monitor.temperature, stop_ids=p.processor.eos_ids, banned_ids=p.processor.banned_ids)
        monitor = Monitor(p.model, options) if self.objective.reads_logps else None
        measures = {"monitor": monitor, "probe": self._probe(), "held_out": measure}
        return train(c, self.workdir, p.mesh, p.sizes, self.loss, p.params, batches, self.console, len(plan.items), **measures)

    def _probe(self) -> Callable[[dict], dict[str, float]] | None:
        """Scores of a few pictures that break the habit, for a look during training."""
        c = self.config
        if not c.eval.probe_every:
            return None
        test = world.make_tests(dataclasses.replace(c.scenes, test=c.eval.probe_pictures), ("pope", "chair"))[0]

        def probe(params: dict) -> dict[str, float]:
            with jax.set_mesh(self.policy.mesh):
                found = world.measure((test,), lambda records: self.generator(params, records))[test.name]
            of_pope, of_chair = found["pope"][pope.MEAN], found["chair"]
            scores = {"pope_f1": of_pope["f1"]["value"], "chair_i": of_chair["chair_i"]["value"], "recall": of_chair["recall"]["value"]}
            return {"score": scores["pope_f1"] - c.eval.chair_weight * scores["chair_i"], **scores}

        return probe

    def _check_world(self, records: Records | None = None) -> None:
        """Refuses measures of the built-in world in runs on other data: by the format of the set, then by its records."""
        c = self.config
        measured = {"config.eval.benchmarks": bool(c.eval.benchmarks), "config.eval.probe_every": bool(c.eval.probe_every)}
        others = c.data.format not in ("scenes", "records", "auto") if records is None else not records[0].id.startswith(ORIGIN)
        for setting in (name for name, wanted in measured.items() if wanted and others):
            raise UserError(f"{setting}: during a run only the built-in world is measured, and this data set is not of it; leave it empty")

    def _measure(self, when: str, tests: tuple[world.WorldTest, ...], params: dict | None = None) -> dict | None:
        """Scores of the model before or after training, kept in WORKDIR/eval."""
        if not tests:
            return None

        def make() -> dict:
            with self.console.phase(f"Measuring hallucination {when} training"), jax.set_mesh(self.policy.mesh):
                tree = self.policy.params() if params is None else params
                return world.measure(tests, lambda records: self.generator(tree, records))

        return run_files.once(self.workdir / "eval" / f"{when}.json", make)

    def _gallery(self, records: Records, plan: RowPlan, params: dict) -> tuple[GalleryItem, ...]:
        """Pairs with what the model says to the same prompts. Generation runs in one process."""
        shown = gallery.choose(records, plan, self.config.report.gallery) if jax.process_count() == 1 else ()
        if not shown or not self.objective.reads_logps:
            return gallery.items(shown, None, None, self.config.data)
        with jax.set_mesh(self.policy.mesh):
            before = self.generator(self.policy.params(), shown)
            after = self.generator(params, shown)
        return gallery.items(shown, before, after, self.config.data)

    def _report(self, scores: Sequence[ScoreRow], shown: Sequence[GalleryItem], trained: Trained) -> None:
        if jax.process_index() == 0:
            notes = (f"Stopped at step {trained.step} of {self.config.train.steps}: {trained.reason}.",) if trained.reason else ()
            title = f"{self.config.objective.name} on {self.policy.path.name}"
            content = {"scores": scores, "gallery": shown, "skipped": self.skipped, "environment": environment(), "notes": notes}
            write_report(self.workdir, title=title, config=to_mapping(self.config), **content)
            write_json(self.workdir / SUMMARY, _summary(self.config, scores, trained))

    def _print(self, scores: Sequence[ScoreRow]) -> None:
        for group in dict.fromkeys(row.group for row in scores):
            self.console.line(f"\n{group}")
            self.console.table([score_cells(row) for row in scores if row.group == group], ("", "before", "after", "change"))
        self.console.line(f"Report: {self.workdir / 'report.html'}")


class _Offline:
    """A loader as the loop wants it: the rows do not depend on the policy."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self.begin, self.get_state, self.set_state = loader.begin, loader.get_state, loader.set_state

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        return next(self._loader), {}


class WithAuxiliary:
    """Batches, and beside each as many rows of another data set."""

    def __init__(self, batches: Batches, other: Loader):
        self._batches, self._other = batches, other

    def begin(self) -> PairBatch | None:
        first, beside = self._batches.begin(), self._other.begin()
        return None if first is None else dataclasses.replace(first, auxiliary=beside)

    def next_batch(self, params: dict) -> tuple[PairBatch, dict[str, float]]:
        batch, made = self._batches.next_batch(params)
        return dataclasses.replace(batch, auxiliary=next(self._other)), made

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._batches.get_state(), "auxiliary": self._other.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        if not state.keys() >= {"batches", "auxiliary"}:
            raise UserError("the saved position in the data is of a run without auxiliary rows; use a new --workdir")
        self._batches.set_state(state["batches"])
        self._other.set_state(state["auxiliary"])


def first_process_first(name: str, work: Callable[[], T]) -> T:
    """What `work` returns, after the first process has done it: on a shared file system the others then find it done."""
    if jax.process_count() == 1:
        return work()
    result = work() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices(f"mmalign_jax.pipeline.{name}")
    return work() if jax.process_index() else result


def _skipped(prepared: builder.PreparedSet) -> list[SkippedRow]:
    """Rows that an import left out."""
    file = prepared.dir / "skipped.jsonl"
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [SkippedRow(line["file"], line["row"], f"{line['reason']}: {line['problem']}") for line in lines]


def _not_fitting(left_out: Sequence[LeftOut]) -> list[SkippedRow]:
    """Rows that a plan left out."""
    return [SkippedRow("records", row.record_id, f"{row.policy}: {row.problem}") for row in left_out]


def _summary(config: Config, scores: Sequence[ScoreRow], trained: Trained) -> dict:
    plain = lambda score: None if score is None else dataclasses.asdict(score)  # noqa: E731
    rows = [{"group": row.group, "name": row.name, "before": plain(row.before), "after": plain(row.after)} for row in scores]
    return {"objective": config.objective.name, "steps": trained.step, "stopped": trained.reason, "scores": rows}
