"""The plan as one HTML page: the step in time, where it goes, what the fullest rank holds, and what would help."""

import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.plan.text import KINDS, TIMES, bound_line, change_line, cost_line, host_lines, memory_rows, time_rows
from launcher.plan.units import seconds, size
from launcher.show.schedule_picture import spans, ways
from launcher.show.timeline_html import timeline_html
from parallel.plan.advice import Change, assumptions
from parallel.plan.recipe import Hours
from parallel.plan.step import Plan

_STYLE = """<style>
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:8px 48px;margin-top:22px}
h2{font-size:15px;margin:10px 0 6px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td{padding:2px 0;white-space:nowrap}
td.n{text-align:right;padding-left:14px;color:#475467}
td.b{width:45%;padding-left:14px}
td.b i{display:block;height:11px;border-radius:2px;background:#4f92d3;min-width:1px}
.over td.b i{background:#b5520b}
ul{margin:4px 0;padding-left:18px}
</style>"""


def write_page(found: Plan, cost: Hours, helps: list[Change], path: Path) -> None:
    """The page, which needs nothing else."""
    job, p = found.job, found.job.parallel
    short = found.step_seconds < 1  # a step of milliseconds
    rows = spans(found.schedule, found.timeline.ranks)
    if short:
        rows = [[replace(one, start=1e3 * one.start, end=1e3 * one.end) for one in row] for row in rows]
    timeline_html(
        rows,
        path,
        title=f"{job.num_gpus:,} {job.hardware.name}: pipeline {p.pipeline} x data {p.data}, experts over {p.expert}, "
        f"{found.schedule.name}, {job.precision}",
        subtitle=f"a step of {seconds(found.step_seconds)}, {found.split.bubble / found.step_seconds:.1%} of it idle; "
        f"{found.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {found.mfu_causal:.1%} causal, {found.mfu_full:.1%} "
        "full",
        time_label="time, ms" if short else "time, s",
        ways=ways(found.schedule),
        below=f'{_STYLE}<div class="two">{_tables(found)}{_words(found, cost, helps)}</div>',
    )


def _tables(found: Plan) -> str:
    limit, worst = found.job.hardware.memory_bytes, found.fullest_rank
    total = found.memory[worst].total
    times = [(TIMES[key], seconds(value, like=found.step_seconds), value / found.step_seconds)
             for key, value in time_rows(found)]  # fmt: skip
    kinds = [(KINDS[kind], size(value), value / limit) for kind, value in memory_rows(found)]
    ranks = [(f"pipeline rank {rank}", size(memory.total), memory.total / limit)
             for rank, memory in enumerate(found.memory)]  # fmt: skip
    fits = "fits" if found.fits else "does not fit"
    name = html.escape(found.job.hardware.name)
    return (
        _table("Where a rank's step goes, on average", times)
        + _table(f"Memory of pipeline rank {worst}, the fullest: {size(total)} of {size(limit)}, {fits}", kinds)
        + _table(f"Memory of every pipeline rank, of {size(limit)} on {name}", ranks)
    )


def _table(title: str, rows: Sequence[tuple[str, str, float]]) -> str:
    """Name, value and a bar for its share; a share of more than one is drawn full and in another colour."""
    lines = [
        f'<tr{" class=over" if share > 1 else ""}><td>{name}</td><td class="n">{value}</td><td class="n">{share:.1%}'
        f'</td><td class="b"><i style="width:{100 * min(1.0, share):.1f}%"></i></td></tr>'
        for name, value, share in rows
    ]
    return f"<div><h2>{title}</h2><table>{''.join(lines)}</table></div>"


def _words(found: Plan, cost: Hours, helps: list[Change]) -> str:
    said = f"<div><h2>The run</h2><p>{html.escape(cost_line(found, cost))}</p><p>{html.escape(bound_line(found))}</p>"
    said += "".join(f"<p>{html.escape(line)}</p>" for line in host_lines(found))
    if helps:
        items = "".join(f"<li>{html.escape(change_line(found, change))}</li>" for change in helps)
        said += f"<h2>What would help most, each change planned by itself</h2><ul>{items}</ul>"
    said += "".join(f"<p>Assumed: {html.escape(line)}</p>" for line in [*assumptions(found.job), *cost.assumed])
    return said + f"<p>Kernels as in: {html.escape(found.job.calibration.source)}</p></div>"
