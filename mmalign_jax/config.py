"""Settings: an ml_collections file from the command line, converted once into frozen dataclasses.

Every field is checked here and nowhere else. An unknown key, a wrong type or a value out of range is one line that names the key.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mmalign_jax.errors import UserError, did_you_mean

PARTS = ("vision_tower", "projector", "decoder")
LINEARS = {
    "attention": ("query", "key", "value", "qkv", "out"),
    "mlp": ("gate", "up", "down", "fc1", "fc2", "linear"),
}  # what low-rank factors may stand beside, as the parameter tree calls it


def setting(default: Any, *, min: float | None = None, max: float | None = None, above: float | None = None, choices: tuple = (), help: str = ""):
    """A dataclass field with its range: `min <= value <= max`, `value > above`, or one of `choices`."""
    metadata = {"min": min, "max": max, "above": above, "choices": choices, "help": help}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model that is trained: where it comes from, in which types it is computed and kept, and which parts of it move."""

    path: str = setting("", help="Hugging Face directory of the SFT model: policy at step 0, and reference")
    init: str = setting("", choices=("", "scenes"), help="scenes: start from a new model of the built-in world, with random weights")
    preset: str = setting("", help="sizes of a known model, for launch/aot_check.py, which needs no weights; see models/presets.py")
    compute_dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on accelerators, float32 on CPU")
    reference_dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"), help="type in which the frozen trees are kept")
    adapter: str = setting("", help="LoRA adapter of model.path in PEFT's form: goes on training, and is part of the reference")
    freeze: tuple[str, ...] = setting(
        ("auto",),
        help="parts whose own weights do not train: vision_tower, projector, decoder. auto: the tower, with LoRA all three. A score head always "
        "trains",
    )
    attention: str = setting(
        "auto",
        choices=("auto", "blocks", "splash", "cudnn"),
        help="what computes the attention of whole rows: splash (TPU), cudnn (CUDA GPU), or blocks of queries, which can everywhere. auto: see "
        "models.implementation",
    )
    remat: str = setting(
        "dots",
        choices=("none", "dots", "block", "offload", "auto"),
        help="what is kept for the backward pass, see models.remat. auto: dots or block, the first whose step fits memory_gib",
    )
    memory_gib: float = setting(0.0, min=0.0, help="memory of a device that remat=auto may fill; 0: all that it has, on a CPU the machine's")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors that train in place of the linears they stand beside (arXiv 2106.09685); without dropout."""

    rank: int = setting(0, min=0, help="0: no factors")
    alpha: float = setting(16.0, above=0.0, help="what the factors add is multiplied by alpha / rank")
    targets: tuple[str, ...] = setting(
        ("attention", "mlp"), choices=(*LINEARS, *LINEARS["attention"], *LINEARS["mlp"]), help="linears, alone or as the two groups"
    )
    parts: tuple[str, ...] = setting(("decoder",), choices=PARTS)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set, and what becomes of rows that are bad (see `data.bad_rows`) or too long. Image tokens are never cut."""

    path: str = setting("", help="the data set: a parquet file or directory, a jsonl file, or prepared records")
    format: str = setting("auto", choices=("auto", "records", "rlhf_v", "rlaif_v", "trl", "scenes"))
    split: str = setting("align", choices=("sft", "align"), help="split of the built-in world, with format scenes")
    cache: str = setting("", help="where imported records are kept, each set in a directory of its own; empty: in the run's directory")
    on_bad_row: str = setting("error", choices=("error", "skip"))
    on_long_row: str = setting("error", choices=("error", "drop", "shorten_answer"))
    max_image_pixels: int = setting(64_000_000, min=1, help="larger images are refused before they are decoded")
    max_image_bytes: int = setting(64_000_000, min=1)
    max_frames: int = setting(512, min=1, help="most frames of one video; each is an image as far as the other limits go")
    prefix_tokens: int = setting(0, min=0, help="most slots for images and prompt; a run uses as many as its longest row needs; 0: no limit")
    answer_tokens: int = setting(0, min=0, help="most slots for one answer; 0: no limit")
    holdout: float = setting(0.0, min=0.0, max=0.9, help="share of the records that is kept out of training, to be measured on")
    order: str = setting(
        "shuffled",
        choices=("shuffled", "by_image"),
        help="by_image: rows that show the same pictures follow one another in training, so that a step encodes these once",
    )
    buckets: int = setting(0, min=0, max=32, help="row shapes in training, each compiled once; 0: 4 where pictures have any size, else 1, see packed")
    packed: bool = setting(
        False, help="several pairs share a row in training, so that little of it is empty; for sets of text, or of rows with and without pictures"
    )
    workers: int = setting(4, min=0, help="threads that read and decode")


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """The built-in world: its seed, and how many pictures a split has. Picture i of a split is the same whatever the numbers."""

    seed: int = setting(0, min=0)
    sft: int = setting(5000, min=1, help="pictures of the SFT split")
    align: int = setting(800, min=1, help="pictures of the alignment split")
    test: int = setting(200, min=1, help="pictures of each of the two test splits")


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """How answers are made for records that have none, or one: by BDHS (arXiv 2407.02477, section 4 and Algorithm 1), or as `SamplesConfig` says.

    `maker`, `when` and `every` concern both; the other settings BDHS.
    """

    maker: str = setting("none", choices=("none", "bdhs", "samples"), help="samples: answers of the policy, scored and selected")
    when: str = setting("offline", choices=("offline", "online"), help="online: from the current policy, between steps")
    every: int = setting(
        1, min=1, help="online: steps after which the policy that makes the pairs is taken anew; above 1 a copy of what trains is kept for it"
    )
    rho_th: float = setting(0.99, min=0.0, max=1.0, help="probability that an image token is hidden; 0.99 for about 2,880 tokens, 0.95 for 576")
    mask_scope: str = setting("all", choices=("all", "text"), help="who does not see hidden image tokens: everyone, or all but image tokens")
    noise_steps: int = setting(0, min=0, max=999, help="BDHS_noise: steps of diffusion noise on the images, as POVID; with rho_th = 0")
    guided: bool = setting(True, help="sentences go on from within the clean reference; otherwise all attempts answer the prompt alone")
    n_iter: int = setting(5, min=1)
    eps: float = setting(0.97, above=0.0, help="accept a rejected answer whose similarity to the reference is below this")
    temperature: float = setting(1.0, min=0.0)
    top_p: float = setting(1.0, above=0.0, max=1.0)
    max_sentence_tokens: int = setting(64, min=1)
    max_answer_tokens: int = setting(256, min=1, help="of an unguided attempt")
    split_unit: str = setting("word", choices=("word", "token"), help="what sentences are split in front of")
    stop: str = setting("sentence", choices=("sentence", "full_stop"), help="sentence: a question or exclamation mark ends a sentence, too")
    yes_no_swap: float = setting(0.5, min=0.0, max=1.0)
    per_sentence: bool = setting(False, help="one record a changed sentence, with the clean answer before it as shared context")
    gamma: float = setting(0.0, min=0.0, max=0.999, help="share of the set's own rejected answer in the loss (equation 5: 0.5); 0: it is not used")
    similarity: str = setting("ngram", choices=("ngram", "encoder"), help="encoder: cosine of sentence vectors, as in the paper")
    encoder: str = setting("", help="directory of a sentence encoder, such as all-mpnet-base-v2 (the paper's) or all-MiniLM-L6-v2")
    batch_size: int = setting(64, min=1, help="rows that are decoded together")
    seed: int = setting(0, min=0)
    cache: str = setting("", help="directory of pairs made before training, which runs may share; empty: in the run's directory")


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Answers to a prompt: where they come from, what they are worth, and which of them become a pair.

    Objectives that learn from rewards (GRPO and others) take all answers to a prompt as a group; `selector` and what follows it then say nothing.
    """

    sources: tuple[str, ...] = setting(("policy",), help="where answers come from; see `pairs.sources`")
    count: int = setting(2, min=1, max=1024, help="answers to a prompt, of each source that draws them")
    temperature: float = setting(1.0, above=0.0)
    top_k: int = setting(0, min=0, help="0: no limit")
    top_p: float = setting(1.0, above=0.0, max=1.0)
    max_tokens: int = setting(256, min=1, help="of an answer")
    stop_strings: tuple[str, ...] = setting((), help="an answer also ends with the token that completes one of these")
    batch_size: int = setting(64, min=1, help="prompts of a device batch")
    seed: int = setting(0, min=0)
    scorers: tuple[str, ...] = setting((), help='what an answer is worth, a sum, such as ("objects", "length(-0.1)"); see `pairs.scorers`')
    synonyms: str = setting("", help="JSON file for the scorer objects and the source swap: kind -> words; the built-in world has its own")
    pattern: str = setting("", help="regular expression that the scorer format looks for a whole answer to be")
    reward_model: str = setting("", help="directory of the scorer reward_model, the export of a run with that objective")
    clip: str = setting("", help="directory of the scorer clip: a CLIP or SigLIP model")
    critic: str = setting("", help="directory of the model that the scorer claims asks; empty: the policy as it is when the run begins")
    claim: str = setting("Is this true of the picture? {claim}", help="how the scorer claims asks about a sentence, to be answered with yes or no")
    unfinished: bool = setting(
        True, help="online: whether answers that ran out of tokens count, as samples of a group or as the better of a pair; offline they never do"
    )
    selector: str = setting("best_worst", help="see `pairs.selectors`")
    gap: float = setting(0.0, min=0.0, help="least difference between the scores of a pair")
    length_ratio: float = setting(0.0, min=0.0, help="most, above 1, that one answer of a pair may be as long as the other, in words; 0: no limit")
    offline_share: float = setting(
        0.0, min=0.0, max=1.0, help="Mixed-DPO (arXiv 2407.02477, section 2.3): probability that a row of a step is the data set's own pair"
    )
    offline_pairs: str = setting("set", choices=("set", "bdhs"), help="bdhs: made before training from references")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A chat model that the scorer `judge` and the source `edit` ask, behind an OpenAI-compatible endpoint or of ours; see `pairs.judge`."""

    url: str = setting("", help="up to the version, such as http://127.0.0.1:8000/v1")
    model: str = setting("", help="its name there")
    key_variable: str = setting("", help="the environment variable that holds the key; empty: none is sent")
    directory: str = setting("", help="a model directory in the place of an endpoint; policy: the policy as it is when the run begins")
    prompt: str = setting("score", help="what the scorer asks: compare, score, sima, or a TOML file; see `pairs.judge.prompts`")
    edit_prompt: str = setting("inject", help="what the source edit asks: inject, or a TOML file of kind edit")
    both_orders: bool = setting(True, help="comparisons are asked in both orders, since judges prefer places")
    timeout_s: float = setting(120.0, above=0.0, help="for a whole reply")
    max_tokens: int = setting(1024, min=1, help="of a reply")
    temperature: float = setting(0.0, min=0.0)
    attempts: int = setting(5, min=1, help="most times that one question is asked")
    workers: int = setting(16, min=1, max=1024, help="questions in flight")
    replies: str = setting("", help="file of the replies, which runs may share; empty: in the run's directory, or beside the pairs")


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """Iterative alignment: every round makes new pairs with the model that the round before has exported, and trains it further; see `rounds`."""

    count: int = setting(1, min=1, max=1000)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The objective and its hyper-parameters; None means the objective's own default. See `mmalign_jax.losses`."""

    name: str = setting("dpo")
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def answers(self) -> int:
        """How many answers of a row the objective reads."""
        return self._built.answers

    @property
    def score_head(self) -> bool:
        """Whether the objective reads scores or values, so that the model has a head for them."""
        return self._built.score_head

    @property
    def reads_logps(self) -> bool:
        """Whether the objective reads log-probs of answers; otherwise the vocabulary is not computed, and the output kernel does not train."""
        return self._built.reads_logps

    @property
    def compares(self) -> bool:
        """Whether the objective sets answers above others, so that its accuracy can be measured."""
        return self._built.compares is not None

    @property
    def goes_by_batch(self) -> bool:
        """Whether a row's loss depends on the other rows of its step."""
        return self._built.goes_by_batch

    @property
    def other_pictures(self) -> str:
        """Which pictures the objective sees that are made from a row's own, in words; "" where there are none."""
        return self._built.other_pictures

    @property
    def alone(self) -> tuple[str, ...]:
        """What it reads that rows of several pairs do not have, in words."""
        return self._built.alone

    @property
    def of_samples(self) -> bool:
        """Whether it learns from the rewards of groups of samples."""
        return self._built.of_samples

    @property
    def reads(self) -> str:
        """Which field of a record holds its rows, of `types.FORMS`."""
        return self._built.reads

    @property
    def _built(self) -> Any:
        from mmalign_jax import losses  # arrays only; imported late so that reading a config does not load jax

        return losses.build(self.name, **self.hyperparameters)


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Where the reference's log-probs come from; see `training.reference`."""

    kind: str = setting(
        "auto",
        choices=("auto", "live", "cached", "adapter_off", "ema", "none"),
        help="live: the SFT model, computed in every step; cached: computed once; adapter_off: the model without its LoRA factors; ema: follows "
        "the policy (TR-DPO); none: all answers equally likely; auto: what objective and model ask for",
    )
    share: float = setting(0.6, above=0.0, max=1.0, help="ema: how much of the policy it becomes")
    every: int = setting(512, min=1, help="ema: after so many steps each time")
    cache: str = setting("", help="cached: directory of the log-probs, which runs may share; empty: in the run's directory")
    batch_size: int = setting(0, min=0, help="cached: rows at a time; 0: train.batch_size / train.accumulate")


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Whether what a frozen vision tower makes of a picture is kept on disk; see `training.kept_features`."""

    cache: str = setting("", help="directory of the features, which runs may share; empty: pictures are decoded and encoded in every step")
    batch_size: int = setting(0, min=0, help="sets of pictures at a time that are encoded before training; 0: 4 a device, at most a step's")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate over the steps; see `training.optimizer`."""

    learning_rate: float = setting(1e-6, min=0.0)
    vision_tower_learning_rate: float = setting(0.0, min=0.0, help="of one part, with the same schedule; 0: learning_rate")
    projector_learning_rate: float = setting(0.0, min=0.0)
    decoder_learning_rate: float = setting(0.0, min=0.0)
    score_head_learning_rate: float = setting(0.0, min=0.0)
    schedule: str = setting("cosine", choices=("cosine", "linear", "constant"))
    warmup_fraction: float = setting(0.0, min=0.0, max=0.9, help="share of the steps in which the learning rate rises linearly")
    final_fraction: float = setting(0.0, min=0.0, max=1.0, help="what the learning rate ends with, as a share of its peak")
    weight_decay: float = setting(0.0, min=0.0)
    b1: float = setting(0.9, min=0.0, max=1.0)
    b2: float = setting(0.999, min=0.0, max=1.0)
    clip_norm: float = setting(1.0, min=0.0, help="0: no clipping")
    moment_dtype: str = setting("float32", choices=("float32", "bfloat16"), help="type of the first moment")

    @property
    def rates(self) -> dict[str, float]:
        """Part -> its own learning rate, 0 where it has that of all."""
        return {part: getattr(self, f"{part}_learning_rate") for part in (*PARTS, "score_head")}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long is trained, on how many rows at a time. `seed` decides the order of the rows and the views that objectives draw."""

    steps: int = setting(1000, min=1)
    batch_size: int = setting(8, min=1, help="rows of one optimizer step, over all devices")
    accumulate: int = setting(1, min=1, help="the step's rows are computed in this many parts")
    updates: int = setting(1, min=1, help="updates on the rows of a step, as PPO makes several on the same samples")
    seed: int = setting(0, min=0)
    redraw_views: str = setting("never", choices=("never", "epoch"), help="never: a row's corrupted image is the same in all epochs")
    log_every: int = setting(10, min=1)
    profile: int = setting(0, min=0, help="write a trace of so many steps to WORKDIR/profile, from the third step on; XProf reads it")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often the state is saved, in steps, and how many of the newest checkpoints stay. The last step is always saved."""

    every: int = setting(100, min=1)
    keep: int = setting(2, min=1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh, see `mesh`; one size may be -1 and takes what the others leave."""

    data: int = setting(1, min=-1)
    fsdp: int = setting(-1, min=-1)
    tensor: int = setting(1, min=-1)
    distributed: bool = setting(False, help="several hosts: jax.distributed.initialize() finds them (TPU pods, Slurm, or JAX's variables)")


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """Signs of over-optimisation; see `training.monitors`."""

    every: int = setting(50, min=0, help="steps between two measurements, from the first step on; shorter runs have none; 0: never")
    temperature: float = setting(1.0, min=0.0, help="of the policy's own answers")


@dataclasses.dataclass(frozen=True)
class StopConfig:
    """When a run ends before its last step, see `training.stopper`. By default none of the rules is on."""

    kl_budget: float = setting(0.0, min=0.0, help="most nats of the policy's own answers from the reference (monitor/kl_on_policy); 0: off")
    displacement: bool = setting(False, help="stop when chosen answers collapse: over half displaced, by more than 0.1 nats a token")
    length_ratio: float = setting(0.0, min=0.0, help="most growth of the policy's own answers, such as 1.5; 0: off")
    grad_weight: float = setting(0.0, min=0.0, max=1.0, help="stop when the pairs' mean gradient weight is below, such as 0.05; 0: off")
    patience: int = setting(0, min=0, help="probes without a better score (eval.probe_every); 0: off")
    window: int = setting(5, min=1, help="logged steps that a rule looks at")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What a run measures before, during and after training: benchmarks on the built-in world (others: launch/evaluate.py), held-out pairs."""

    benchmarks: tuple[str, ...] = setting((), choices=("pope", "chair"))
    batch_size: int = setting(64, min=1)
    max_new_tokens: int = setting(64, min=1)
    before: bool = setting(True, help="also measure the model at step 0")
    probe_every: int = setting(0, min=0, help="steps between two probes of eval.probe_pictures pictures of the counterfactual split; 0: none")
    probe_pictures: int = setting(50, min=1)
    holdout_every: int = setting(0, min=0, help="steps between two measures of the held-out pairs (data.holdout); 0: after the last step alone")
    chair_weight: float = setting(1.0, min=0.0, help="probe/score = F1 of POPE - chair_weight * CHAIR_i")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What a run leaves beside its numbers for people to look at."""

    gallery: int = setting(12, min=0, help="pictures in the report's gallery")
    tensorboard: bool = setting(True)
    wandb: str = setting("", help="W&B project; empty: off")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The Hugging Face directory that a run ends with."""

    enabled: bool = setting(True)
    dtype: str = setting("base", choices=("base", "float32", "bfloat16"), help="base: each tensor in the type of the base checkpoint")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a command, checked: what `from_mapping` returns and `config.json` holds."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    scenes: ScenesConfig = ScenesConfig()
    pairs: PairsConfig = PairsConfig()
    samples: SamplesConfig = SamplesConfig()
    judge: JudgeConfig = JudgeConfig()
    rounds: RoundsConfig = RoundsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reference: ReferenceConfig = ReferenceConfig()
    features: FeaturesConfig = FeaturesConfig()
    auxiliary: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    monitor: MonitorConfig = MonitorConfig()
    stop: StopConfig = StopConfig()
    eval: EvalConfig = EvalConfig()
    report: ReportConfig = ReportConfig()
    export: ExportConfig = ExportConfig()


def from_mapping(values: Mapping[str, Any] | ConfigDict) -> Config:
    """Converts the nested mapping of a config file (a ConfigDict or plain dicts) and checks every value.

    Raises:
      UserError: an unknown key (with the nearest known one), a wrong type or a value out of range; the message names the key.
    """
    from mmalign_jax.config_checks import check_across  # late: it reads the records of this file

    config = _record(Config, values, "config")
    check_across(config)
    return config


def to_mapping(config: Config) -> dict[str, Any]:
    """The nested plain dict of a config: what `config.json` holds. `from_mapping` reads it back."""
    plain = dataclasses.asdict(config)
    plain["objective"] = {"name": config.objective.name, **config.objective.hyperparameters}
    return plain


def _record(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, (Mapping, ConfigDict)):
        raise UserError(f"{where}: expected a group of settings, got {values!r}")
    if cls is ObjectiveConfig:
        return _objective(values, where)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    out = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}.{key}: no such setting.{did_you_mean(key, fields)} Known: {', '.join(fields)}")
        if dataclasses.is_dataclass(hints[key]):
            out[key] = _record(hints[key], value, f"{where}.{key}")
        else:
            out[key] = _value(value, hints[key], fields[key].metadata, f"{where}.{key}")
    return cls(**out)


