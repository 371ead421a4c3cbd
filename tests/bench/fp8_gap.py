"""The loss of a run in FP8 against the same run in BF16: same seeds, same data, same order.

    python -m tests.bench.fp8_gap --steps 2000 --out runs/fp8_gap experiment=single

trains both one after the other (each goes on from its last checkpoint when called again) and prints the relative gap
of the mean loss over the last 100 steps, with the gap of every tenth of the run. Exit 1 where it is not below the
report's 0.25%.
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
    runs = [train(precision, args.out, args.steps, args.overrides) for precision in ("bf16", "fp8")]
    found = gap(*runs, last=args.last)
    print(json.dumps(vars(found)))
    return int(not abs(found.relative) < BAR)


if __name__ == "__main__":
    sys.exit(main())
