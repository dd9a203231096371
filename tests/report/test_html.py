import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from mmalign_jax.config import Config, to_mapping
from mmalign_jax.report.environment import environment
from mmalign_jax.report.html import mark, write_report
from mmalign_jax.report.metrics import MetricsWriter
from mmalign_jax.report.records import Answer, GalleryItem, Score, ScoreRow, SkippedRow, score_cells, verdict

EVIL = "<script>alert('x')</script> & \"quoted\""
_VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def full(tmp_path, text="harmless"):
    rng = np.random.default_rng(0)
    with MetricsWriter(tmp_path, False, "", {}) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1 / step, "rewards/chosen": 0.1, "rewards/rejected": -0.1 * step, "pairs_per_s": float("nan")})
    item = GalleryItem(
        id=text, images=(rng.integers(0, 255, (56, 56, 3), np.uint8), rng.integers(0, 255, (900, 600, 3), np.uint8)), prompt=text,
        chosen=Answer(text), rejected=Answer(f"a dog. {text}", ("dog",)), before=Answer(text), after=Answer(text),
    )  # fmt: skip
    return write_report(
        tmp_path, title=text, config=to_mapping(Config()) | {"extra": text}, notes=[text], gallery=[item],
        scores=[ScoreRow(text, Score(0.137, 0.12, 0.15), Score(0.06, 0.05, 0.07), "lower", group=text)],
        skipped=[SkippedRow(text, text, text)], environment=environment() | {text: text},
    )  # fmt: skip


def test_one_file_without_network_or_script(tmp_path):
    page = full(tmp_path).read_text()
    parsed = Page(page)
    assert {"table", "svg", "img", "details", "pre"} <= set(parsed.tags) and not {"script", "link", "iframe"} & set(parsed.tags)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert page.count("<svg") == 2  # loss, rewards; a metric without a finite value has no chart
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size for source in parsed.sources]
    assert sizes == [(56, 56), (256, 384)]


def test_every_text_is_escaped(tmp_path):
    page = full(tmp_path, EVIL).read_text()
    assert "script" not in Page(page).tags and "<script" not in page
    assert page.count("&lt;script&gt;alert(") >= 14
    assert "a <mark>dog</mark>. &lt;script&gt;" in page


def test_an_empty_run_still_has_a_report(tmp_path):
    page = write_report(tmp_path, title="nothing", config={}).read_text()
    Page(page)
    assert "<h2>Curves" not in page and "<h2>Examples" not in page and "<p>None.</p>" in page


def test_the_score_table_says_value_interval_and_direction(tmp_path):
    row = ScoreRow("CHAIR_i", Score(0.137, 0.12, 0.155), Score(0.061, 0.05, 0.072), "lower")
    assert score_cells(row) == ("CHAIR_i", "13.7% [12.0, 15.5]", "6.1% [5.0, 7.2]", "-7.6 pp")
    assert verdict(row) == "better"
    assert verdict(ScoreRow("recall", Score(0.95), Score(0.94), "higher")) == "worse"
    assert verdict(ScoreRow("recall", Score(0.95), Score(0.9501), "higher")) == "same"
    assert verdict(ScoreRow("length", Score(20.0), Score(25.0))) == ""
    assert score_cells(ScoreRow("length", Score(20.25, 19.0, 21.0), None, percent=False)) == ("length", "20.2 [19.0, 21.0]", "-", "-")
    page = write_report(tmp_path, title="t", config={}, scores=[row]).read_text()
    assert '<td class="better">-7.6 pp <small>better</small></td>' in page and "[12.0, 15.5]" in page


def test_only_whole_words_are_marked():
    answer = Answer("A Dog, a dogma & a hot dog. Two dogs.", ("dog", "hot dog"))
    assert mark(answer) == "A <mark>Dog</mark>, a dogma &amp; a <mark>hot dog</mark>. Two dogs."
    assert mark(Answer("<b> & co", ("&",))) == "&lt;b&gt; <mark>&amp;</mark> co"


def test_long_lists_are_cut_by_name(tmp_path):
    rows = [SkippedRow("f", str(number), "too long") for number in range(600)]
    page = write_report(tmp_path, title="t", config={}, skipped=rows).read_text()
    assert "<p>600 rows.</p>" in page and "The first 500 are listed." in page and page.count("too long") == 500
