"""When training should end before its last step, and why, in words (the rules of thumb behind it: arXiv 2406.02900, 2410.08847)."""

import math
from collections.abc import Mapping, Sequence

from mmalign_jax.config import StopConfig

Line = Mapping[str, float]

_SMOOTHED = 3  # probes that a score is the mean of


def reason_to_stop(history: Sequence[Line], config: StopConfig) -> str:
    """The reason in a sentence, "" to go on. It depends on the logged metrics alone, so a run that goes on decides as if it had not stopped.

    Args:
      history: lines of metrics.jsonl so far, in order.
    """
    for rule in (_kl, _displacement, _length, _exhausted, _patience):
        if reason := rule(history, config):
            return reason
    return ""


def _kl(history: Sequence[Line], config: StopConfig) -> str:
    seen = _of(history, "monitor/kl_on_policy")
    if config.kl_budget and seen and seen[-1][1] > config.kl_budget:
        return f"the policy's own answers are {seen[-1][1]:.1f} nats from the reference, more than config.stop.kl_budget = {config.kl_budget:g}"
    return ""


def _displacement(history: Sequence[Line], config: StopConfig) -> str:
    if not config.displacement:
        return ""
    rates, drifts = (_of(history, name)[-config.window :] for name in ("displacement_rate", "chosen_drift_per_token"))
    if len(rates) < config.window:
        return ""
    rate, drift = (sum(value for _, value in some) / len(some) for some in (rates, drifts))
    if rate > 0.5 and drift < -0.1:
        return (
            f"chosen answers collapse: {rate:.0%} of the pairs get better while their chosen answer gets less likely, by {-drift:.2f} nats a token "
            "(config.stop.displacement)"
        )
    return ""


def _length(history: Sequence[Line], config: StopConfig) -> str:
    lengths, ended = _of(history, "monitor/length"), _of(history, "monitor/ended")
    if not config.length_ratio or len(lengths) < 2:
        return ""
    ratio = lengths[-1][1] / max(lengths[0][1], 1.0)
    if ratio > config.length_ratio:
        return f"the policy's own answers have become {ratio:.2f} times as long as at the beginning, more than config.stop.length_ratio"
    if ended[0][1] >= 0.9 > ended[-1][1]:
        return f"only {ended[-1][1]:.0%} of the policy's own answers still end by themselves (config.stop.length_ratio)"
    return ""


def _exhausted(history: Sequence[Line], config: StopConfig) -> str:
    weights = _of(history, "grad_weight")[-config.window :]
    mean = sum(value for _, value in weights) / max(len(weights), 1)
    if config.grad_weight and len(weights) == config.window and mean < config.grad_weight:
        return f"the pairs teach nothing more: their mean gradient weight is {mean:.3f}, below config.stop.grad_weight = {config.grad_weight:g}"
    return ""


def _patience(history: Sequence[Line], config: StopConfig) -> str:
    probes = _of(history, "probe/score")
    if not config.patience or len(probes) <= config.patience:
        return ""
    smoothed = []
    for index in range(len(probes)):
        some = probes[max(0, index + 1 - _SMOOTHED) : index + 1]
        smoothed.append(sum(value for _, value in some) / len(some))
    best = max(range(len(smoothed)), key=smoothed.__getitem__)
    if len(smoothed) - 1 - best >= config.patience:
        return (
            f"the probe's score has not been better since step {probes[best][0]:.0f} ({smoothed[best]:.3f}, now {smoothed[-1]:.3f}; means of up to "
            f"{_SMOOTHED} probes), for config.stop.patience = {config.patience} probes"
        )
    return ""


def _of(history: Sequence[Line], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have the metric."""
    known = [(line["step"], line[name]) for line in history if line.get(name) is not None]  # a file holds null for what is not finite
    return [(step, value) for step, value in known if math.isfinite(value)]
