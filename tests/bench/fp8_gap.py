"""The loss of a run in FP8 against the same run in BF16: same seeds, same data, same order.

    python -m tests.bench.fp8_gap --steps 2000 --out runs/fp8_gap experiment=single

trains both one after the other (each goes on from its last checkpoint when called again), prints the relative gap of
the mean loss over the last 100 steps, with the gap of every tenth of the run, and draws OUT/gap.png. Exit 1 where it is
not below the report's 0.25%.
"""

import json
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.record.events import StepEvent, read
from launcher.show.pictures import BLUE, GRID, INK, MUTED, ORANGE, new_figure, save_figure

BAR = 0.0025  # report section 3.3: relative loss error against BF16
LAST = 100


@dataclass(frozen=True)
class Gap:
    """Mean losses over the last steps, their relative gap, and the gap in each tenth of the run."""

    bf16: float
    fp8: float
    relative: float
    by_tenth: tuple[float, ...]


def gap(bf16: Sequence[StepEvent], fp8: Sequence[StepEvent], *, last: int = LAST) -> Gap:
    """Compare two logs of the same steps; ValueError where they are not."""
    if [event.step for event in bf16] != [event.step for event in fp8] or not bf16:
        raise ValueError(f"logs of {len(bf16)} and {len(fp8)} steps: both runs must have done the same ones")

    def relative(part: slice) -> float:
        return statistics.fmean(e.loss for e in fp8[part]) / statistics.fmean(e.loss for e in bf16[part]) - 1

    tenth = max(1, len(bf16) // 10)
    tail = slice(-last, None)
    return Gap(
        statistics.fmean(e.loss for e in bf16[tail]),
        statistics.fmean(e.loss for e in fp8[tail]),
        relative(tail),
        tuple(relative(slice(start, start + tenth)) for start in range(0, len(bf16), tenth)),
    )


def windows(bf16: Sequence[StepEvent], fp8: Sequence[StepEvent], length: int) -> list[tuple[int, float]]:
    """Last step and relative gap of the mean losses of every whole window of so many steps."""
    found = []
    for start in range(0, len(bf16) - length + 1, length):
        part = slice(start, start + length)
        means = [statistics.fmean(event.loss for event in run[part]) for run in (bf16, fp8)]
        found.append((bf16[start + length - 1].step, means[1] / means[0] - 1))
    return found


def draw_png(bf16: Sequence[StepEvent], fp8: Sequence[StepEvent], path: Path, *, length: int = LAST) -> None:
    """Both losses by steps, and below the gap of every window between the bars."""
    figure = new_figure(10.0, 5.0)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.97, bottom=0.1, hspace=0.14)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for run, name, colour, width in ((bf16, "BF16", INK, 3.0), (fp8, "FP8", ORANGE, 1.2)):
        steps, losses = [event.step for event in run], [event.loss for event in run]
        above.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.25)
        size = min(20, len(losses))
        means = [statistics.fmean(losses[end - size : end]) for end in range(size, len(losses) + 1)]
        above.plot(steps[size - 1 :], means, color=colour, linewidth=width, label=f"{name}, mean of {size} steps")
    above.set_ylabel("nats a token", fontsize=9, color=MUTED)
    above.legend(frameon=False, fontsize=9, labelcolor=INK)
    ends, gaps = zip(*windows(bf16, fp8, min(length, len(bf16))), strict=True)
    below.plot(ends, [100 * value for value in gaps], color=BLUE, marker="o", markersize=4, linewidth=1.4)
    for bar in (-BAR, BAR):
        below.axhline(100 * bar, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    below.axhline(0, color=MUTED, linewidth=0.8)
    below.set_ylabel(f"FP8 over BF16, %,\nby {length} steps", fontsize=9, color=MUTED)
    below.set_xlabel("step", fontsize=9, color=MUTED)
    for axes in (above, below):
        axes.tick_params(labelsize=8.5, colors=MUTED, length=0)
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    save_figure(figure, path)


def train(precision: str, folder: Path, steps: int, overrides: Sequence[str]) -> list[StepEvent]:
    """One run to its end; the steps it logged."""
    run = folder / precision
    keys = [f"train.precision={precision}", f"train.steps={steps}", f"run_dir={run}"]
    subprocess.run([sys.executable, "-m", "launcher", "train", *overrides, *keys], check=True, stdout=sys.stderr)
    return read(run / "events.jsonl")


def main() -> int:
    """Train both, print the gap as JSON."""
    parser = ArgumentParser(prog="python -m tests.bench.fp8_gap")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--last", type=int, default=LAST)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", default=["experiment=single"])
    args = parser.parse_intermixed_args()
    bf16, fp8 = (train(precision, args.out, args.steps, args.overrides) for precision in ("bf16", "fp8"))
    found = gap(bf16, fp8, last=args.last)
    draw_png(bf16, fp8, args.out / "gap.png", length=args.last)
    print(json.dumps(vars(found)))
    return int(not abs(found.relative) < BAR)


if __name__ == "__main__":
    sys.exit(main())
