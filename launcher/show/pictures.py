"""Pictures of a run: its loss curve; and the ink, figure and file that all pictures share.

matplotlib is imported where it is needed and only through Figure objects: no window system, no global state.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.record.events import StepEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, MUTED, GRID = "#1f2430", "#667085", "#e4e7ec"
BLUE, ORANGE, GREEN = "#2f6fb0", "#d9730d", "#0f8f6f"


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
    figure = new_figure(10.0, 6.4)
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
    save_figure(figure, path)


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


def new_figure(width: float, height: float) -> "Figure":
    """A white figure in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # draws into memory whatever backend the environment asks for
    return figure


def save_figure(figure: "Figure", path: Path | str) -> None:
    """As PNG, in a folder that is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
