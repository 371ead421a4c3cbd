"""A pipeline schedule in time, planned or measured: as PNG and as text.

Colours serve colour-blind readers and print: hue (blue, orange) is the way that a micro-batch goes, lightness the kind
of work.
"""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.show.pictures import GRID, INK, MUTED, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "FB": "overlapped pair"}
# [direction][kind]: fill; text on the dark ones is white
FILLS = (
    {"F": "#a9cdf0", "B": "#1d5c9e", "I": "#4f93d2", "W": "#e3effa"},
    {"F": "#fdc98f", "B": "#b4520a", "I": "#ee8a35", "W": "#fdeedd"},
)
ANSI = (  # the same in the 256 colours of a terminal: background, foreground
    {"F": (153, 16), "B": (25, 231), "I": (68, 231), "W": (189, 16)},
    {"F": (222, 16), "B": (130, 231), "I": (208, 16), "W": (230, 16)},
)


@dataclass(frozen=True)
class Span:
    """One action of one rank in time; start and end in any one unit.

    Kinds: "F" forward, "B" whole backward, "I" input gradient, "W" weight gradient, "FB" a forward overlapped with a
    backward: then stage, microbatch and direction are the forward's and partner_* the backward's (kind B or I; None:
    not shown, and the direction is the opposite one).
    """

    start: float
    end: float
    kind: str
    stage: int
    microbatch: int
    direction: int = 0  # which of two ways the micro-batch goes, see `Ways`
    partner_stage: int | None = None
    partner_microbatch: int | None = None
    partner_direction: int | None = None
    partner_kind: str = "B"


Rows = Sequence[Sequence[Span]]  # one list per rank


@dataclass(frozen=True)
class Ways:
    """What the two hues mean, in the words of the legend; None for `second`: the end opposite to rank 0."""

    first: str = "from rank 0"
    second: str | None = None

    def names(self, num_rows: int) -> tuple[str, str]:
        """Both, for a picture of so many ranks."""
        return self.first, f"from rank {num_rows - 1}" if self.second is None else self.second


@dataclass(frozen=True)
class Part:
    """A single-coloured part of a span: the whole, or the upper (forward) or lower (backward) half of a pair."""

    kind: str
    direction: int
    microbatch: int | None
    low: float = 0.0  # of the row's height
    high: float = 1.0


def span_parts(span: Span) -> tuple[Part, ...]:
    """The span, or the forward above and the backward below of a pair."""
    if span.kind != "FB":
        return (Part(span.kind, span.direction, span.microbatch),)
    backward_direction = 1 - span.direction if span.partner_direction is None else span.partner_direction
    return (
        Part("F", span.direction, span.microbatch, 0.5, 1.0),
        Part(span.partner_kind, backward_direction, span.partner_microbatch, 0.0, 0.5),
    )


def checked_end(rows: Rows) -> float:
    """The last end of all spans; ValueError for spans that cannot be drawn."""
    spans = [(rank, span) for rank, row in enumerate(rows) for span in row]
    if not spans:
        raise ValueError("a timeline needs at least one span")
    for rank, span in spans:
        known = span.kind in KIND_NAMES and span.partner_kind in ("B", "I")
        if not known or span.direction not in (0, 1) or span.partner_direction not in (None, 0, 1):
            raise ValueError(f"rank {rank}: {span}: kind must be one of {', '.join(KIND_NAMES)}, direction 0 or 1")
        if not (math.isfinite(span.start) and math.isfinite(span.end) and 0 <= span.start <= span.end):
            raise ValueError(f"rank {rank}: {span}: needs 0 <= start <= end, both finite")
    return max(span.end for _, span in spans) or 1.0


