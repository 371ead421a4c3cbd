"""The display: never wider than 80 columns, plain where there is no terminal, right about the time to go."""

import io
import itertools
import math
import re

import pytest

from launcher.show.display import MAX_COLUMNS, Display, compact, duration, heading, scientific, step_line, with_suffix
from tests.launcher.record.test_events import event

EXTREMES = (0.0, 1e-300, -1e300, 1e300, 0.00099999, 9.99999, -999.9999, 99999.9, 123456789.0, math.nan, math.inf)


@pytest.mark.parametrize("total", [1, 300, 14_800_000, 9_999_999_999])
def test_lines_fit_80_columns_for_any_value(total):
    assert len(heading(total)) <= MAX_COLUMNS
    for value, seconds in itertools.product(EXTREMES, (0, 59.9, 1e5, 1e12, math.nan)):
        item = event(
            total, loss=value, mtp_loss=value, lr=value, grad_norm=value, tokens_per_second=value,
            expert_load_max_over_mean=value,
        )  # fmt: skip
        line = step_line(item, total_steps=total, eta_seconds=seconds)
        assert len(line) == len(heading(total)), line
        assert " ".join(line.split()).count(" ") == 7 + line.count("d "), line  # no two figures run together


def test_a_line_reads_well():
    line = step_line(event(120, loss=4.312), total_steps=300, eta_seconds=130)
    assert heading(300).split() == ["step", "loss", "mtp", "lr", "grad", "load", "tok/s", "ETA"]
    assert line.split() == ["120/300", "4.312", "4.900", "2.80e-3", "0.830", "1.310", "8.41k", "2:10"]
    assert step_line(event(1, mtp_loss=None), total_steps=3, eta_seconds=0).split()[2] == "-"


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (compact, 10.31, "10.310"),
        (compact, 12345.6, "1.23e4"),
        (compact, 2e-5, "2.00e-5"),
        (scientific, 0.0, "0"),
        (scientific, 2.2e-4, "2.20e-4"),
        (with_suffix, 831, "831"),
        (with_suffix, 999.7, "1.00k"),
        (with_suffix, 12_345_678, "12.3M"),
        (duration, 7.4, "0:07"),
        (duration, 3730, "1:02:10"),
        (duration, 3 * 86400 + 4 * 3600, "3d 04h"),
        (duration, math.inf, "-"),
    ],
)
def test_figures(function, value, text):
    assert function(value) == text


def test_plain_output_has_no_escapes_and_repeats_its_heading():
    out = io.StringIO()
    with Display(out) as display:
        display.start(60, header=["expertpipe tiny [demo]"])
        for step in range(1, 41):
            display.step(event(step), tokens_left=1)
        display.note("checkpoint [bold]kept[/bold]")
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "expertpipe tiny [demo]"
    assert lines[-1] == "checkpoint [bold]kept[/bold]"
    assert sum("tok/s" in line for line in lines) == 2
    assert len(lines) == 1 + 2 + 40 + 1


def test_eta_is_by_the_running_median_deaf_to_a_slow_step():
    out = io.StringIO()
    with Display(out) as display:
        display.start(100, first_step=11)
        for step, speed in ((11, 10.0), (12, 1000.0), (13, 1000.0)):
            display.step(event(step, tokens_per_second=speed), tokens_left=87_000)
    assert out.getvalue().split()[-1] == "1:27"


def test_no_speed_is_no_eta():
    out = io.StringIO()
    with Display(out) as display:
        display.start(2)
        display.step(event(1, tokens_per_second=0.0), tokens_left=4096)
    assert out.getvalue().split()[-1] == "-"


def test_a_terminal_gets_a_bar_and_its_cursor_back(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    display = Display(out, live=True)
    display.start(300, first_step=120)
    display.step(event(120), tokens_left=4096)
    display.note("checkpoint")
    display.step(event(121, loss=math.nan), tokens_left=0)
    display.close()
    display.close()
    text = out.getvalue()
    assert "120/300" in text
    assert "121/300" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    plain = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)
    assert max(len(line) for line in re.split(r"[\r\n]", plain)) <= MAX_COLUMNS
