"""What settings go together."""

from mmalign_jax.config import PARTS, Config
from mmalign_jax.errors import UserError
from mmalign_jax.types import FORMS


def check_across(config: Config) -> None:
    """Raises UserError for settings that do not go together; the message names one of them, and what to do."""
    if config.train.batch_size % config.train.accumulate:
        raise UserError(f"config.train.accumulate: {config.train.accumulate} does not divide config.train.batch_size = {config.train.batch_size}")
    _check_parts(config)
    _check_features(config)
    if (config.stop.kl_budget or config.stop.length_ratio) and not 0 < config.monitor.every <= config.train.steps:
        raise UserError("config.monitor.every: config.stop reads what the monitor measures; set it between 1 and config.train.steps")
    if config.stop.patience and not config.eval.probe_every:
        raise UserError("config.eval.probe_every: config.stop.patience counts probes; set how often they are made")
    if config.pairs.maker != "none" and config.pairs.when == "online" and config.objective.reads != "prefs":
        raise UserError(f"config.pairs.when: {config.objective.name} reads {FORMS[config.objective.reads]}, which are made offline; use offline")
    _check_samples(config)
    if config.pairs.maker != "none" and config.pairs.when == "online" and config.objective.answers < 2 and not config.objective.of_samples:
        raise UserError(
            f"config.pairs.when: {config.objective.name} reads no rejected answers, so online pairs have no use; set config.pairs.maker to none"
        )
    if config.pairs.maker != "none" and config.pairs.when == "online" and config.reference.kind == "cached":
        raise UserError("config.reference.kind: pairs that are made online cannot be cached; use live")
    if config.pairs.every > 1 and (config.pairs.maker == "none" or config.pairs.when == "offline"):
        raise UserError("config.pairs.every: only pairs that are made online (config.pairs.when) are made by a policy that moves; leave it 1")
    if config.pairs.maker == "bdhs" and config.data.on_long_row == "shorten_answer":
        raise UserError("config.data.on_long_row: pairs (config.pairs.maker) are made from whole references; use error or drop")
    if (config.pairs.similarity == "encoder") != bool(config.pairs.encoder):
        raise UserError('config.pairs.encoder: a directory goes with config.pairs.similarity = "encoder", and only with it')
    if config.pairs.gamma and (config.pairs.when == "online" or config.pairs.per_sentence):
        raise UserError("config.pairs.gamma: the set's own rejected answers go with whole pairs that are made offline; leave it 0")
    if config.data.format == "scenes" and config.data.path:
        raise UserError(f"config.data.path: {config.data.path} would not be read, because config.data.format is scenes; leave one of the two out")
    if not config.objective.reads_logps:
        for group, name in (("eval", "benchmarks"), ("eval", "probe_every"), ("stop", "length_ratio")):
            if getattr(getattr(config, group), name):
                raise UserError(f"config.{group}.{name}: {config.objective.name} trains scores and not what the model says; leave it out")
    if config.data.holdout and not config.objective.compares:
        raise UserError(f"config.data.holdout: {config.objective.name} compares no answers, so held-out pairs have no use; leave it 0")
    if config.data.holdout and config.pairs.maker != "none" and config.pairs.when == "online":
        raise UserError("config.data.holdout: pairs that are made online cannot be held out; make them offline, or leave it 0")
    if config.data.order != "shuffled" and config.pairs.maker != "none" and config.pairs.when == "online":
        raise UserError("config.data.order: rows that are made online come in an order of their own; leave it at shuffled")
    if config.data.order != "shuffled" and config.objective.goes_by_batch:
        raise UserError(
            f"config.data.order: {config.objective.name} goes by statistics of all rows of a step, which would be those of few pictures; leave it at "
            "shuffled"
        )
    _check_packed(config)
    if config.eval.holdout_every and not config.data.holdout:
        raise UserError("config.eval.holdout_every: no pairs are held out; set config.data.holdout")
    if config.auxiliary.holdout:
        raise UserError("config.auxiliary.holdout: only pairs of config.data are held out; leave it 0")
    if config.model.init and config.model.path:
        raise UserError("config.model.path: a run that starts from config.model.init reads no model; leave one of the two empty")


def _check_packed(config: Config) -> None:
    """What goes with rows of several pairs, and what does not."""
    if config.auxiliary.packed:
        raise UserError("config.auxiliary.packed: only rows of config.data are packed; leave it out")
    if not config.data.packed:
        return
    if config.data.buckets > 1:
        raise UserError(f"config.data.packed: it takes the place of buckets, and config.data.buckets is {config.data.buckets}; use one of the two")
    if config.data.order != "shuffled":
        raise UserError(
            "config.data.packed: pairs are dealt to devices by their length, which parts those of a picture; leave config.data.order at shuffled"
        )
    if config.objective.alone:
        reads = " and ".join(config.objective.alone)
        raise UserError(f"config.data.packed: {config.objective.name} reads {reads}, which rows of several pairs do not have; leave it off")
    if config.pairs.maker != "none" and config.pairs.when == "online":
        raise UserError("config.data.packed: the lengths of pairs that are made online (config.pairs.when) are not known beforehand; leave it off")
    if config.features.cache:
        raise UserError("config.data.packed: pairs that share a row bring pictures, not what config.features.cache keeps of them; use one of the two")
    if config.model.attention == "cudnn":
        raise UserError(
            "config.data.packed: cuDNN's attention makes one causal sequence of an answer and all of the prefix before it; set "
            "config.model.attention to auto"
        )