def _objective(values: Mapping[str, Any] | ConfigDict, where: str) -> ObjectiveConfig:
    from mmalign_jax import losses  # arrays only; imported late so that reading a config does not load jax

    name = values.get("name", "dpo")
    known = losses.hyperparameters(name)
    given = {key: value for key, value in values.items() if key != "name" and value is not None}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{where}.{key}: {name} has no such setting.{did_you_mean(key, known)} Known: {', '.join(known) or 'none'}")
        hint = tuple[float, ...] if isinstance(known[key], tuple) else type(known[key])
        given[key] = _value(value, hint, {}, f"{where}.{key}")
    losses.build(name, **given)  # ranges, and what hyper-parameters do not go together
    return ObjectiveConfig(name=name, hyperparameters=given)


def _value(value: Any, hint: Any, limits: Mapping[str, Any], where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise UserError(f"{where}: expected a tuple, got {value!r}")
        return tuple(_value(item, typing.get_args(hint)[0], limits, where) for item in value)
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{where}: settings have one type")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    if limits.get("choices") and value not in limits["choices"]:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, limits['choices']))}")
    low, high, above = limits.get("min"), limits.get("max"), limits.get("above")
    bad = (low is not None and value < low) or (high is not None and value > high) or (above is not None and value <= above)
    if bad or value != value:
        bounds = (("at least", low), ("above", above), ("at most", high))
        wanted = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
        raise UserError(f"{where}: {value} is out of range, must be {wanted}")
    return value
