"""The parts of the page, each from the record of a run to HTML; a part without anything to show says why."""

import html
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from launcher.commands.fp8_report import GAUSSIAN_ERROR, Sample, badness
from launcher.record.clock import PHASES
from launcher.record.events import StepEvent
from launcher.record.norms import GROUPS
from launcher.report import heat
from launcher.report.charts import Chart, Layer, Series, counted, draw, stack
from launcher.report.read import RunRecord
from launcher.report.schedule import Recorded
from launcher.report.schedule import draw as draw_schedule
from launcher.report.thin import MAX_POINTS, smooth, thin
from launcher.show.display import compact

WIDE = 1080.0
HEAT_COLUMNS, HEAT_CELLS = 240, 900_000
PHASE_COLOURS = {
    "forward": 0, "backward": 1, "all_to_all": 2, "messages": 3, "reduce_scatter": 4, "all_gather": 5, "optimizer": 6,
    "metrics": 7, "data": 8, "checkpoint": 9, "other": 10,
}  # fmt: skip
assert PHASE_COLOURS.keys() == set(PHASES)


def _steps(record: RunRecord) -> list[float]:
    return [float(event.step) for event in record.events]


def _series(record: RunRecord, name: str, of: Any, colour: int = 0, **more: Any) -> Series:
    return Series(name, thin(_steps(record), [of(event) for event in record.events]), colour, **more)


def _warned(record: RunRecord) -> list[float]:
    return [float(event.step) for event in record.events if event.warnings]


def _words(name: str) -> str:
    """A phase as people write it."""
    return name.replace("all_to_all", "all-to-all").replace("_", "-")


def row(*pictures: str) -> str:
    """Pictures side by side, below one another on a narrow page."""
    return f'<div class="row">{"".join(pictures)}</div>'


def losses(record: RunRecord) -> str:
    """Main and MTP loss over the steps, held-out loss where it was scored; the balance loss where there is one."""
    found = []
    for name, of, colour in (
        ("loss", lambda event: event.loss, 0), ("multi-token prediction loss", lambda event: event.mtp_loss, 1),
    ):  # fmt: skip
        curve = _series(record, name, of, colour)
        if any(math.isfinite(value) for value in curve.points.mean):
            reach = len(curve.points.mean) // 60
            if reach:
                found.append(_series(record, name, of, colour, faint=True))
            found.append(Series(name, curve.points, colour, line=smooth(curve.points.mean, reach)))
    points = []
    if record.heldout is not None:
        points = [(float(record.last.step), record.heldout, f"held-out loss {record.heldout:.3f}")]
    note = f"Held-out loss after the last step: {record.heldout:.3f} (diamond)." if record.heldout is not None else ""
    if found and found[-1].points.size > 1:
        note += f" A point is the mean of {found[-1].points.size} steps, the band their least and most."
    chart = Chart(
        "Loss", found, "nats a token, by step", note.strip(), WIDE, 300, points=points, events=_warned(record)
    )  # fmt: skip
    if not any(event.balance_loss for event in record.events):  # no expert, no weight of it, or an old log
        return draw(chart)
    balance = Chart(
        "Balance loss", [_series(record, "balance loss", lambda e: e.balance_loss, 2)],
        "nats a token, sum of the layers, as it enters the loss", "", WIDE, 150, from_zero=True, events=_warned(record),
    )  # fmt: skip
    return draw(chart) + draw(balance)


def recipe(record: RunRecord) -> str:
    """What was scheduled, as the steps took it."""
    found = [
        ("Learning rate", "", _series(record, "lr", lambda e: e.lr)),
        ("Batch", "sequences", _series(record, "batch", lambda e: e.batch or None, 2)),
        ("Router bias speed", "", _series(record, "bias speed", lambda e: e.bias_speed, 3)),
    ]
    if any(event.mtp_lambda is not None for event in record.events):
        weight = _series(record, "MTP weight", lambda e: e.mtp_lambda, 1)
        found.append(("Weight of multi-token prediction", "in the loss", weight))
    width = 350 if len(found) == 3 else 520
    pictures = [
        draw(Chart(title, [series], unit, from_zero=True, width=width, height=170)) for title, unit, series in found
    ]
    return row(*pictures) if len(found) == 3 else row(*pictures[:2]) + row(*pictures[2:])


