"""A rank of `expertpipe plan --validate --measured`: what a step was predicted to take, and what it takes."""

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.bench.step import build_for_bench
from launcher.check.run import checked
from launcher.config import TrainConfig
from launcher.plan.measured.model import model_row
from launcher.plan.measured.row import Row
from launcher.plan.measured.slept import even_pipelines, planned_pipelines, slept_rows
from launcher.runtime import process_group


def main(argv: Sequence[str]) -> int:
    """OUT REPETITIONS slept | planned | model SCHEDULE OVERLAP: rank 0 adds its rows to OUT as lines of JSON."""
    out, repetitions, kind, *words = argv
    if kind == "model":
        schedule, overlap = words
        overrides = ["experiment=tiny", f"parallel.schedule={schedule}", f"parallel.overlap={overlap}"]
        config = checked([*overrides, "train.device=cpu", "train.threads=1"], with_data=False)
        with process_group(config.train) as process:
            rows = [model_row(build_for_bench(config, process), repetitions=int(repetitions))]
            _write(Path(out), rows, process.rank)
        return 0
    with process_group(TrainConfig(1, 1, device="cpu", threads=1, timeout_seconds=300)) as process:
        pipelines = even_pipelines() if kind == "slept" else planned_pipelines()
        _write(Path(out), list(slept_rows(pipelines, process.rank, repetitions=int(repetitions))), process.rank)
    return 0


def _write(path: Path, rows: Sequence[Row], rank: int) -> None:
    if rank == 0:
        with path.open("a") as file:
            file.writelines(json.dumps(row.tree()) + "\n" for row in rows)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
