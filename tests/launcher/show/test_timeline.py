"""Schedules in time: PNGs of a sane size with ink on them, text within its columns, refusals that name the span."""

import math
import re
import struct
from pathlib import Path

import pytest

from launcher.show.timeline import Span, Ways, timeline, timeline_text

PAIRED = [
    [Span(0, 1, "F", 0, 0), Span(1, 2, "F", 0, 1, 1), Span(2, 5, "FB", 0, 1, 0, 1, 0, 1), Span(5, 7, "B", 0, 1)],
    [Span(1, 2, "F", 1, 0), Span(2, 3, "I", 1, 0, 1), Span(3, 4, "W", 1, 0, 1), Span(6, 7, "W", 1, 0)],
]


def png_size(path) -> tuple[int, int]:
    data = Path(path).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 5000
    return struct.unpack(">II", data[16:24])


def one_f_one_b(num_ranks: int, num_microbatches: int) -> list[list[Span]]:
    rows: list[list[Span]] = [[] for _ in range(num_ranks)]
    for rank in range(num_ranks):
        for m in range(num_microbatches):
            start = rank + 3 * m
            rows[rank] += [Span(start, start + 1, "F", rank, m), Span(start + 1, start + 3, "B", rank, m)]
    return rows


@pytest.mark.parametrize(
    "rows", [PAIRED, one_f_one_b(8, 20), [[Span(0, 0, "F", 0, 0)], []]], ids=["pair", "8", "empty"]
)
def test_timeline_png(tmp_path, rows):
    timeline(rows, tmp_path / "new" / "t.png", title="DualPipe", subtitle="two ranks", time_label="time (ms)")
    width, height = png_size(tmp_path / "new" / "t.png")
    assert width == 1600
    assert 200 < height < 800


def test_a_large_timeline_stays_a_picture(tmp_path):
    timeline(one_f_one_b(64, 64), tmp_path / "t.png", title="64 ranks")
    assert png_size(tmp_path / "t.png")[1] < 2500


def test_the_legend_stays_inside_the_picture(tmp_path, monkeypatch):
    """The widest legend there is, with a three-digit rank; nothing may be cut at the right edge."""
    import launcher.show.timeline as module

    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    everything = [*PAIRED[0], Span(7, 8, "I", 0, 0), Span(8, 9, "W", 0, 0)]
    timeline(
        [everything, *PAIRED[1:]] * 100,
        tmp_path / "t.png",
        title="wide",
        labels=[f"{rank} plan" for rank in range(200)],
        ways=Ways("first stage", "second stage"),
    )
    (figure,) = figures
    width = figure.get_figwidth() * figure.dpi
    assert figure.texts
    assert max(text.get_window_extent().x1 for text in figure.texts) < width


def test_timeline_text():
    assert timeline_text(PAIRED, width=49).splitlines() == [
        "rank 0 F0----f1----F1-------b0-------B1----------",
        "rank 1 ......F0----i0----w0----............W0----",
        "       0                                        7",
        "F forward  B backward  I input gradient  W weight",
        "gradient  - goes on  . idle",
        "CAPITALS enter at rank 0, small letters at the",
        "last rank",
    ]
    named = timeline_text(PAIRED, width=49, labels=["0 plan", "0 run"], ways=Ways("here", "there")).splitlines()
    assert [line[:7] for line in named[:2]] == ["0 plan ", "0 run  "]
    assert named[-1] == "CAPITALS here, small letters there"


@pytest.mark.parametrize("shape", [(1, 1), (4, 10), (8, 20), (64, 256)])
def test_text_fits_its_columns(shape):
    rows = one_f_one_b(*shape)
    plain = timeline_text(rows)
    assert max(map(len, plain.splitlines())) <= 80
    assert len(plain.splitlines()) == shape[0] + 2
    assert re.sub(r"\x1b\[[0-9;]*m", "", timeline_text(rows, colour=True)) == plain


@pytest.mark.parametrize(
    "span",
    [
        Span(0, 1, "X", 0, 0),
        Span(2, 1, "F", 0, 0),
        Span(-1, 1, "F", 0, 0),
        Span(0, math.nan, "F", 0, 0),
        Span(0, 1, "F", 0, 0, direction=2),
    ],
)
def test_impossible_spans_are_named(tmp_path, span):
    for draw in (timeline_text, lambda rows: timeline(rows, tmp_path / "t.png", title="")):
        with pytest.raises(ValueError, match=r"rank 1: Span\("):
            draw([[], [span]])
        with pytest.raises(ValueError, match="at least one span"):
            draw([[], []])
    with pytest.raises(ValueError, match="at least 40"):
        timeline_text(PAIRED, width=20)
