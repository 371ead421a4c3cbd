"""What came of the runs of `peer_run`: the compared figures as one JSON object, and their picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.baselines import bits_per_byte
from data.tokens import Manifest, TokenFile
from launcher.config import RunConfig

LAST = 50  # steps at the end over which the experts' load is averaged
BALANCED, EQUAL = 1.5, 0.01
NOT_THE_SAME = "moments and weights in BF16 here, FP32 under autocast there; kernels; size of micro-batches"


@dataclass(frozen=True)
class Row:
    """One step. load: largest over mean load of each MoE layer, the MTP module's last."""

    step: int
    tokens: int
    loss: float
    mtp_loss: float | None
    seconds: float
    load: tuple[float, ...]


@dataclass(frozen=True)
class Side:
    """One side's run: its steps, held-out nats a token after `marks`, seconds of CPU."""

    rows: list[Row]
    marks: list[int]
    heldout: list[float]
    cpu_seconds: float


def apart(sides: Sequence[Side]) -> list[float]:
    """At each mark the largest held-out loss over the smallest, less 1."""
    return [max(at) / min(at) - 1 for at in zip(*(side.heldout for side in sides), strict=True)]


def heldout_prefix(config: RunConfig) -> Path:
    """The held-out set beside the training set."""
    return Path(config.data.prefix).with_name("heldout")


def report(config: RunConfig, mine: Sequence[Side], theirs: Sequence[Side]) -> dict[str, Any]:
    """The JSON object: held-out losses at equal tokens, the gap of the means; times and loads of the first runs."""
    prefix = heldout_prefix(config)
    predicted = TokenFile(prefix).num_tokens - 1
    text_bytes = Manifest.read(prefix).text_bytes

    def described(side: Side) -> dict[str, Any]:
        seconds = [row.seconds for row in side.rows]
        loads = [statistics.fmean(layer) for layer in zip(*(row.load for row in side.rows[-LAST:]), strict=True)]
        per_byte = [bits_per_byte(nats, num_tokens=predicted, text_bytes=text_bytes) for nats in side.heldout]
        return {
            "heldout_nats_per_token": side.heldout,
            "heldout_bits_per_byte": per_byte,
            "step_seconds_total": sum(seconds),
            "step_seconds_median": statistics.median(seconds),
            "cpu_seconds": side.cpu_seconds,
            "expert_load_max_over_mean_at_end": loads,
            "first_loss": side.rows[0].loss,
            "last_loss": side.rows[-1].loss,
        }

    def mean(sides: Sequence[Side]) -> list[float]:
        return [statistics.fmean(at) for at in zip(*(side.heldout for side in sides), strict=True)]

    gaps = [a / b - 1 for a, b in zip(mean(mine), mean(theirs), strict=True)]
    tokens = {row.step: row.tokens for row in mine[0].rows}
    for side in (*mine[1:], *theirs):
        assert tokens == {row.step: row.tokens for row in side.rows}, "the runs have not seen the same tokens"
    found: dict[str, Any] = {}
    for name, sides in (("ours", mine), ("transformers", theirs)):
        found[name] = described(sides[0])
        if len(sides) > 1:
            found |= {f"{name}_again": [described(side) for side in sides[1:]], f"{name}_apart_at_marks": apart(sides)}
    loads = found["ours"]["expert_load_max_over_mean_at_end"]
    return {
        "bench": "peer_run",
        "experiment": config.name,
        "steps": mine[0].rows[-1].step,
        "tokens_at_marks": [tokens[step] for step in mine[0].marks],
        **found,
        "relative_gap_at_marks": gaps,
        "equal_at_end": abs(gaps[-1]) < EQUAL,
        "time_ratio": found["transformers"]["step_seconds_total"] / found["ours"]["step_seconds_total"],
        "cpu_ratio": found["transformers"]["cpu_seconds"] / found["ours"]["cpu_seconds"],
        "balanced_at_end": max(loads, default=1.0) < BALANCED,
        "not_the_same": NOT_THE_SAME,
    }


def draw(path: Path, title: str, mine: Sequence[Side], theirs: Sequence[Side]) -> None:
    """Held-out loss by tokens and by time of the steps, training loss behind it, expert load below its bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    named = [(side, f"ours {number}", ("C0", "C9", "C4", "C5")[number % 4 - 1]) for number, side in enumerate(mine, 1)]
    named += [(side, f"transformers {number}", ("C1", "C3")[number % 2 - 1]) for number, side in enumerate(theirs, 1)]
    for side, name, colour in named:
        tokens = np.array([row.tokens for row in side.rows]) / 1e6
        hours = np.cumsum([row.seconds for row in side.rows]) / 3600
        at = [row.step - 1 for row in side.rows if row.step in side.marks]
        axes[0].plot(tokens, [row.loss for row in side.rows], colour, alpha=0.2, linewidth=0.6)
        axes[0].plot(tokens[at], side.heldout, colour, marker="o", label=f"{name}, held out")
        axes[1].plot(hours[at], side.heldout, colour, marker="o", label=name)
        worst = np.array([max(row.load, default=1.0) for row in side.rows])
        width = min(LAST, len(worst))
        even = np.convolve(worst, np.full(width, 1 / width), mode="valid")
        axes[2].plot(tokens, worst, colour, alpha=0.2, linewidth=0.6)
        axes[2].plot(tokens[width - 1 :], even, colour, label=f"{name}, mean of {width} steps")
    axes[2].axhline(BALANCED, color="0.5", linewidth=0.8)
    for axis, x, y in zip(
        axes,
        ("million tokens", "hours of steps", "million tokens"),
        ("nats a token", "held-out nats a token", "busiest expert over mean, worst layer"),
        strict=True,
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
