"""`expertpipe plan --validate`: predictions against published figures, each with its bar."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.config import compose
from launcher.plan.inputs import CALIBRATION, as_published, folder, hardware_of, shipped
from parallel.plan import calibration
from parallel.plan.job import Job
from parallel.plan.published import Row, rows

EXPERIMENT = "deepseek_v3_2048_h800"
TRACE_TOKENS, TRACE_EXPERT, TRACE_LAYERS = 4096, 64, 4


def validate_command(*, as_json: bool, trace: Path | None) -> int:
    """Prints the rows; 0 whether or not all hold, as a row that does not is a finding rather than a fault."""
    found = all_rows(trace)
    if as_json:
        for row in found:
            print(json.dumps(row.tree()))
        return 0
    print(f"{'check':<34}{'published':>10}{'predicted':>10}{'error':>8}{'bar':>6}  holds")
    for row in found:
        print(
            f"{row.check:<34}{number(row.published):>10}{number(row.predicted):>10}{row.relative_error:>+8.1%}"
            f"{row.bar:>6.0%}  {row.verdict}"
        )
        if row.explained and _is_told(row):
            print("\n".join(textwrap.wrap(row.explained, 76, initial_indent="    ", subsequent_indent="    ")))
    print("\n".join(textwrap.wrap(independence(found), 80)))
    return 0


def independence(found: Sequence[Row]) -> str:
    """How many of the rows within their bars say something of their own."""
    within = [row for row in found if row.holds and not row.forecast]
    restating = [row.check for row in within if row.restates]
    fitted = [row.check for row in within if row.calibrated]
    return (
        f"{len(within)} rows are within their bars, {sum(row.independent for row in within)} of them independent: "
        f"{'; '.join(restating)} restate the step, and the calibration is fitted to {'; '.join(fitted)}"
    )


def all_rows(trace: Path | None = None) -> list[Row]:
    """Rows of the published run; trace: the profile itself, else what of it the calibration file keeps."""
    job = published_job()
    shape = calibration.trace_shape(job.model, tokens=TRACE_TOKENS, expert=TRACE_EXPERT, ranks_per_node=8)
    if trace is not None:
        fresh = calibration.from_trace(trace, shape, job.hardware, layers=TRACE_LAYERS)
        job = replace(job, calibration=replace(fresh.calibration, training=job.calibration.training))
        return rows(job, shape, fresh.measured.classes, fresh.measured.seconds)
    _, tree = calibration.read(folder() / "calibration" / CALIBRATION)
    classes, seconds = tree["class_seconds"], tree["pair_seconds"]
    assert isinstance(classes, dict) and isinstance(seconds, float)
    return rows(job, shape, classes, seconds)


def published_job() -> Job:
    """DeepSeek-V3 on 2,048 H800 with the engine of the report, calibrated as shipped."""
    config = compose([f"experiment={EXPERIMENT}"])
    job = Job(
        model=config.model,
        parallel=config.parallel,
        hardware=hardware_of("h800"),
        sequence_length=4096,
        micro_batch_size=1,
        global_batch_size=15360,
        precision="fp8",
        fp8=config.fp8,
        tokens=14.8e12,
        calibration=shipped(),
    )
    return as_published(job)


def number(value: float) -> str:
    """Four figures, with thousands where there are any."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _is_told(row: Row) -> bool:
    """Whether the table gives what the row's deviation is put down to."""
    large = not row.holds or abs(row.relative_error) > 0.5 * row.bar
    return large or row.forecast or "factor" in row.explained
