"""`report.html`: one file with everything a reader wants to see of a run. No script, nothing from the network."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign_jax.files import replace_text
from mmalign_jax.report import svg
from mmalign_jax.report.metrics import read_metrics
from mmalign_jax.report.records import Answer, GalleryItem, ScoreRow, SkippedRow, score_cells, verdict
from mmalign_jax.report.style import STYLE

FILE = "report.html"
_MOST_PIXELS = 384  # the longer side of a gallery picture, so that a report stays small enough to send
_TINY = 128  # a picture this small is enlarged pixel by pixel: a blur would hide what the model sees
_MOST_SKIPPED = 500  # rows in the table; the count above it is of all

# Title of a chart, and the metrics it draws, each with its name in the legend.
_CHARTS = (
    ("Loss", (("loss", "loss"),)),
    ("Reward of the policy's own answers", (("samples/score", "mean"), ("rewards/best", "best of a group"))),
    ("Rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    ("Rewards of labelled answers", (("rewards/desirable", "desirable"), ("rewards/undesirable", "undesirable"))),
    ("Reward margin", (("rewards/margins", "margin"),)),
    ("Reward accuracy", (("rewards/accuracies", "accuracy"),)),
    ("Accuracy of rankings", (("ranking/accuracies", "pairs in their order"),)),
    ("Answer log-probs (nats)", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    ("Divergence from the reference (nats)", (("monitor/kl", "a token of chosen answers"), ("monitor/kl_on_policy", "an answer of its own"))),
    ("What the image adds (nats a token)", (("monitor/image_gain", "chosen"), ("monitor/image_gain_rejected", "rejected"))),
    ("Preferred without the image", (("monitor/accuracies_no_image", "accuracy"),)),
    ("Length of the policy's own answers (tokens)", (("monitor/length", "mean"),)),
    ("Probe during training", (("probe/score", "score"), ("probe/chair_i", "CHAIR_i"), ("probe/recall", "recall"))),
    ("Accuracy on held-out pairs", (("held_out/accuracies", "accuracy"),)),
    ("Learning rate", (("learning_rate", "learning rate"),)),
    ("Pairs per second", (("pairs_per_s", "pairs/s"),)),
)  # fmt: skip


def write_report(
    workdir: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    scores: Sequence[ScoreRow] = (),
    gallery: Sequence[GalleryItem] = (),
    skipped: Sequence[SkippedRow] = (),
    environment: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes `WORKDIR/report.html` and returns its path. Curves come from `WORKDIR/metrics.jsonl`.

    Args:
      workdir: the run's directory.
      title: the page's heading.
      config: the resolved config, as JSON-like values.
      scores: the before/after table, in order.
      gallery: examples, in order.
      skipped: the rows that were left out, each with its reason.
      environment: names and versions, see `environment.environment`.
      notes: sentences under the heading.
    """
    sections = [
        _section("Scores", _scores(scores)),
        _section("Curves", _curves(read_metrics(workdir))),
        _section("Examples", _gallery(gallery)),
        _section("Rows left out", _skipped(skipped)),
        _section("Settings", _config(config)),
        _section("Environment", _environment(environment or {})),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
        + "".join(sections)
        + "</main></body></html>\n"
    )
    path = Path(workdir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return path


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _scores(rows: Sequence[ScoreRow]) -> str:
    if not rows:
        return ""
    arrows = {"higher": "higher is better", "lower": "lower is better", "": ""}
    out = ['<div class="wide"><table class="scores"><thead><tr><th>Metric</th><th>Before</th><th>After</th><th>Change</th></tr></thead>']
    for group, members in groupby(rows, key=lambda row: row.group):
        out.append("<tbody>")
        if group:
            out.append(f'<tr class="group"><th colspan="4">{escape(group)}</th></tr>')
        for row in members:
            name, before, after, change = map(escape, score_cells(row))
            state = verdict(row)
            hint = f" <small>{arrows[row.better]}</small>" if row.better else ""
            word = f" <small>{state}</small>" if state in ("better", "worse") else ""
            out.append(f"<tr><th>{name}{hint}</th><td>{_interval(before)}</td><td>{_interval(after)}</td>")
            out.append(f'<td class="{state}">{change}{word}</td></tr>')
        out.append("</tbody>")
    legend = "In brackets: 95 % confidence intervals. " if any(_has_interval(row) for row in rows) else ""
    return "".join([*out, f"</table></div><p class=note>{legend}pp: percentage points.</p>"])


def _has_interval(row: ScoreRow) -> bool:
    return any(score is not None and score.low is not None for score in (row.before, row.after))


def _interval(cell: str) -> str:
    value, bracket, interval = cell.partition(" [")
    return f"<b>{value}</b> <span class=interval>[{interval}</span>" if bracket else f"<b>{value}</b>"


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    out = []
    for title, metrics in _CHARTS:
        series = []
        for key, name in metrics:
            here = [line for line in lines if key in line]
            series.append(svg.Series(name, tuple(line["step"] for line in here), tuple(line[key] for line in here)))
        if not any(value is not None for one in series for value in one.values):
            continue
        legend = "".join(f'<span class="key k{i}">{escape(one.name)}</span>' for i, one in enumerate(series)) if len(series) > 1 else ""
        missing = sum(value is None for one in series for value in one.values)
        warning = f'<p class="worse note">Not finite, and left out: {missing}.</p>' if missing else ""
        out.append(f"<figure><figcaption>{escape(title)}{legend}</figcaption>{svg.line_chart(series)}{warning}</figure>")
    return f'<div class="charts">{"".join(out)}</div>' if out else ""


def _gallery(items: Sequence[GalleryItem]) -> str:
    out = []
    for item in items:
        images = "".join(_image(image, item.id) for image in item.images)
        answers = [("Chosen", item.chosen), ("Rejected", item.rejected), ("Model before", item.before), ("Model after", item.after)]
        shown = "".join(f"<dt>{label}</dt><dd>{mark(answer)}</dd>" for label, answer in answers if answer is not None)
        out.append(
            f'<article><div class="images">{images}</div><div><p class="prompt">{escape(item.prompt)}</p>'
            f'<dl>{shown}</dl><p class="note">{escape(item.id)}</p></div></article>'
        )
    marked = any(a is not None and a.hallucinated for i in items for a in (i.chosen, i.rejected, i.before, i.after))
    note = "<p class=note><mark>Marked</mark> words name what the picture does not show.</p>" if marked else ""
    return f'{note}<div class="gallery">{"".join(out)}</div>' if out else ""


def mark(answer: Answer) -> str:
    """The answer as HTML, with `<mark>` around its hallucinated words: whole words, capitals aside."""
    words = sorted((word for word in answer.hallucinated if word), key=len, reverse=True)
    if not words:
        return escape(answer.text)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    pieces = pattern.split(answer.text)  # odd places hold the matches
    return "".join(f"<mark>{escape(piece)}</mark>" if i % 2 else escape(piece) for i, piece in enumerate(pieces))


def _image(image: np.ndarray, name: str) -> str:
    picture = Image.fromarray(np.asarray(image))
    if max(picture.size) > _MOST_PIXELS:
        picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    kind = ' class="tiny"' if max(picture.size) <= _TINY else ""
    return f'<img{kind} alt="image of {escape(name)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _skipped(rows: Sequence[SkippedRow]) -> str:
    if not rows:
        return "<p>None.</p>"
    cells = "".join(f"<tr><td>{escape(r.file)}</td><td>{escape(r.row)}</td><td>{escape(r.reason)}</td></tr>" for r in rows[:_MOST_SKIPPED])
    rest = f"<p class=note>The first {_MOST_SKIPPED} are listed.</p>" if len(rows) > _MOST_SKIPPED else ""
    head = "<thead><tr><th>File</th><th>Row</th><th>Why</th></tr></thead>"
    count = f"{len(rows)} row" + ("s" if len(rows) > 1 else "")
    table = f'<div class="wide"><table>{head}<tbody>{cells}</tbody></table></div>'
    return f"<p>{count}.</p><details><summary>List</summary>{table}{rest}</details>"


def _config(config: Mapping[str, Any]) -> str:
    text = escape(json.dumps(config, indent=2, default=str))
    return f"<details><summary>Resolved config</summary><pre>{text}</pre></details>"


def _environment(values: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in values.items())
    return f"<details><summary>Versions and devices</summary><table><tbody>{rows}</tbody></table></details>" if rows else ""
