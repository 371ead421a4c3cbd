"""A pipeline schedule in time as Chrome trace events, for Perfetto and chrome://tracing: a track for each rank."""

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.show.timeline import Rows, Span, checked_end


def write_trace(groups: Sequence[tuple[str, Rows]], path: Path | str, *, us_per_unit: float) -> None:
    """Write the file; a group is a process with a thread for each rank, such as `plan` and `run`.

    us_per_unit: microseconds in one unit of the spans' time.
    """
    events: list[dict[str, object]] = []
    for process, (name, rows) in enumerate(groups):
        checked_end(rows)
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for rank, row in enumerate(rows):
            events.append(
                {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
            )
            events += [_event(span, process, rank, us_per_unit) for span in row]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _event(span: Span, process: int, rank: int, us_per_unit: float) -> dict[str, object]:
    kind = "F" if span.kind == "FB" else span.kind
    name = f"{span.stage}{kind}{span.microbatch}"
    args: dict[str, object] = {"stage": span.stage, "microbatch": span.microbatch}
    if span.kind == "FB":
        name = f"({name};{span.partner_stage}{span.partner_kind}{span.partner_microbatch})OVERLAP_F_B"
        args |= {"backward_stage": span.partner_stage, "backward_microbatch": span.partner_microbatch}
    return {
        "ph": "X", "name": name, "cat": "pair" if span.kind == "FB" else kind, "pid": process, "tid": rank,
        "ts": span.start * us_per_unit, "dur": (span.end - span.start) * us_per_unit, "args": args,
    }  # fmt: skip
