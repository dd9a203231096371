"""A run that should end early ends for a reason that can be read, and one that goes on decides the same again."""

import pytest

from mmalign_jax.config import StopConfig, from_mapping
from mmalign_jax.errors import UserError
from mmalign_jax.training.stopper import reason_to_stop


def lines(**columns: list[float]) -> list[dict[str, float]]:
    count = max(map(len, columns.values()))
    return [{"step": 10 * (i + 1), **{name.replace("__", "/"): values[i] for name, values in columns.items()}} for i in range(count)]


GOOD = lines(
    monitor__kl_on_policy=[1.0] * 9, displacement_rate=[0.1] * 9, chosen_drift_per_token=[-0.01] * 9, monitor__length=[20.0] * 9,
    monitor__ended=[1.0] * 9, grad_weight=[0.4] * 9, probe__score=[0.1 * i for i in range(9)],
)  # fmt: skip
ALL = StopConfig(kl_budget=20.0, displacement=True, length_ratio=1.5, grad_weight=0.05, patience=3)


def test_nothing_stops_a_run_that_goes_well_or_without_a_rule():
    assert reason_to_stop(GOOD, ALL) == "" and reason_to_stop([], ALL) == ""
    bad = [{**line, "monitor/kl_on_policy": 1e9, "grad_weight": 0.0, "displacement_rate": 1.0, "chosen_drift_per_token": -9.0} for line in GOOD]
    assert reason_to_stop(bad, StopConfig()) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"monitor/kl_on_policy": 21.0}, "21.0 nats from the reference, more than config.stop.kl_budget = 20"),
        ({"monitor/length": 31.0}, "1.55 times as long as at the beginning"),
        ({"monitor/ended": 0.8}, "only 80% of the policy's own answers still end"),
    ],
)
def test_the_last_measurement_decides(changes, reason):
    assert reason in reason_to_stop([*GOOD[:-1], {**GOOD[-1], **changes}], ALL)
    assert reason_to_stop([*GOOD[:-2], {**GOOD[-2], **changes}, GOOD[-1]], ALL) == "", "it went back"


def test_a_window_decides_about_what_every_step_says():
    collapsing = [{**line, "displacement_rate": 0.6, "chosen_drift_per_token": -0.2} for line in GOOD]
    assert "chosen answers collapse: 60% of the pairs" in reason_to_stop(collapsing, ALL)
    assert reason_to_stop(GOOD[:6] + collapsing[6:], ALL) == ""
    assert reason_to_stop(collapsing[:4], ALL) == "", "too few lines"
    exhausted = [{**line, "grad_weight": 0.01} for line in GOOD]
    assert "the pairs teach nothing more: their mean gradient weight is 0.010" in reason_to_stop(exhausted, ALL)


def test_patience_counts_probes_of_a_smoothed_score():
    history = lines(probe__score=[0.1, 0.5, 0.9, 0.8, 0.2, 0.2, 0.2])
    reason = reason_to_stop(history, ALL)
    # means of three: .1, .3, .5, .733, .633, .4, .2: best at step 40, three probes ago
    assert "not been better since step 40 (0.733, now 0.200" in reason and "config.stop.patience = 3 probes" in reason
    assert reason_to_stop(history[:-1], ALL) == ""
    with_other_lines = [line for probe in history for line in ({"step": probe["step"] - 5, "loss": 1.0}, probe)]
    assert reason_to_stop(with_other_lines, ALL) == reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": {"kl_budget": 5.0}, "monitor": {"every": 0}}, "config.monitor.every: config.stop reads"),
        ({"stop": {"length_ratio": 1.5}, "train": {"steps": 20}}, "config.monitor.every"),
        ({"stop": {"patience": 2}}, "config.eval.probe_every"),
    ],
)
def test_rules_that_would_never_see_anything_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        from_mapping(settings)