def _check_samples(config: Config) -> None:
    """What goes with answers that the policy draws, and what does not."""
    samples, objective, pairs, rounds = config.samples, config.objective, config.pairs, config.rounds
    drawn = pairs.maker == "samples"
    online = drawn and pairs.when == "online"
    if objective.of_samples and not online:
        raise UserError(
            f'config.pairs.maker: {objective.name} learns from answers that the policy draws during training; set it to "samples", and '
            'config.pairs.when to "online"'
        )
    if objective.of_samples and not samples.scorers:
        raise UserError("config.samples.scorers: say what the policy's answers are worth; pairs.scorers lists what there is")
    if objective.of_samples and samples.sources != ("policy",):
        raise UserError(f"config.samples.sources: {objective.name} learns from the policy's answers alone; leave it at policy")
    if objective.of_samples and samples.count == 1:
        raise UserError(f"config.samples.count: {objective.name} compares the answers to a prompt; draw several")
    if not all(samples.stop_strings):
        raise UserError("config.samples.stop_strings: an empty string ends nothing; leave it out")
    if objective.of_samples and samples.temperature != 1.0:
        raise UserError(f"config.samples.temperature: {objective.name} compares log-probs with those of the draws, at temperature 1; leave it at 1")
    if samples.offline_share and (not online or objective.of_samples):
        raise UserError('config.samples.offline_share: only pairs that the policy draws online (config.pairs.maker = "samples") mix; leave it 0')
    if drawn and config.data.on_long_row == "shorten_answer":
        raise UserError("config.data.on_long_row: rows of answers that are drawn hold whole answers; use error or drop")
    if online and objective.goes_by_batch and not objective.of_samples:
        raise UserError(
            f"config.pairs.when: {objective.name} goes by statistics of all rows of a step, and prompts whose answers give no pair stay among "
            "them when answers are drawn online; use offline"
        )
    if 0 < samples.length_ratio < 1:
        raise UserError(f"config.samples.length_ratio: {samples.length_ratio:g} would refuse every pair; it is at least 1, or 0 for no limit")
    if online and objective.score_head and not objective.of_samples:
        raise UserError(f"config.pairs.when: {objective.name} scores answers at their ends, which not all that are drawn online have; use offline")
    unread: tuple[str, ...] = ()
    if objective.of_samples or objective.reads != "prefs":
        unread = ("displacement",) if objective.reads == "labels" else ("displacement", "grad_weight")
    for name in unread:
        if getattr(config.stop, name):
            raise UserError(f"config.stop.{name}: {objective.name} has no chosen and rejected answers; leave it out")
    if rounds.count == 1:
        return
    if pairs.maker == "none" or pairs.when == "online" or not config.export.enabled:
        raise UserError("config.rounds.count: a round makes its pairs before it trains (config.pairs.maker, when = offline) and exports its model")
    if config.data.holdout:
        raise UserError("config.data.holdout: what one round holds out another trains on; leave it 0")
    if config.model.init:
        raise UserError("config.rounds.count: rounds start from a model (config.model.path), not from a new one")
    if config.model.adapter:
        raise UserError("config.model.adapter: a round merges its factors, and the next has new ones (config.lora.rank); merge the adapter first")


def _check_parts(config: Config) -> None:
    freeze, lora, optimizer = config.model.freeze, config.lora, config.optimizer
    if freeze != ("auto",):
        if unknown := set(freeze) - set(PARTS):
            raise UserError(f"config.model.freeze: unknown part {sorted(unknown)}; the parts are {', '.join(PARTS)}, or auto alone")
        if len(set(freeze)) == len(PARTS) and not (lora.rank or config.model.adapter or config.objective.score_head):
            raise UserError("config.model.freeze: all parts are frozen, nothing would train")
    if lora.rank and not (lora.targets and lora.parts):
        raise UserError("config.lora: give at least one of lora.targets and one of lora.parts, or lora.rank = 0")
    if lora.rank and config.model.adapter:
        raise UserError("config.lora.rank: an adapter that goes on training brings its own rank; leave it 0 or leave config.model.adapter empty")
    if any(optimizer.rates.values()) and not optimizer.learning_rate:
        raise UserError("config.optimizer.learning_rate: must be above 0 where parts have learning rates; freeze the parts that shall not train")


def _check_features(config: Config) -> None:
    """What goes with features of the vision tower that are kept: nothing by which pictures or tower are others in a later step."""
    if not config.features.cache:
        return
    freeze, lora, pairs = config.model.freeze, config.lora, config.pairs
    leave = "or leave config.features.cache empty"
    if lora.rank and "vision_tower" in lora.parts:
        raise UserError(f"config.lora.parts: the vision tower has factors that train, so its features cannot be kept; leave it out, {leave}")
    if freeze != ("auto",) and "vision_tower" not in freeze:
        raise UserError(f"config.model.freeze: the vision tower trains, so its features cannot be kept; freeze it, {leave}")
    if seen := config.objective.other_pictures:
        raise UserError(
            f"config.objective.name: {config.objective.name} also sees {seen}, for which every step needs pixels and the tower, so features cannot "
            f"be read in their place; choose another objective, {leave}"
        )
    if pairs.maker != "none" and pairs.when == "online":
        raise UserError(f"config.pairs.when: pairs that are made online are made from pixels, so features are not read; make them offline, {leave}")
