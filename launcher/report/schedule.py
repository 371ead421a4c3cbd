"""The pipeline of one recorded step, each rank's plan above what it did, as inline SVG."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import ConfigError, from_dict
from launcher.record import measured
from launcher.report.charts import frame, nice_ticks
from launcher.show.schedule_picture import spans, ways
from launcher.show.timeline import FILLS, KIND_NAMES, Span, Ways, span_parts
from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Timed, simulate

WIDTH, LEFT, BOTTOM = 1080.0, 62.0, 24.0
MOST_BOXES, MOST_NUMBERS = 12_000, 900


@dataclass(frozen=True)
class Recorded:
    """Rows in milliseconds: planned with the medians of this step's own work, and measured."""

    schedule: Schedule
    step: int
    planned: Sequence[Sequence[Timed]]
    measured: Sequence[Sequence[Timed]]

    @property
    def plan_ms(self) -> float:
        """End of the plan."""
        return max(timed.end for row in self.planned for timed in row)

    @property
    def run_ms(self) -> float:
        """End of the run."""
        return max(timed.end for row in self.measured for timed in row)

    @property
    def idle(self) -> float:
        """Share of the ranks' time in which the run did no work of the schedule."""
        busy = sum(timed.end - timed.start for row in self.measured for timed in row)
        return 1 - busy / (self.run_ms * len(self.measured))


def recorded(folder: Path, config: Mapping[str, Any]) -> Recorded | str:
    """The last step of which every action was recorded; else why there is none, in words."""
    if not list(folder.glob(measured.FILES)):
        return "No step was recorded; train with train.record_actions_every=100 to see one here."
    try:
        run = from_dict(config)
        work = measured.read(folder)
    except (ConfigError, measured.MeasuredError) as error:
        return f"What was recorded cannot be drawn: {' '.join(str(error).split())}"
    for number in reversed(run.microbatch_counts):
        schedule = build(
            run.parallel.schedule,
            num_ranks=run.parallel.pipeline,
            num_microbatches=number,
            stages_per_rank=run.parallel.stages_per_rank,
        )
        for step in sorted({piece.step for piece in work}, reverse=True):
            try:
                rows = measured.of_step(work, schedule, step=step)
            except measured.MeasuredError:
                continue
            plan = simulate(schedule, measured.MeasuredCosts.of_rows(rows))
            return Recorded(schedule, step, plan.ranks, rows)
    return "No recorded step has every action of the schedule: the run was cut off in it, or its layout has changed."


def draw(found: Recorded) -> str:
    """The picture as a figure."""
    every = 1
    boxes = sum(map(len, found.measured)) + sum(map(len, found.planned))
    while boxes / every > MOST_BOXES:
        every += 1
    ranks = range(0, len(found.planned), every)
    plan, run = spans(found.schedule, found.planned), spans(found.schedule, found.measured)
    rows = [(f"{rank} {what}", side[rank]) for rank in ranks for what, side in (("plan", plan), ("run", run))]
    row = min(26.0, max(9.0, 520.0 / len(rows)))
    gap, end = 0.35 * row, max(found.plan_ms, found.run_ms)
    height = (row * 2 + gap) * len(ranks)
    scale = (WIDTH - LEFT - 12) / end
    numbered = boxes <= MOST_NUMBERS
    parts = [f'<rect class="ground" x="{LEFT}" y="0" width="{WIDTH - LEFT - 12:g}" height="{height - gap:.1f}"/>']
    paths: dict[str, list[str]] = {}
    texts: list[str] = []
    for number, (label, side) in enumerate(rows):
        top = number * row + number // 2 * gap
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{top + row / 2 + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
        for span in side:
            _boxes(span, top, row, scale, paths, texts if numbered else None)
    parts += [f'<path fill="{fill}" d="{"".join(d)}"/>' for fill, d in paths.items()]
    for value in nice_ticks(0, end, 8):
        at, unit = LEFT + value * scale, " ms" if value == 0 else ""
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{height + 14:.1f}" text-anchor="middle">{value:,g}{unit}</text>'
        )
    legend = _legend(rows, ways(found.schedule), len(found.planned))
    some = f" One rank in {every} is drawn." if every > 1 else ""
    note = (
        "Plan: the schedule simulated with the median times of this step's own work. Run: what each pipeline rank of "
        f"the first data rank did; a box that waited for its message is longer.{some}"
    )
    return (
        f'<figure class="{frame(WIDTH)}"><svg viewBox="0 0 {WIDTH:g} {height + BOTTOM:.1f}" role="img" '
        f'aria-label="schedule">'
        f'{"".join(parts)}{"".join(texts)}</svg><div class="legend">{legend}</div><p class="note">{note}</p></figure>'
    )


def _boxes(
    span: Span, top: float, row: float, scale: float, paths: dict[str, list[str]], texts: list[str] | None
) -> None:
    left, width = LEFT + span.start * scale, (span.end - span.start) * scale
    for part in span_parts(span):
        y, high = top + (1 - part.high) * row + 0.5, (part.high - part.low) * row - 1
        fill = FILLS[part.direction][part.kind]
        wide = max(0.4, width - (0.8 if width > 4 else 0))
        paths.setdefault(fill, []).append(f"M{left:.1f} {y:.1f}h{wide:.1f}v{high:.1f}h-{wide:.1f}z")
        size = min(10.0, high * 0.75)
        if texts is not None and size >= 6 and width > 0.65 * size * len(str(part.microbatch)) + 3:
            dark = part.kind == "B" or (part.kind == "I" and part.direction == 0)
            texts.append(
                f'<text class="box" x="{left + width / 2:.1f}" y="{y + high / 2 + size * 0.35:.1f}" '
                f'font-size="{size:.1f}" fill="{"#fff" if dark else "#1f2430"}">{part.microbatch}</text>'
            )


def _legend(rows: Sequence[tuple[str, Sequence[Span]]], names: Ways, num_ranks: int) -> str:
    shown = {(part.direction, part.kind) for _, side in rows for span in side for part in span_parts(span)}
    two = any(direction == 1 for direction, _ in shown)
    said = names.names(num_ranks)
    return "".join(
        f'<span><i style="background:{FILLS[way][kind]}"></i>{KIND_NAMES[kind]}'
        + (f", {html.escape(said[way])}" if two else "")
        + "</span>"
        for way in (0, 1)
        for kind in ("F", "B", "I", "W")
        if (way, kind) in shown
    )