def gradients(record: RunRecord) -> str:
    """Norms: of all gradients, and by group of parameters."""
    total = Chart(
        "Gradient norm", [_series(record, "gradient norm", lambda e: e.grad_norm)], "before clipping", log=True,
        marks=_clip(record), events=_warned(record), width=350, height=210,
    )  # fmt: skip
    pictures = [draw(total)]
    for name, kind in (("Gradient norm by group", "grad_norms"), ("Weight norm by group", "weight_norms")):
        events = [event for event in record.events if getattr(event, kind)]
        if events:
            pictures.append(draw(Chart(name, _by_group(events, kind), log=True, width=350, height=210)))
    if len(pictures) == 1:
        pictures.append(_empty("Norms by group were not logged; train.norms_every=1 logs them."))
    return row(*pictures)


def _by_group(events: Sequence[StepEvent], kind: str) -> list[Series]:
    steps = [float(event.step) for event in events]
    groups = [group for group in GROUPS if any(group in getattr(event, kind) for event in events)]
    return [
        Series(
            group.replace("_", " ").replace("mlp", "MLP").replace("mtp", "MTP"),
            thin(steps, [getattr(e, kind).get(group) for e in events], 240),
            GROUPS.index(group),
        )
        for group in groups
    ]  # fmt: skip


def _clip(record: RunRecord) -> list[tuple[float, str]]:
    limit = record.config.get("optim", {}).get("clip_norm")
    good = isinstance(limit, int | float) and math.isfinite(limit) and limit > 0
    return [(float(limit), f"clip {limit:g}")] if good else []


def speed(record: RunRecord) -> str:
    """Tokens a second, MFU, and where the time of a step goes."""
    rate = Chart(
        "Tokens a second", [_series(record, "tokens/s", lambda e: e.tokens_per_second)], "all ranks", from_zero=True
    )
    causal = _series(record, "causal attention", lambda e: e.mfu_causal, 0)
    full = _series(record, "full attention", lambda e: e.mfu_full, 1)
    if not any(math.isfinite(value) for value in causal.points.mean):
        return row(draw(rate), _empty("This log holds no MFU.")) + time_split(record)
    peak, source = record.header.get("peak_flops"), record.header.get("peak_source", "")
    said = f"Against {float(peak) / 1e12:.4g} TFLOP/s of all ranks together ({source})." if peak else ""
    note = f"{said} MTP and recomputation are not counted."
    share = Chart("MFU", [causal, full], "share of the peak", note, from_zero=True, format=lambda v: f"{100 * v:.3g}%")
    return row(draw(rate), draw(share)) + time_split(record)