def timeline(
    rows: Rows,
    path: Path | str,
    *,
    title: str,
    subtitle: str = "",
    time_label: str = "time",
    width_inches: float = 10.0,
    labels: Sequence[str] | None = None,
    ways: Ways | None = None,
) -> None:
    """Draw a pipeline schedule to a PNG: a row per rank, a box per action with its micro-batch, blanks where it idles.

    labels: of the rows, `rank 0` and so on where None.
    A README is about 1600 pixels wide: the default at 160 dots per inch. ValueError when there is nothing to draw.
    """
    end = checked_end(rows)
    row_inches = min(0.34, max(0.16, 10.0 / len(rows)))
    labels = labels or [f"rank {rank}" for rank in range(len(rows))]
    top, bottom, right = (0.76 if subtitle else 0.52), 0.8, 0.14
    left = 0.66 + max(0, max(map(len, labels)) - 7) * 0.06
    height = row_inches * len(rows) + top + bottom
    figure = new_figure(width_inches, height)
    axes = figure.add_axes(
        (left / width_inches, bottom / height, 1 - (left + right) / width_inches, 1 - (top + bottom) / height)
    )
    axes.set_xlim(0, end)
    axes.set_ylim(len(rows), 0)
    points_per_unit = (width_inches - left - right) * 72 / end
    _draw_boxes(axes, rows, points_per_unit=points_per_unit, row_points=row_inches * 72)
    _style_timeline_axes(axes, labels=labels, time_label=time_label)
    figure.text(left / width_inches, 1 - 0.17 / height, title, fontsize=13, weight="bold", color=INK, va="top")
    if subtitle:
        figure.text(left / width_inches, 1 - 0.45 / height, subtitle, fontsize=9, color=MUTED, va="top")
    _draw_legend(figure, rows, (ways or Ways()).names(len(rows)), left=left, width=width_inches, height=height)
    save_figure(figure, path)


def _draw_boxes(axes: "Axes", rows: Rows, *, points_per_unit: float, row_points: float) -> None:
    """All boxes as one collection (a schedule may have 100,000), and the numbers that fit into them."""
    from matplotlib.collections import PolyCollection

    margin = 0.06
    corners, fills = [], []
    median_points = statistics.median(span.end - span.start for row in rows for span in row) * points_per_unit
    edge_points = 0.6 if median_points > 4 else 0.15  # white edges must not eat thin boxes
    for rank, row in enumerate(rows):
        for span in row:
            for part in span_parts(span):
                high = rank + 1 - margin - part.low * (1 - 2 * margin)  # the axis points downwards
                low = rank + 1 - margin - part.high * (1 - 2 * margin)
                corners.append([(span.start, low), (span.end, low), (span.end, high), (span.start, high)])
                fills.append(FILLS[part.direction][part.kind])
                _number(axes, part, span, (low + high) / 2, points_per_unit=points_per_unit, row_points=row_points)
    axes.add_collection(PolyCollection(corners, facecolors=fills, edgecolors="white", linewidths=edge_points))


def _number(axes: "Axes", part: Part, span: Span, middle: float, *, points_per_unit: float, row_points: float) -> None:
    if part.microbatch is None:
        return
    text = str(part.microbatch)
    room = (span.end - span.start) * points_per_unit - 1.5
    size = min(8.0, row_points * (part.high - part.low) * 0.62, room / (0.7 * len(text)))
    if size < 4.2:
        return
    white = part.kind == "B" or (part.kind == "I" and part.direction == 0)  # too faint on the middle orange
    colour = "white" if white else INK
    axes.text((span.start + span.end) / 2, middle, text, fontsize=size, color=colour, ha="center", va="center_baseline")


