import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from mmalign_jax.report.svg import HEIGHT, WIDTH, Series, line_chart, nice_ticks


def drawn(svg: str) -> list[list[tuple[float, float]]]:
    ElementTree.fromstring(svg)  # well-formed
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in re.findall(r'polyline points="([^"]*)"', svg)]


def test_lines_are_where_the_values_are():
    (line,) = drawn(line_chart([Series("loss", (0, 50, 100), (0.0, 1.0, 0.5))]))
    xs, ys = zip(*line, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1]) and 0 < xs[0] < xs[2] < WIDTH
    assert ys[0] > ys[2] > ys[1] and (ys[0] + ys[1]) / 2 == pytest.approx(ys[2], abs=0.1)
    assert all(0 < y < HEIGHT for y in ys)


def test_missing_values_leave_gaps_and_lone_points_are_dots():
    svg = line_chart([Series("a", (1, 2, 3, 4, 5, 6), (1.0, 2.0, None, 3.0, math.nan, 4.0))])
    assert [len(line) for line in drawn(svg)] == [2] and svg.count("<circle") == 2


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-7])
def test_one_point_and_flat_lines(value):
    assert "<circle" in line_chart([Series("a", (10,), (value,))])
    (line,) = drawn(line_chart([Series("a", (10, 20), (value, value))]))
    assert line[0][1] == line[1][1] and 0 < line[0][1] < HEIGHT


def test_long_runs_are_averaged_and_say_so():
    svg = line_chart([Series("a", tuple(range(10_000)), tuple(float(i % 2) for i in range(10_000)))])
    (line,) = drawn(svg)
    assert len(line) == 400 and "a (means of 25 logged steps)" in svg


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one finite value"):
        line_chart([Series("a", (1,), (None,))])


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-80.0, -41.0), (0.0, 1e-6), (117.2, 122.9), (-1e5, 3e6), (0.4999, 0.5001)])
def test_ticks_are_round_few_and_enclose(bounds):
    ticks = nice_ticks(*bounds)
    assert ticks[0] <= bounds[0] and ticks[-1] >= bounds[1] and 3 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-6


@pytest.mark.parametrize("bounds", [(0.4999, 0.5001), (117.2, 122.9), (0.0, 2.2), (-1e5, 3e6), (0.0, 1e-6)])
def test_tick_labels_are_the_ticks(bounds):
    svg = line_chart([Series("a", (0, 1), bounds)])
    labels = re.findall(r'<line[^>]*/><text[^>]*text-anchor="end">([^<]*)</text>', svg)
    assert [float(label) for label in labels] == pytest.approx(nice_ticks(*bounds), rel=1e-6, abs=1e-12)


def test_names_are_escaped():
    assert "<b>" not in line_chart([Series("<b>", (1,), (1.0,))])
