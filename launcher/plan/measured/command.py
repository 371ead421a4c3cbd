"""`expertpipe plan --validate --measured`: predicted against measured steps, on this machine's processor."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from launcher.local import run_local
from launcher.plan.measured.row import Row

# Schedule and overlap of the tiny model's rows: one stage a rank and two, with and without a partner in a pair.
MODEL_ROWS = (("1f1b", "pairs"), ("zbv", "pairs"), ("dualpipe", "off"), ("dualpipe", "pairs"), ("dualpipe", "all"))
SLEPT_RANKS, PLANNED_RANKS, MODEL_RANKS = 4, 8, 4
HEAD = f"{'check':<43}{'measured':>9}{'predicted':>10}{'error':>7}{'bar':>5} holds"


def measured_command(*, as_json: bool, repetitions: int = 5) -> int:
    """Prints the rows as they come, seconds of a step; 0 whether or not all hold, as `validate_command`.

    1, or the ranks' own code, where their processes fail. The first of the tiny model's rows calibrates the others: how
    many times as long its phases take among all ranks as timed apart.
    """
    factor: float | None = None
    kinds = [(SLEPT_RANKS, ["slept"]), (PLANNED_RANKS, ["planned"])]
    kinds += [(MODEL_RANKS, ["model", *words]) for words in MODEL_ROWS]
    if not as_json:
        print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, (ranks, words) in enumerate(kinds):
            print(f"{' '.join(words)}: {ranks} processes ...", file=sys.stderr, flush=True)
            out = Path(folder) / f"{number}.jsonl"
            command = [sys.executable, "-m", "launcher.plan.measured.rank", str(out), str(repetitions), *words]
            code = run_local([], world_size=ranks, run_dir=Path(folder), threads=1, command=command)
            if code:
                return code
            for row in (Row.of_tree(json.loads(text)) for text in out.read_text().splitlines()):
                if factor is None and row.phases_factor is not None:
                    factor = row.phases_factor
                    row = replace(row, calibrates=True)
                elif factor is not None:
                    row = row.with_phases_times(factor)
                print(json.dumps(row.tree()) if as_json else line(row), flush=True)
    return 0


def line(row: Row) -> str:
    """At most 80 columns, two lines for the row that calibrates."""
    found = f"{row.check:<43}{row.measured:>8.3f}s{row.predicted:>9.3f}s{row.relative_error:>+7.1%}{row.bar:>5.0%}"
    if row.calibrates:
        return f"{found}  -\n    calibrates those below: phases among all ranks take {row.phases_factor:.3f} times"
    return f"{found}  {'yes' if row.holds else 'NO'}"
