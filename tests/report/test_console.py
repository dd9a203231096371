import io

import pytest

from mmalign_jax.report.console import Console, duration, format_table


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def console(**options):
    stream, clock = io.StringIO(), Clock()
    return Console(stream, clock=clock, **options), stream, clock


METRICS = {"loss": 0.51234, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "pairs_per_s": 12.0}


def test_plain_lines_come_at_intervals_and_at_the_end():
    voice, stream, clock = console(every_s=10.0)
    for step in range(1, 101):
        clock.now += 1.0
        voice.status(step, 100, METRICS)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 0.5123  margin +0.250  accuracy 75%  pairs/s 12"
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in [*range(1, 100, 10), 100]]
    assert lines[1].endswith("ETA 1 min 29 s")  # 89 steps at one a second
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_the_first_slow_step_does_not_spoil_the_eta():
    voice, stream, clock = console(every_s=0.0)
    for step, now in ((1, 100.0), (2, 101.0), (3, 102.0)):
        clock.now = now
        voice.status(step, 13, {})
    assert stream.getvalue().splitlines()[-1].endswith("ETA 10.0 s")


def test_live_line_is_redrawn_fits_and_gives_way(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    voice, stream, clock = console(live=True)
    voice.status(1, 3, METRICS)
    clock.now = 0.1
    voice.status(2, 3, METRICS)  # too soon to be seen
    voice.line("a message")
    clock.now = 1.0
    voice.status(3, 3, METRICS)
    out = stream.getvalue()
    assert out == "\rstep 1/3  loss 0.5123  margin\x1b[K\r\x1b[Ka message\n\rstep 3/3  loss 0.5123  margin\x1b[K\n"


def test_phases_say_how_long_they_took():
    voice, stream, clock = console(every_s=10.0)
    with voice.phase("Importing records") as progress:
        for done in range(1, 31):
            clock.now += 1.0
            progress(done, 30)
    with pytest.raises(KeyError), voice.phase("Making pairs"):
        clock.now += 65
        raise KeyError("x")
    assert stream.getvalue().splitlines() == [
        "Importing records ...", "Importing records: 1/30", "Importing records: 11/30", "Importing records: 21/30",
        "Importing records: done in 30.0 s", "Making pairs ...", "Making pairs: stopped after 1 min 05 s",
    ]  # fmt: skip


def test_other_processes_are_silent():
    voice, stream, _ = console(enabled=False, live=True)
    with voice.phase("Importing records") as progress:
        progress(1, 2)
    voice.status(1, 1, METRICS)
    voice.table([["a"]], ["b"])
    voice.close()
    assert stream.getvalue() == ""


def test_table():
    text = format_table([["CHAIR_i", "13.7%"], ["recall", "9%"]], ["metric", "before"])
    assert text.splitlines() == ["metric   before", "-------  ------", "CHAIR_i   13.7%", "recall       9%"]
    assert format_table([], ["a"]) == "a\n-"
    with pytest.raises(ValueError, match="does not have the 2 cells"):
        format_table([["a"]], ["b", "c"])


def test_duration():
    assert [duration(s) for s in (0.04, 59.9, 60, 3599.7, 7620)] == ["0.0 s", "59.9 s", "1 min 00 s", "1 h 00 min", "2 h 07 min"]
