"""`expertpipe plan --validate --measured`: predicted against measured steps, on this machine's processor."""

import json
import sys
import tempfile
from pathlib import Path

from launcher.local import run_local

# Schedule and overlap of the tiny model's rows: one stage a rank and two, with and without a partner in a pair.
MODEL_ROWS = (("1f1b", "pairs"), ("zbv", "pairs"), ("dualpipe", "off"), ("dualpipe", "pairs"), ("dualpipe", "all"))
SLEPT_RANKS, PLANNED_RANKS, MODEL_RANKS = 4, 8, 4
HEAD = f"{'check':<43}{'measured':>9}{'predicted':>10}{'error':>7}{'bar':>5}  holds"


def measured_command(*, as_json: bool, repetitions: int = 5) -> int:
    """Prints the rows as they come, seconds of a step; 0 whether or not all hold, as `validate_command`.

    1, or the ranks' own code, where their processes fail.
    """
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
            for text in out.read_text().splitlines():
                print(text if as_json else line(json.loads(text)), flush=True)
    return 0


def line(row: dict) -> str:
    """At most 80 columns."""
    return (
        f"{row['check']:<43}{row['measured']:>8.3f}s{row['predicted']:>9.3f}s{row['relative_error']:>+7.1%}"
        f"{row['bar']:>5.0%}  {'yes' if row['holds'] else 'NO'}"
    )
