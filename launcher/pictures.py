"""Pictures of a run: its loss curve, and the timeline of a pipeline schedule as PNG or as text.

matplotlib is imported where it is needed and only through Figure objects: no window system, no global state.
Colours serve colour-blind readers and print: hue (blue, orange) is the direction, lightness the kind of work.
"""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.events import StepEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, MUTED, GRID = "#1f2430", "#667085", "#e4e7ec"
BLUE, ORANGE, GREEN = "#2f6fb0", "#d9730d", "#0f8f6f"
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
    direction: int = 0  # 0: enters at rank 0; 1: enters at the last rank
    partner_stage: int | None = None
    partner_microbatch: int | None = None
    partner_direction: int | None = None
    partner_kind: str = "B"


Rows = Sequence[Sequence[Span]]  # one list per rank


@dataclass(frozen=True)
class _Part:
    """A single-coloured part of a span: the whole, or the upper (forward) or lower (backward) half of a pair."""

    kind: str
    direction: int
    microbatch: int | None
    low: float = 0.0  # of the row's height
    high: float = 1.0


def _parts(span: Span) -> tuple[_Part, ...]:
    if span.kind != "FB":
        return (_Part(span.kind, span.direction, span.microbatch),)
    backward_direction = 1 - span.direction if span.partner_direction is None else span.partner_direction
    return (
        _Part("F", span.direction, span.microbatch, 0.5, 1.0),
        _Part(span.partner_kind, backward_direction, span.partner_microbatch, 0.0, 0.5),
    )


def _checked_end(rows: Rows) -> float:
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
) -> None:
    """Draw a pipeline schedule to a PNG: a row per rank, a box per action with its micro-batch, blanks where it idles.

    A README is about 1600 pixels wide: the default at 160 dots per inch. ValueError when there is nothing to draw.
    """
    end = _checked_end(rows)
    row_inches = min(0.34, max(0.16, 10.0 / len(rows)))
    top, bottom, left, right = (0.76 if subtitle else 0.52), 0.8, 0.66, 0.14
    height = row_inches * len(rows) + top + bottom
    figure = _figure(width_inches, height)
    axes = figure.add_axes(
        (left / width_inches, bottom / height, 1 - (left + right) / width_inches, 1 - (top + bottom) / height)
    )
    axes.set_xlim(0, end)
    axes.set_ylim(len(rows), 0)
    points_per_unit = (width_inches - left - right) * 72 / end
    _draw_boxes(axes, rows, points_per_unit=points_per_unit, row_points=row_inches * 72)
    _style_timeline_axes(axes, num_ranks=len(rows), time_label=time_label)
    figure.text(left / width_inches, 1 - 0.17 / height, title, fontsize=13, weight="bold", color=INK, va="top")
    if subtitle:
        figure.text(left / width_inches, 1 - 0.45 / height, subtitle, fontsize=9, color=MUTED, va="top")
    _draw_legend(figure, rows, left=left, width=width_inches, height=height)
    _save(figure, path)


def _draw_boxes(axes: "Axes", rows: Rows, *, points_per_unit: float, row_points: float) -> None:
    """All boxes as one collection (a schedule may have 100,000), and the numbers that fit into them."""
    from matplotlib.collections import PolyCollection

    margin = 0.06
    corners, fills = [], []
    median_points = statistics.median(span.end - span.start for row in rows for span in row) * points_per_unit
    edge_points = 0.6 if median_points > 4 else 0.15  # white edges must not eat thin boxes
    for rank, row in enumerate(rows):
        for span in row:
            for part in _parts(span):
                high = rank + 1 - margin - part.low * (1 - 2 * margin)  # the axis points downwards
                low = rank + 1 - margin - part.high * (1 - 2 * margin)
                corners.append([(span.start, low), (span.end, low), (span.end, high), (span.start, high)])
                fills.append(FILLS[part.direction][part.kind])
                _number(axes, part, span, (low + high) / 2, points_per_unit=points_per_unit, row_points=row_points)
    axes.add_collection(PolyCollection(corners, facecolors=fills, edgecolors="white", linewidths=edge_points))


