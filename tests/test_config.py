import re

import pytest

from mmalign_jax import losses
from mmalign_jax.config import Config, ObjectiveConfig, from_mapping, to_mapping
from mmalign_jax.errors import UserError


def test_round_trip():
    train, objective = {"steps": 7, "batch_size": 4, "accumulate": 2}, {"name": "simpo", "gamma": 0.5}
    changed = from_mapping({"train": train, "model": {"freeze": ["decoder"]}, "objective": objective})
    assert changed.train.steps == 7 and changed.model.freeze == ("decoder",)
    assert changed.objective == ObjectiveConfig("simpo", {"gamma": 0.5})
    for one in (Config(), changed):
        assert from_mapping(to_mapping(one)) == one
    assert from_mapping({}) == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "config.trian: no such setting. Did you mean train?"),
        ({"train": {"stpes": 5}}, "config.train.stpes: no such setting. Did you mean steps?"),
        ({"train": 5}, "config.train: expected a group of settings, got 5"),
        ({"train": {"steps": "5"}}, "config.train.steps: expected int, got '5'"),
        ({"train": {"steps": 5.0}}, "config.train.steps: expected int, got 5.0"),
        ({"train": {"steps": True}}, "config.train.steps: expected int, got True"),
        ({"train": {"steps": None}}, "config.train.steps: expected int, got None"),
        ({"train": {"steps": 0}}, "config.train.steps: 0 is out of range, must be at least 1"),
        ({"report": {"tensorboard": 1}}, "config.report.tensorboard: expected bool, got 1"),
        ({"model": {"path": 3}}, "config.model.path: expected str, got 3"),
        ({"model": {"freeze": "decoder"}}, "config.model.freeze: expected a tuple, got 'decoder'"),
        ({"model": {"freeze": ("head",)}}, "config.model.freeze: unknown part ['head']"),
        ({"model": {"freeze": ("auto", "decoder")}}, "config.model.freeze: unknown part ['auto']; the parts are"),
        ({"model": {"freeze": ("vision_tower", "projector", "decoder")}}, "config.model.freeze: all parts are frozen, nothing would train"),
        ({"lora": {"rank": -1}}, "config.lora.rank: -1 is out of range"),
        ({"lora": {"rank": 4, "targets": ("q_proj",)}}, "config.lora.targets: 'q_proj' is not one of 'attention', 'mlp', 'query'"),
        ({"lora": {"rank": 4, "parts": ()}}, "config.lora: give at least one of lora.targets and one of lora.parts"),
        ({"lora": {"rank": 4}, "model": {"adapter": "a"}}, "config.lora.rank: an adapter that goes on training brings its own rank"),
        ({"optimizer": {"learning_rate": 0, "decoder_learning_rate": 1e-5}}, "config.optimizer.learning_rate: must be above 0 where parts"),
        ({"model": {"remat": "some"}}, "config.model.remat: 'some' is not one of 'none', 'dots', 'block', 'offload', 'auto'"),
        ({"eval": {"benchmarks": ("pope", "chiar")}}, "config.eval.benchmarks: 'chiar' is not one of 'pope', 'chair'"),
        ({"pairs": {"rho_th": 1.5}}, "config.pairs.rho_th: 1.5 is out of range, must be at least 0.0 and at most 1.0"),
        ({"pairs": {"eps": 0}}, "config.pairs.eps: 0.0 is out of range, must be above 0.0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "config.optimizer.learning_rate: nan is out of range"),
        ({"train": {"batch_size": 6, "accumulate": 4}}, "config.train.accumulate: 4 does not divide config.train.batch_size = 6"),
        (
            {"pairs": {"maker": "bdhs"}, "data": {"on_long_row": "shorten_answer"}},
            "config.data.on_long_row: pairs (config.pairs.maker) are made from whole references; use error or drop",
        ),
        ({"data": {"format": "scenes", "path": "pairs"}}, "config.data.path: pairs would not be read, because config.data.format is scenes"),
        ({"objective": {"name": "dpo", "bta": 1.0}}, "config.objective.bta: dpo has no such setting. Did you mean beta?"),
        ({"objective": {"name": "dpo", "beta": "x"}}, "config.objective.beta: expected float, got 'x'"),
        ({"objective": {"name": "nodpo"}}, "nodpo"),
    ],
)
def test_errors_name_the_key(values, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        from_mapping(values)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_floats_where_floats_are_meant():
    assert isinstance(from_mapping({"optimizer": {"clip_norm": 2}}).optimizer.clip_norm, float)


def test_an_empty_place_means_the_objectives_default():
    assert from_mapping({"objective": {"name": "dpo", "beta": None}}).objective.hyperparameters == {}


SAMPLED = {"pairs": {"maker": "samples", "when": "online"}, "samples": {"scorers": ("exact",)}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": {"name": "grpo"}}, "config.pairs.maker: grpo learns from answers that the policy draws during training"),
        ({"objective": {"name": "rloo"}, **SAMPLED, "pairs": {"maker": "samples"}}, "config.pairs.maker: rloo learns from answers"),
        (SAMPLED | {"objective": {"name": "grpo"}, "samples": {}}, "config.samples.scorers: say what"),
        (SAMPLED | {"objective": {"name": "sft"}}, "config.pairs.when: sft reads no rejected answers"),
        (SAMPLED | {"objective": {"name": "grpo"}, "samples": {"scorers": ("exact",), "temperature": 0.7}}, "config.samples.temperature: grpo"),
        (SAMPLED | {"reference": {"kind": "cached"}}, "config.reference.kind: pairs that are made online cannot be cached"),
        (SAMPLED | {"samples": {"scorers": ("exact",), "stop_strings": ("",)}}, "config.samples.stop_strings: an empty string"),
        (SAMPLED | {"objective": {"name": "grpo"}, "samples": {"scorers": ("exact",), "offline_share": 0.5}}, "config.samples.offline_share"),
        ({"samples": {"offline_share": 0.5}}, "config.samples.offline_share: only pairs"),
        (SAMPLED | {"data": {"on_long_row": "shorten_answer"}}, "config.data.on_long_row: rows of answers that are drawn"),
        (SAMPLED | {"objective": {"name": "reward_model"}}, "config.pairs.when: reward_model scores answers at their ends"),
        (SAMPLED | {"data": {"order": "by_image"}}, "config.data.order: rows that are made online"),
        ({"objective": {"name": "kto"}, "data": {"order": "by_image"}}, "config.data.order: kto goes by statistics of all rows"),
        ({"data": {"packed": True, "buckets": 4}}, "config.data.packed: it takes the place of buckets, and config.data.buckets is 4"),
        ({"data": {"packed": True, "order": "by_image"}}, "config.data.packed: pairs are dealt to devices by their length"),
        ({"data": {"packed": True}, "objective": {"name": "mdpo"}}, "config.data.packed: mdpo reads answers under a corrupted image"),
        ({"data": {"packed": True}, "objective": {"name": "kto"}}, "config.data.packed: kto reads another row's answer behind each prompt"),
        ({"data": {"packed": True}, "objective": {"name": "reward_model"}}, "config.data.packed: reward_model reads scores at the answers' ends"),
        (SAMPLED | {"data": {"packed": True}}, "config.data.packed: the lengths of pairs that are made online"),
        ({"data": {"packed": True}, "features": {"cache": "kept"}}, "config.data.packed: pairs that share a row bring pictures"),
        ({"data": {"packed": True}, "model": {"attention": "cudnn"}}, "config.data.packed: cuDNN's attention makes one causal sequence"),
        ({"auxiliary": {"packed": True}}, "config.auxiliary.packed: only rows of config.data are packed"),
        (SAMPLED | {"objective": {"name": "kto"}}, "config.pairs.when: kto goes by statistics of all rows"),
        (SAMPLED | {"samples": {"scorers": ("exact",), "length_ratio": 0.5}}, "config.samples.length_ratio: 0.5 would refuse every pair"),
        (SAMPLED | {"objective": {"name": "grpo"}, "samples": {"scorers": ("exact",), "sources": ("black",)}}, "config.samples.sources: grpo learns"),
        (SAMPLED | {"objective": {"name": "grpo"}, "samples": {"scorers": ("exact",), "count": 1}}, "config.samples.count: grpo compares"),
        (SAMPLED | {"objective": {"name": "kto_unpaired"}}, "config.pairs.when: kto_unpaired reads labelled answers, which are made offline"),
        (SAMPLED | {"objective": {"name": "pl_dpo"}}, "config.pairs.when: pl_dpo reads groups, which are made offline"),
        ({"objective": {"name": "kto_unpaired"}, "stop": {"displacement": True}}, "config.stop.displacement: kto_unpaired has no chosen"),
        ({"objective": {"name": "pl_dpo"}, "stop": {"grad_weight": 0.1}}, "config.stop.grad_weight: pl_dpo has no chosen"),
        ({"objective": {"name": "kto_unpaired"}, "data": {"holdout": 0.1}}, "config.data.holdout: kto_unpaired compares no answers"),
        (SAMPLED | {"objective": {"name": "grpo"}, "stop": {"grad_weight": 0.1}}, "config.stop.grad_weight: grpo has no chosen"),
        (SAMPLED | {"objective": {"name": "grpo", "kind": "ppo"}}, "config.objective.kind: 'ppo' is not one of 'grpo'"),
    ],
)
def test_answers_of_the_policys_own(values, message):
    from_mapping(SAMPLED)
    from_mapping(SAMPLED | {"objective": {"name": "grpo"}})
    with pytest.raises(UserError, match=message):
        from_mapping(values)


def test_default_objective_exists():
    assert Config().objective.name in losses.names()
