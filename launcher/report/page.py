"""The whole page: header with the run's facts, the sections, style and hover; one file that needs no network."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.report.charts import counted
from launcher.report.read import RunRecord
from launcher.show.display import compact, duration, scientific, with_suffix


def tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """(name, figure, what stands below it) of the header."""
    last, events = record.last, record.events
    planned = record.planned_steps
    recent = events[-min(len(events), 100) :]
    speed = sorted(event.tokens_per_second for event in recent)[len(recent) // 2]
    shares = [event.mfu_causal for event in recent if event.mfu_causal is not None]
    dropped = sum(event.dropped_tokens for event in events)
    spent = sum(event.step_seconds for event in events)
    memory = f"{record.peak_bytes / 2**30:.2f} GiB on a rank" if record.peak_bytes else ""
    found = [
        ("step", f"{last.step:,}", f"of {planned:,}" if planned else ""),
        ("tokens", with_suffix(float(last.tokens)), f"batch {last.batch}" if last.batch else ""),
        ("loss", f"{last.loss:.3f}", "" if last.mtp_loss is None else f"MTP {last.mtp_loss:.3f}"),
        ("gradient norm", compact(last.grad_norm), f"lr {scientific(last.lr)}"),
        ("tokens/s", with_suffix(speed), f"median of the last {len(recent)} steps" if len(recent) > 1 else ""),
        ("worst load", f"{last.expert_load_max_over_mean:.2f}", "busiest expert over mean"),
        ("dropped tokens", f"{dropped:,}", "in all steps"),
        ("time in steps", duration(spent), memory),
    ]  # fmt: skip
    if shares:
        share = sorted(shares)[len(shares) // 2]
        found.insert(5, ("MFU", f"{share:.1%}", "causal attention"))
    return found


def subtitle(record: RunRecord) -> str:
    """Model, layout and machine in a line."""
    c: Mapping[str, Any] = record.config
    parallel, train = c.get("parallel", {}), c.get("train", {})
    parts = []
    if parallel:
        pipeline, data, expert = (parallel.get(name, "?") for name in ("pipeline", "data", "expert"))
        parts.append(f"pipeline {pipeline} ({parallel.get('schedule')}) \u00d7 data {data}, expert {expert}")
    if train.get("precision"):
        parts.append(train["precision"])
    parts += [str(record.header[key]) for key in ("device",) if key in record.header]
    if "torch" in record.header:
        parts.append(f"torch {record.header['torch']}")
    return " \u00b7 ".join(parts)


def state(record: RunRecord) -> str:
    """How far the run is, in words."""
    planned = record.planned_steps
    if planned and record.last.step >= planned:
        return "finished"
    return f"unfinished: {record.last.step / planned:.0%} of its steps" if planned else "unfinished"


def page(record: RunRecord, sections: Mapping[str, str]) -> str:
    """HTML. sections: by title, in order; the configuration is added last."""
    name = str(record.header.get("name", record.folder.name))
    facts = "".join(
        f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd><small>{html.escape(more)}</small></div>"
        for what, value, more in tiles(record)
    )
    parts = {**sections}
    if record.config_text:
        parts["Configuration"] = f"<pre>{html.escape(record.config_text)}</pre>"
    anchors = {title: title.lower().replace(" ", "-") for title in parts}
    links = "".join(f'<a href="#{anchors[title]}">{html.escape(title)}</a>' for title in parts)
    body = "".join(
        f'<section id="{anchors[title]}"><h2>{html.escape(title)}</h2>{inside}</section>'
        for title, inside in parts.items()
    )
    saved = ""
    if record.checkpoints:
        saved = f" \u00b7 {counted(len(record.checkpoints), 'checkpoint')}, newest {record.checkpoints[-1]}"
    return (
        _PAGE.replace("@STYLE@", _beside("page.css"))
        .replace("@SCRIPT@", _beside("page.js"))
        .replace("@TITLE@", html.escape(name))
        .replace("@SUBTITLE@", html.escape(subtitle(record)))
        .replace("@STATE@", html.escape(state(record) + saved))
        .replace("@FACTS@", facts)
        .replace("@LINKS@", links)
        .replace("@BODY@", body)
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@TITLE@</title><style>@STYLE@</style></head><body>
<header><h1>@TITLE@</h1><p>@SUBTITLE@</p><p>@STATE@</p><dl>@FACTS@</dl></header>
<nav><div>@LINKS@</div></nav>
<main>@BODY@
<footer>Written by expertpipe report. Horizontal axes count steps; dashed vertical lines are steps with a warning. Hover
over a curve for its values.</footer>
</main><script>@SCRIPT@</script></body></html>
"""