def _number(axes: "Axes", part: _Part, span: Span, middle: float, *, points_per_unit: float, row_points: float) -> None:
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


def _style_timeline_axes(axes: "Axes", *, num_ranks: int, time_label: str) -> None:
    every = max(1, math.ceil(num_ranks / 32))
    ranks = range(0, num_ranks, every)
    axes.set_yticks([rank + 0.5 for rank in ranks], [f"rank {rank}" for rank in ranks], fontsize=8, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=MUTED, length=3)
    axes.set_xlabel(time_label, fontsize=8.5, color=MUTED, labelpad=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_facecolor("#f6f7f9")  # idle time shows as ground, not as a hole in the picture


def _draw_legend(figure: "Figure", rows: Rows, *, left: float, width: float, height: float) -> None:
    """One line below the time axis: each kind of work in the colours of both directions, then the directions."""
    from matplotlib.patches import Rectangle

    parts = [_parts(span) for row in rows for span in row]
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
        x += label("blue: from rank 0", weight="bold", colour=FILLS[0]["B"]) + 0.2
        label(f"orange: from rank {len(rows) - 1}", weight="bold", colour=FILLS[1]["B"])


def timeline_text(rows: Rows, *, width: int = 80, colour: bool = False) -> str:
    """Draw a pipeline schedule in `width` columns (at least 40): a line per rank, a letter and number per action.

    Capitals F B I W are direction 0, small letters direction 1, a pair is both letters, a dot is idle. Where a column
    is longer than an action some actions are not seen. `colour` adds ANSI colours, which take no columns.
    """
    if width < 40:
        raise ValueError(f"width={width} must be at least 40")
    end = _checked_end(rows)
    prefix = len(f"rank {len(rows) - 1} ")
    columns = width - prefix
    boxes = [_text_boxes(row, columns=columns, end=end) for row in rows]
    sizes = [(part, size) for row in boxes for span, num in row if span for part, size in _shares(span, num)]
    # numbers in some boxes only would read as noise, so they are for all or for none (a rounding down apart)
    numbered = sum(len(_label(part)) <= size for part, size in sizes) >= 0.9 * len(sizes)
    lines = [
        f"rank {rank}".ljust(prefix)
        + "".join(_text_box(span, num, numbered=numbered, colour=colour) for span, num in row)
        for rank, row in enumerate(boxes)
    ]
    last = f"{end:.4g}"
    lines.append(" " * prefix + "0" + last.rjust(columns - 1))
    shown = {(part.direction, part.kind) for row in rows for span in row for part in _parts(span)}
    kinds = [kind for kind in ("F", "B", "I", "W") if any(shown_kind == kind for _, shown_kind in shown)]
    lines += textwrap.wrap("  ".join([f"{kind} {KIND_NAMES[kind]}" for kind in kinds] + [". idle"]), width)
    if any(direction == 1 for direction, _ in shown):
        lines += textwrap.wrap("CAPITALS enter at rank 0, small letters at the last rank", width)
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


def _shares(span: Span, columns: int) -> list[tuple[_Part, int]]:
    """The columns of each part of a span; of a single column the forward of a pair takes all."""
    parts = _parts(span)
    if len(parts) == 1:
        return [(parts[0], columns)]
    return [(parts[0], (columns + 1) // 2), (parts[1], columns // 2)]


def _label(part: _Part) -> str:
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


def loss_curve(
    events: Sequence[StepEvent],
    path: Path | str,
    *,
    unigram_nats: float,
    heldout_nats: float | None = None,
    title: str = "Training loss",
) -> None:
    """Draw the course of a run over tokens to a PNG: losses, learning rate and gradient norm, balance of the experts.

    `unigram_nats` is the entropy of the text's single tokens, what a model without context could reach;
    `heldout_nats` the final loss on held-out text; both in nats per token. ValueError without events.
    """
    if not events:
        raise ValueError("a loss curve needs at least one step")
    figure = _figure(10.0, 6.4)
    loss_axes, rate_axes, load_axes = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": (3.4, 1, 1), "hspace": 0.16}
    )
    figure.subplots_adjust(left=0.075, right=0.925, top=0.9, bottom=0.085)
    tokens = [event.tokens for event in events]
    _draw_losses(loss_axes, events, tokens, unigram_nats=unigram_nats, heldout_nats=heldout_nats)
    _draw_rates(rate_axes, events, tokens)
    _draw_load(load_axes, events, tokens)
    load_axes.set_xlabel("tokens", fontsize=9, color=MUTED)
    load_axes.xaxis.set_major_formatter(_engineering)
    load_axes.set_xlim(0, max(tokens) * 1.01 or 1)
    figure.text(0.075, 0.955, title, fontsize=14, weight="bold", color=INK, va="center")
    _save(figure, path)


def _draw_losses(
    axes: "Axes", events: Sequence[StepEvent], tokens: list[int], *, unigram_nats: float, heldout_nats: float | None
) -> None:
    losses = [event.loss for event in events]
    mtp = [math.nan if event.mtp_loss is None else event.mtp_loss for event in events]
    for values, colour, name in ((losses, BLUE, "loss"), (mtp, ORANGE, "multi-token prediction loss")):
        if any(math.isfinite(value) for value in values):
            axes.plot(tokens, values, color=colour, alpha=0.3, linewidth=1.0)
            axes.plot(tokens, _smooth(values), color=colour, linewidth=2.0, label=name, marker=_marker(events))
    axes.axhline(unigram_nats, color=INK, linewidth=1.1, dashes=(5, 3), label=f"unigram entropy {unigram_nats:.3f}")
    if heldout_nats is not None:
        name = f"held-out loss at the end {heldout_nats:.3f}"
        axes.plot(tokens[-1], heldout_nats, "D", color=GREEN, markersize=7, label=name, clip_on=False, zorder=5)
    _style_panel(axes, "nats per token")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def _draw_rates(axes: "Axes", events: Sequence[StepEvent], tokens: list[int]) -> None:
    axes.plot(tokens, [event.lr for event in events], color=BLUE, linewidth=1.6, marker=_marker(events))
    _style_panel(axes, "learning rate", colour=BLUE)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    axes.yaxis.get_offset_text().set(fontsize=8, color=BLUE)
    axes.set_ylim(bottom=0)
    norm_axes = axes.twinx()
    norm_axes.plot(tokens, [event.grad_norm for event in events], color=ORANGE, linewidth=1.0, marker=_marker(events))
    _style_panel(norm_axes, "gradient norm", colour=ORANGE, grid=False)
    norm_axes.set_ylim(bottom=0)


def _draw_load(axes: "Axes", events: Sequence[StepEvent], tokens: list[int]) -> None:
    worst = [event.expert_load_max_over_mean for event in events]
    num_layers = min(len(event.expert_load) for event in events)
    for layer in range(num_layers):
        axes.plot(tokens, [event.expert_load[layer] for event in events], color=GREEN, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, worst, color=GREEN, linewidth=1.6, marker=_marker(events))
    axes.axhline(1.0, color=MUTED, linewidth=0.8, dashes=(2, 2))
    _style_panel(axes, "expert load\nmax / mean", colour=GREEN)


def _marker(events: Sequence[StepEvent]) -> str:
    return "o" if len(events) == 1 else ""  # a line through one point would not be seen


def _smooth(values: Sequence[float]) -> list[float]:
    """A centred mean over about a fortieth of the curve; gaps where a value is not finite stay out of it."""
    reach = len(values) // 80
    smooth = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)  # symmetric, so that the ends are not pulled inwards
        window = [value for value in values[index - near : index + near + 1] if math.isfinite(value)]
        smooth.append(sum(window) / len(window) if window else math.nan)
    return smooth


def _engineering(value: float, _: int) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _style_panel(axes: "Axes", name: str, *, colour: str = INK, grid: bool = True) -> None:
    axes.set_ylabel(name, fontsize=9, color=colour)
    axes.tick_params(axis="both", labelsize=8.5, colors=MUTED, length=0)
    if grid:
        axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # draws into memory whatever backend the environment asks for
    return figure


def _save(figure: "Figure", path: Path | str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
