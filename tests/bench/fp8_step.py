"""What a step costs in FP8 against the same step in BF16, on a CPU: each in a process of its own, in turns.

    python -m tests.bench.fp8_step [--turns 3] [train.threads=1 ...]

Runs `expertpipe bench step` (85M weights, 4,096 tokens) and prints the ratio of CPU seconds a token, turn by turn and
their median, as JSON. Exit 1 where the median is above 1.6.
"""

import json
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass

BAR = 1.6
PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True)
class Cost:
    """CPU seconds of FP8 over those of BF16: each turn, their median; tokens a CPU second of both, medians."""

    turns: tuple[float, ...]
    median: float
    bf16: float
    fp8: float


def cost(bf16: Sequence[float], fp8: Sequence[float]) -> Cost:
    """From tokens a CPU second of each turn."""
    turns = tuple(wide / narrow for wide, narrow in zip(bf16, fp8, strict=True))
    return Cost(turns, statistics.median(turns), statistics.median(bf16), statistics.median(fp8))


def speed(precision: str, repetitions: int, overrides: Sequence[str]) -> float:
    """Tokens a CPU second of one process."""
    command = [sys.executable, "-m", "launcher", "bench", "step", "--json", "--repetitions", str(repetitions)]
    done = subprocess.run(
        [*command, *overrides, f"train.precision={precision}"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])["tokens_per_cpu_second"]


def main() -> int:
    """Measure in turns, print the ratio."""
    parser = ArgumentParser(prog="python -m tests.bench.fp8_step")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3, help="steps of a turn")
    parser.add_argument("overrides", nargs="*", help="such as train.threads=1")
    args = parser.parse_intermixed_args()
    speeds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for _ in range(args.turns):
        for precision in PRECISIONS:
            speeds[precision].append(speed(precision, args.repetitions, args.overrides))
    found = cost(speeds["bf16"], speeds["fp8"])
    print(json.dumps(asdict(found)))
    return int(found.median > BAR)


if __name__ == "__main__":
    sys.exit(main())