def time_split(record: RunRecord) -> str:
    """A stack over the steps, and the means as a bar."""
    if not record.splits:
        return _empty("No rank's time was logged; train.rank_events_every=1 logs it.")
    size = max(1, -(-len(record.splits) // MAX_POINTS))
    groups = [record.splits[i : i + size] for i in range(0, len(record.splits), size)]
    x = [float(group[-1].step) for group in groups]
    means = {phase: [sum(s.phases[phase] for s in group) / len(group) for group in groups] for phase in PHASE_COLOURS}
    most = max(sum(values[i] for values in means.values()) for i in range(len(x)))
    seen = {phase: sum(s.phases[phase] for s in record.splits) / len(record.splits) for phase in PHASE_COLOURS}
    total = sum(seen.values()) or 1.0
    layers = [Layer(phase, values, PHASE_COLOURS[phase]) for phase, values in means.items() if any(values)]
    ranks = f"{record.ranks_read} of {counted(record.ranks_found, 'rank')}"
    note = (
        f"Seconds of the host, mean over {ranks}: they add up to the wall time of a step. "
        "Messages are the pipeline's waiting and sending; all-to-all is inside the chunks and not counted twice."
    )
    unit = "seconds a step"
    series = [Series(_words(phase), thin(x, means[phase]), PHASE_COLOURS[phase]) for phase in means]
    chart = Chart("Where a step's time goes", series, unit, note, WIDE, 250, format=lambda v: f"{v:.3g}")
    bars = "".join(
        f'<tr><td><i style="background:var(--c{PHASE_COLOURS[phase]})"></i>{_words(phase)}</td>'
        f'<td class="bar"><b style="width:{100 * seconds / max(seen.values()):.1f}%;'
        f'background:var(--c{PHASE_COLOURS[phase]})"></b></td>'
        f'<td class="n">{compact(seconds)} s</td><td class="n">{seconds / total:.1%}</td></tr>'
        for phase, seconds in sorted(seen.items(), key=lambda item: -item[1])
        if seconds
    )
    table = f'<table class="bars"><tr><th>mean of all steps</th><th></th><th></th><th></th></tr>{bars}</table>'
    return (stack(chart, x, layers) if most else "") + f'<figure class="chart">{table}</figure>'


def experts(record: RunRecord) -> str:
    """Balance of every layer over time, the biases that keep it, and each expert of each layer."""
    if not record.last.expert_load:
        return _empty("The model has no mixture-of-experts layer.")
    blocks = record.blocks()
    columns = [[event.expert_load[i] for event in record.events] for i in range(len(blocks))]
    cells: list[list[float | None]] = [list(thin(_steps(record), column, 2 * HEAT_COLUMNS).mean) for column in columns]
    most = max((v for r in cells for v in r if v is not None and math.isfinite(v)), default=1.0)
    ends = (float(record.events[0].step), float(record.last.step))
    layers = heat.HeatMap(
        "Busiest expert's tokens over the mean, by layer", cells, ends, blocks, 1.0, max(1.5, most),
        row_height=min(22.0, max(5.0, 330 / len(blocks))), rows_name="layers",
    )  # fmt: skip
    worst = Chart(
        "Load max / mean", [
            _series(record, "worst layer", lambda e: e.expert_load_max_over_mean),
            _series(record, "mean of the layers", lambda e: sum(e.expert_load) / len(e.expert_load), 2),
        ], marks=[(1.0, "perfect balance")], events=_warned(record),
    )  # fmt: skip
    spans = [
        Series(block, thin(_steps(record), [_at(e.router_bias_ranges, i) for e in record.events], 240), 0, faint=True)
        for i, block in enumerate(blocks)
    ]
    bias = Chart(
        "Router bias, largest minus smallest",
        [*spans, _series(record, "widest layer", lambda e: e.router_bias_range)], from_zero=True,
        note="Thin: every layer." if record.last.router_bias_ranges else "",
    )  # fmt: skip
    return heat.draw(layers) + heat.key(layers, "max / mean") + row(draw(worst), draw(bias)) + _each_expert(record)


def _at(values: Sequence[float], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _each_expert(record: RunRecord) -> str:
    """Small maps, one a layer: tokens of every expert over the mean of the layer."""
    events = [event for event in record.events if event.expert_counts]
    if not events:
        return _empty("The tokens of single experts were not logged; train.expert_counts_every=10 logs them.")
    blocks, num_experts = record.blocks(), len(events[-1].expert_counts[0])
    columns = max(8, min(HEAT_COLUMNS, HEAT_CELLS // (num_experts * len(blocks))))
    size = max(1, -(-len(events) // columns))
    ends = (float(events[0].step), float(events[-1].step))
    pictures, last = [], None
    for index, block in enumerate(blocks):
        cells: list[list[float | None]] = [[] for _ in range(num_experts)]
        for start in range(0, len(events), size):
            tables = [event.expert_counts[index] for event in events[start : start + size]]
            sums = [sum(column) for column in zip(*tables, strict=True)]
            mean = sum(sums) / num_experts
            for expert, value in enumerate(sums):
                cells[expert].append(value / mean if mean else None)
        high = min(14.0, max(1.0, 150 / num_experts))
        last = heat.HeatMap(
            block, cells, ends, [str(e) for e in range(num_experts)], 0.25, 4.0, True, "experts", width=350,
            row_height=high,
        )  # fmt: skip
        pictures.append(heat.draw(last))
    dead = sorted({key for event in record.events for key in event.dead_experts})
    now = len(record.last.dead_experts) or "none"
    said = (
        f"{counted(len(dead), 'expert')} had a step without a token, {now} in the last step."
        if dead
        else "Every expert had tokens in every step."
    )
    many = f" A column is the sum of {size} logged steps." if size > 1 else ""
    assert last is not None
    return (
        f'<h3>Tokens of every expert</h3><p class="lead">{counted(len(events), "logged step")}. {said}{many}</p>'
        + heat.key(last, "tokens / mean of the layer") + f'<div class="row">{"".join(pictures)}</div>'
    )  # fmt: skip


def schedule(found: Recorded | str) -> str:
    """The pipeline of the last recorded step, or why there is none."""
    if isinstance(found, str):
        return _empty(found)
    s = found.schedule
    ranks, chunks = counted(s.num_ranks, "pipeline rank"), counted(s.num_microbatches, "micro-batch", "micro-batches")
    lead = (
        f"{s.name}, {ranks}, {chunks}, step {found.step}: run {found.run_ms:.4g} ms, "
        f"{found.run_ms / found.plan_ms:.3f} of its plan ({found.plan_ms:.4g} ms); ranks idle {found.idle:.1%}."
    )
    return f'<p class="lead">{lead}</p>' + draw_schedule(found)


def faults(record: RunRecord) -> str:
    """What was out of the ordinary, from faults.jsonl, newest last."""
    if not record.faults:
        return _empty("Nothing out of the ordinary was recorded.")
    rows = "".join(
        f"<tr><td>{_time(fault.get('time'))}</td><td class='n'>{html.escape(str(fault.get('step', '')))}</td>"
        f"<td>{html.escape(str(fault.get('what', '')))}</td></tr>"
        for fault in record.faults[-200:]
    )
    more = f'<p class="note">The last 200 of {len(record.faults)}.</p>' if len(record.faults) > 200 else ""
    return f'<table class="plain"><tr><th>time (UTC)</th><th class="n">step</th><th>what</th></tr>{rows}</table>{more}'


def _time(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def fp8(samples: Sequence[Sample]) -> str:
    """Errors of the sampled tensors over time, and the worst of the last sample."""
    tensors = list(dict.fromkeys(s.tensor for s in samples))
    steps = sorted({s.step for s in samples})

    def worst(tensor: str, step: int) -> float:
        errors = [s.relative_error for s in samples if (s.tensor, s.step) == (tensor, step)]
        return max((e for e in errors if math.isfinite(e)), default=math.nan)

    series = [
        Series(tensor.replace("_", " "), thin([float(s) for s in steps], [worst(tensor, s) for s in steps]), number)
        for number, tensor in enumerate(tensors)
    ]
    chart = Chart(
        "Worst relative error of FP8, by tensor", series, "", "", WIDE, 220, log=True,
        marks=[(GAUSSIAN_ERROR, "rounding alone, Gaussian data")],
    )  # fmt: skip
    now = sorted((s for s in samples if s.step == steps[-1]), key=badness, reverse=True)[:12]
    rows = "".join(
        f"<tr><td>{html.escape(s.layer)}</td><td>{html.escape(s.tensor.replace('_', ' '))}</td>"
        f"<td class='n'>{s.relative_error:.2e}</td><td class='n'>{s.underflow:.1e}</td>"
        f"<td class='n'>{s.saturated:.1e}</td><td class='n'>{s.amax:.2e}</td></tr>"
        for s in now
    )
    head = "".join(
        f"<th{' class=n' if i > 1 else ''}>{name}</th>"
        for i, name in enumerate(("layer", "tensor", "relative error", "underflow", "at the limit", "amax"))
    )
    return draw(chart) + f'<h3>Worst of step {steps[-1]}</h3><table class="plain"><tr>{head}</tr>{rows}</table>'


def _empty(text: str) -> str:
    return f'<p class="empty">{html.escape(text)}</p>'
