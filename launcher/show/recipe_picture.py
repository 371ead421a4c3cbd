"""The schedules of a run and of those that follow it over tokens: a column for each run, a row for each value."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.recipe import Phase, Values, values_at
from launcher.show.pictures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 600  # of a curve
ZOOM = 0.1  # a beginning that changes within this share of its run is drawn again on its own


@dataclass(frozen=True)
class Row:
    """One value: name with unit, colour, how to read it, and whether its axis is in powers of two."""

    name: str
    colour: str
    value: Callable[[Values], float]
    powers: bool = False


ROWS = (
    Row("learning rate\n[1e-4]", BLUE, lambda values: 1e4 * values.lr),
    Row("batch\n[sequences]", ORANGE, lambda values: values.batch),
    Row("sequence\n[tokens]", GREEN, lambda values: values.sequence_length, powers=True),
    Row("MTP weight", BLUE, lambda values: values.mtp_lambda),
    Row("bias speed\n[1e-3]", ORANGE, lambda values: 1e3 * values.bias_update_speed),
    Row("FIM rate", GREEN, lambda values: float("nan") if values.fim_rate is None else values.fim_rate),
)


@dataclass(frozen=True)
class Column:
    """A stretch of tokens of one phase; share of the picture's width."""

    phase: Phase
    end: int
    title: str
    width: float

    @property
    def is_whole(self) -> bool:
        """Whether it is the phase and not its beginning drawn again."""
        return self.end == self.phase.tokens


def draw(found: list[Phase], path: Path) -> None:
    """Write the PNG."""
    columns = _columns(found)
    figure = new_figure(11.0, 8.2)
    grid = figure.subplots(
        len(ROWS), len(columns), sharex="col", sharey="row", squeeze=False,
        gridspec_kw={"width_ratios": [column.width for column in columns], "hspace": 0.22, "wspace": 0.08},
    )  # fmt: skip
    figure.subplots_adjust(left=0.09, right=0.975, top=0.885, bottom=0.075)
    lengths = sorted({values.sequence_length for phase in found for values in phase.boundaries})
    for number, column in enumerate(columns):
        ticks = sorted({0, column.end, *(v.tokens for v in column.phase.boundaries if v.tokens <= column.end)})
        points = sorted({*ticks, *(column.end * i // POINTS for i in range(POINTS)), *_before(ticks)})
        values = [values_at(column.phase.config, tokens) for tokens in points]
        for row, axes in zip(ROWS, grid[:, number], strict=True):
            curve = [row.value(v) for v in values]
            most = max((row.value(v) for phase in found for v in phase.boundaries), key=lambda v: (v == v, v))
            # a line at 0 is as wide as any other
            axes.plot(points, curve, color=row.colour, linewidth=1.8, clip_on=False, zorder=3)
            _style(axes, row, ticks, lengths, first=number == 0)
            if all(map(math.isnan, curve)):
                said = "as the data was prepared"
                axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", fontsize=8, color=MUTED)
                if math.isnan(most):  # no other phase has one either
                    axes.set_yticks([])
            elif not row.powers and min(curve) == max(curve) and column.is_whole:
                axes.annotate(
                    f"{curve[0]:,.4g}", (column.end / 2, curve[0]), (0, -12 if curve[0] > most / 2 else 4),
                    textcoords="offset points", ha="center", fontsize=8, color=row.colour,
                )  # fmt: skip
        grid[0, number].set_title(column.title, fontsize=9.5, color=INK, loc="left")
        _label_tokens(grid[-1, number], column, ticks)
    figure.align_ylabels(grid[:, 0])
    figure.text(0.09, 0.955, f"{found[0].name}: the recipe over tokens seen", fontsize=14, weight="bold", color=INK)
    save_figure(figure, path)


def _columns(found: list[Phase]) -> list[Column]:
    columns = []
    for phase in found:
        early = [v.tokens for v in phase.boundaries if 0 < v.tokens <= ZOOM * phase.tokens]
        if early:
            end = min(phase.tokens, max(early) * 5 // 4)
            columns.append(Column(phase, end, f"its first {_short(end)} tokens", 2.2))
        wide = 4.0 if len(phase.boundaries) > 2 else 1.3
        columns.append(Column(phase, phase.tokens, f"{phase.name}\n{_short(phase.tokens)} tokens", wide))
    return columns


def _before(ticks: list[int]) -> list[int]:
    """The last token before a boundary, so that a jump is drawn upright."""
    return [tokens - 1 for tokens in ticks if tokens]


def _style(axes: "Axes", row: Row, ticks: list[int], lengths: list[int], *, first: bool) -> None:
    axes.tick_params(axis="both", labelsize=8, colors=MUTED, length=0)
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    for tokens in ticks:
        axes.axvline(tokens, color=GRID, linewidth=0.8, zorder=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if row.powers:
        axes.set_yscale("log", base=2)
        axes.set_yticks(lengths)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}")
    else:
        axes.set_ylim(bottom=0)
        axes.margins(y=0.12)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
    if first:
        axes.set_ylabel(row.name, fontsize=9, color=row.colour)


def _label_tokens(axes: "Axes", column: Column, ticks: list[int]) -> None:
    """The boundaries by name, but those too near to one that has a name: both ends first, then from the left."""
    apart = column.end * 0.36 / column.width
    named = [0, column.end]
    for tokens in ticks:
        if all(abs(tokens - other) >= apart for other in named):
            named.append(tokens)
    axes.set_xticks(sorted(named))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel("tokens", fontsize=9, color=MUTED)


def _short(tokens: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{suffix}"
    return f"{tokens:.3g}"