def _style_timeline_axes(axes: "Axes", *, labels: Sequence[str], time_label: str) -> None:
    every = max(1, math.ceil(len(labels) / 32))
    rows = range(0, len(labels), every)
    axes.set_yticks([row + 0.5 for row in rows], [labels[row] for row in rows], fontsize=8, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=MUTED, length=3)
    axes.set_xlabel(time_label, fontsize=8.5, color=MUTED, labelpad=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_facecolor("#f6f7f9")  # idle time shows as ground, not as a hole in the picture


def _draw_legend(
    figure: "Figure", rows: Rows, ways: tuple[str, str], *, left: float, width: float, height: float
) -> None:
    """One line below the time axis: each kind of work in the colours of both directions, then the directions."""
    from matplotlib.patches import Rectangle

    parts = [span_parts(span) for row in rows for span in row]
    shown = {(part.direction, part.kind) for pair in parts for part in pair}
    directions = [direction for direction in (0, 1) if any(seen == direction for seen, _ in shown)]
    line, size, x = 0.17, 0.13, left  # inches

    def swatch(colour: str, low: float = 0.0, high: float = 1.0) -> None:
        corner = (x / width, (line + (low - 0.5) * size) / height)
        box = Rectangle(corner, 0.18 / width, (high - low) * size / height, transform=figure.transFigure)
        box.set(facecolor=colour, edgecolor="#98a2b3", linewidth=0.3)
        figure.add_artist(box)

    def label(text: str, *, weight: str = "normal", colour: str = MUTED) -> float:
        artist = figure.text(x / width, line / height, text, fontsize=8, color=colour, weight=weight)
        artist.set_verticalalignment("center_baseline")
        return artist.get_window_extent().width / figure.dpi

    for kind in ("F", "B", "I", "W"):
        if not any((direction, kind) in shown for direction in directions):
            continue
        for direction in directions:
            swatch(FILLS[direction][kind])
            x += 0.2
        x += 0.05
        x += label(KIND_NAMES[kind]) + 0.17
    pair = next((pair for pair in parts if len(pair) == 2), ())
    for part in pair:
        swatch(FILLS[part.direction][part.kind], part.low, part.high)
    if pair:
        x += 0.25
        x += label(KIND_NAMES["FB"]) + 0.2
    if len(directions) > 1:
        x += label(f"blue: {ways[0]}", weight="bold", colour=FILLS[0]["B"]) + 0.2
        label(f"orange: {ways[1]}", weight="bold", colour=FILLS[1]["B"])


def timeline_text(
    rows: Rows,
    *,
    width: int = 80,
    colour: bool = False,
    labels: Sequence[str] | None = None,
    ways: Ways | None = None,
) -> str:
    """Draw a pipeline schedule in `width` columns (at least 40): a line per rank, a letter and number per action.

    Capitals F B I W are direction 0, small letters direction 1, a pair is both letters, a dot is idle. Where a column
    is longer than an action some actions are not seen. `colour` adds ANSI colours, which take no columns.
    """
    if width < 40:
        raise ValueError(f"width={width} must be at least 40")
    end = checked_end(rows)
    labels = labels or [f"rank {rank}" for rank in range(len(rows))]
    prefix = max(map(len, labels)) + 1
    columns = width - prefix
    boxes = [_text_boxes(row, columns=columns, end=end) for row in rows]
    sizes = [(part, size) for row in boxes for span, num in row if span for part, size in _shares(span, num)]
    # numbers in some boxes only would read as noise, so they are for all or for none (a rounding down apart)
    numbered = sum(len(_label(part)) <= size for part, size in sizes) >= 0.9 * len(sizes)
    lines = [
        labels[rank].ljust(prefix)
        + "".join(_text_box(span, num, numbered=numbered, colour=colour) for span, num in row)
        for rank, row in enumerate(boxes)
    ]
    last = f"{end:.4g}"
    lines.append(" " * prefix + "0" + last.rjust(columns - 1))
    shown = {(part.direction, part.kind) for row in rows for span in row for part in span_parts(span)}
    kinds = [kind for kind in ("F", "B", "I", "W") if any(shown_kind == kind for _, shown_kind in shown)]
    lines += textwrap.wrap("  ".join([f"{kind} {KIND_NAMES[kind]}" for kind in kinds] + ["- goes on", ". idle"]), width)
    if any(direction == 1 for direction, _ in shown):
        first, second = (ways.first, ways.second) if ways else ("enter at rank 0", None)
        lines += textwrap.wrap(f"CAPITALS {first}, small letters {second or 'at the last rank'}", width)
    return "\n".join(lines)


def _text_boxes(row: Sequence[Span], *, columns: int, end: float) -> list[tuple[Span | None, int]]:
    """One rank's line as (what runs, number of columns): a column shows what runs at its middle, None is idle."""
    ordered, position = sorted(row, key=lambda span: span.start), 0
    boxes: list[tuple[Span | None, int]] = []
    for column in range(columns):
        middle = (column + 0.5) * end / columns
        while position < len(ordered) and ordered[position].end <= middle:
            position += 1
        running = ordered[position] if position < len(ordered) and ordered[position].start <= middle else None
        if boxes and boxes[-1][0] is running:
            boxes[-1] = (running, boxes[-1][1] + 1)
        else:
            boxes.append((running, 1))
    return boxes


def _shares(span: Span, columns: int) -> list[tuple[Part, int]]:
    """The columns of each part of a span; of a single column the forward of a pair takes all."""
    parts = span_parts(span)
    if len(parts) == 1:
        return [(parts[0], columns)]
    return [(parts[0], (columns + 1) // 2), (parts[1], columns // 2)]


def _label(part: Part) -> str:
    letter = part.kind if part.direction == 0 else part.kind.lower()
    return letter if part.microbatch is None else f"{letter}{part.microbatch}"


def _text_box(span: Span | None, columns: int, *, numbered: bool, colour: bool) -> str:
    if span is None:
        return "." * columns
    text = ""
    for part, share in _shares(span, columns):
        label = _label(part)
        box = (label if numbered and len(label) <= share else label[0]).ljust(share, "-")[:share]
        if colour and box:
            background, foreground = ANSI[part.direction][part.kind]
            box = f"\x1b[48;5;{background};38;5;{foreground}m{box}\x1b[0m"
        text += box
    return text
