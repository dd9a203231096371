"""How a metric went in the runs of a sweep: one line a method, the mean over its seeds, as an SVG file that stands alone."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mmalign_jax.errors import UserError
from mmalign_jax.files import read_json
from mmalign_jax.report import svg
from mmalign_jax.report.metrics import FILE
from mmalign_jax.report.table import label_of

# Colours that differ to most eyes, on white (Okabe and Ito, 2008)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_ROW = 16  # height of a line of the legend


def read_curves(root: Path, metric: str) -> list[svg.Series]:
    """The metric over the steps of every finished run under a directory, by method: means over the seeds, of the steps that all logged.

    Raises:
      UserError: no run has logged the metric.
    """
    by_label: dict[str, list[dict[int, float]]] = defaultdict(list)
    for file in sorted(root.glob("*/summary.json")):
        lines = file.parent / FILE
        if lines.is_file():
            logged = [json.loads(line) for line in lines.read_text().splitlines()]
            values = {one["step"]: one[metric] for one in logged if one.get(metric) is not None}
            if values:
                by_label[label_of(read_json(file.parent / "config.json"))].append(values)
    if not by_label:
        raise UserError(f"--curve: no run under {root} has logged {metric}")
    out = []
    for label, runs in by_label.items():
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        if not steps:
            raise UserError(f"--curve: the runs of {label!r} have logged {metric} at no step in common")
        out.append(svg.Series(label, tuple(steps), tuple(statistics.fmean(run[step] for run in runs) for step in steps)))
    return out


def standalone(series: Sequence[svg.Series]) -> str:
    """An SVG document with a legend under the chart.

    Raises:
      UserError: there are more series than colours.
    """
    if len(series) > len(_COLOURS):
        raise UserError(f"--curve: {len(series)} methods, and {len(_COLOURS)} colours; draw fewer runs")
    lines = [f".s{n} polyline{{stroke:{colour}}}.s{n} circle{{fill:{colour}}}" for n, colour in enumerate(_COLOURS)]
    style = "text{fill:#444;font:11px sans-serif}polyline{fill:none;stroke-width:1.6}.grid{stroke:#ddd}" + "".join(lines)
    width, height = svg.WIDTH, svg.HEIGHT + _ROW * len(series) + 6
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{2 * width}" height="{2 * height}">']
    out += [f'<style>{style}</style><rect width="{width}" height="{height}" fill="#fff"/>']
    out.append(svg.line_chart(series).replace("<svg ", f'<svg width="{width}" height="{svg.HEIGHT}" ', 1))
    for number, (one, colour) in enumerate(zip(series, _COLOURS, strict=False)):
        y = svg.HEIGHT + _ROW * number + 8
        out.append(f'<rect x="56" y="{y - 3}" width="14" height="3" fill="{colour}"/><text x="76" y="{y + 3}">{escape(one.name)}</text>')
    return "".join([*out, "</svg>\n"])
