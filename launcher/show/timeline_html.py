"""A pipeline schedule in time as one HTML file that needs nothing else: hover shows an action, the wheel zooms."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from launcher.show.timeline import FILLS, KIND_NAMES, Rows, Span, Ways, checked_end, span_parts


def timeline_html(
    rows: Rows,
    path: Path | str,
    *,
    title: str,
    subtitle: str,
    time_label: str,
    labels: Sequence[str] | None = None,
    ways: Ways | None = None,
    below: str = "",
) -> None:
    """Write the page. Boxes are drawn on a canvas: a hundred thousand of them stay quick. ValueError as `timeline`.

    below: HTML that follows the picture.
    """
    end = checked_end(rows)
    shown = {(part.direction, part.kind) for row in rows for span in row for part in span_parts(span)}
    data = {
        "end": end,
        "labels": list(labels or [f"rank {rank}" for rank in range(len(rows))]),
        "rows": [[_box(span) for span in sorted(row, key=lambda span: span.start)] for row in rows],
        "fills": FILLS,
        "unit": time_label,
    }
    names = (ways or Ways()).names(len(rows))
    legend = "".join(
        f'<span><i style="background:{FILLS[way][kind]}"></i>{KIND_NAMES[kind]}'
        + (f", {html.escape(names[way])}" if any(direction == 1 for direction, _ in shown) else "")
        + "</span>"
        for way in (0, 1)
        for kind in ("F", "B", "I", "W")
        if (way, kind) in shown
    )
    page = _PAGE.replace("@TITLE@", html.escape(title)).replace("@SUBTITLE@", html.escape(subtitle))
    page = page.replace("@LEGEND@", legend).replace("@BELOW@", below)
    page = page.replace("@DATA@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _box(span: Span) -> list[object]:
    """Start, end, what to say, then kind, hue and number of each part; a forward above its backward."""
    said = f"{'F' if span.kind == 'FB' else span.kind} stage {span.stage} micro-batch {span.microbatch}"
    if span.kind == "FB" and span.partner_stage is not None:
        said += f" with {span.partner_kind} stage {span.partner_stage} micro-batch {span.partner_microbatch}"
    parts = [[part.kind, part.direction, part.microbatch] for part in span_parts(span)]
    return [round(span.start, 6), round(span.end, 6), said, parts]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@TITLE@</title>
<style>
body{font:14px/1.4 system-ui,sans-serif;color:#1f2430;margin:24px;background:#fff}
h1{font-size:19px;margin:0}
p{margin:2px 0 12px;color:#667085}
#chart{position:relative}
canvas{display:block;width:100%;cursor:grab}
#tip{position:absolute;display:none;pointer-events:none;background:#1f2430;color:#fff;border-radius:5px;
padding:5px 9px;font-size:12.5px;white-space:nowrap;z-index:1}
#legend{margin-top:8px}
#legend span{margin-right:16px;color:#475467;white-space:nowrap}
#legend i{display:inline-block;width:14px;height:14px;margin-right:5px;border-radius:3px;vertical-align:-2px;
box-shadow:inset 0 0 0 1px #0002}
</style></head><body>
<h1>@TITLE@</h1><p>@SUBTITLE@</p>
<div id="chart"><canvas id="canvas"></canvas><div id="tip"></div></div>
<p id="legend">@LEGEND@</p>
<p>Hover for an action; wheel zooms, drag moves, double click shows all again.</p>
@BELOW@
<script>
"use strict";
const data = @DATA@;
const canvas = document.getElementById("canvas"), tip = document.getElementById("tip"), g = canvas.getContext("2d");
const dark = {B: [1, 1], I: [1, 0], F: [0, 0], W: [0, 0]};
const rowHeight = Math.max(18, Math.min(30, 620 / data.rows.length)), bottom = 42;
const digits = String(Math.max(0, ...data.rows.flatMap(row => row.flatMap(box => box[3].map(p => p[2]))))).length;
let left = 60, from = 0, to = data.end, width = 0, dragged = null;
const x = t => left + (t - from) / (to - from) * (width - left);
const time = px => from + (px - left) / (width - left) * (to - from);
function ticks() {
  const rough = (to - from) / 8, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough), found = [];
  for (let t = Math.ceil(from / step) * step; t <= to + 1e-9; t += step) found.push(+t.toPrecision(10));
  return found;
}
function part(kind, way, number, a, b, top, height) {
  g.fillStyle = data.fills[way][kind];
  const gap = b - a > 4 ? 0.7 : 0;
  g.fillRect(a + gap / 2, top, Math.max(0.3, b - a - gap), height);
  const text = String(number), size = Math.min(12, height * 0.72);
  if (size < 7 || digits * size * 0.62 > b - a - 3) return; // all numbers or none
  g.fillStyle = dark[kind][way] ? "#fff" : "#1f2430";
  g.font = size + "px system-ui,sans-serif"; g.textAlign = "center"; g.textBaseline = "middle";
  g.fillText(text, (a + b) / 2, top + height / 2 + 0.5);
}
function draw() {
  const ratio = window.devicePixelRatio || 1, height = data.rows.length * rowHeight + bottom;
  width = canvas.parentElement.clientWidth;
  canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.height = height + "px";
  g.setTransform(ratio, 0, 0, ratio, 0, 0); g.clearRect(0, 0, width, height);
  g.font = "12px system-ui,sans-serif";
  left = 12 + Math.max(...data.labels.map(label => g.measureText(label).width));
  g.fillStyle = "#f6f7f9"; g.fillRect(left, 0, width - left, height - bottom);
  g.save(); g.beginPath(); g.rect(left, 0, width - left, height - bottom); g.clip();
  data.rows.forEach((row, r) => row.forEach(([start, end, said, parts]) => {
    if (end < from || start > to) return;
    const a = x(start), b = x(end), high = (rowHeight - 3) / parts.length;
    parts.forEach(([kind, way, number], i) =>
      part(kind, way, number, a, b, r * rowHeight + 1.5 + i * high, high - (parts.length > 1 ? 0.5 : 0)));
  }));
  g.restore();
  g.font = "12px system-ui,sans-serif"; g.fillStyle = "#475467"; g.textBaseline = "middle"; g.textAlign = "right";
  data.labels.forEach((label, r) => g.fillText(label, left - 6, (r + 0.5) * rowHeight));
  g.textAlign = "center";
  ticks().forEach(t => {
    g.fillRect(x(t), height - bottom, 1, 4);
    g.fillText(t, Math.min(Math.max(x(t), left + 3), width - 14), height - bottom + 13);
  });
  g.fillText(data.unit, (left + width) / 2, height - 8);
}
function under(event) {
  const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  const row = data.rows[Math.floor(py / rowHeight)], t = time(px);
  if (!row || px < left) return null;
  return row.find(([start, end]) => start <= t && t < end) || null;
}
canvas.addEventListener("mousemove", event => {
  if (dragged !== null) {
    const moved = (dragged - event.clientX) / (width - left) * (to - from);
    const by = Math.max(-from, Math.min(data.end - to, moved));
    from += by; to += by; dragged = event.clientX; draw();
  }
  const found = under(event), box = canvas.getBoundingClientRect();
  tip.style.display = found ? "block" : "none";
  if (!found) return;
  const show = value => +value.toPrecision(6);
  tip.textContent = found[2] + ": " + show(found[0]) + " to " + show(found[1]) + ", " + show(found[1] - found[0])
    + " long (" + data.unit + ")";
  const px = event.clientX - box.left;
  tip.style.left = Math.max(0, Math.min(px + 14, width - tip.offsetWidth)) + "px";
  tip.style.top = event.clientY - box.top + 18 + "px";
});
canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
canvas.addEventListener("mousedown", event => { dragged = event.clientX; });
window.addEventListener("mouseup", () => { dragged = null; });
canvas.addEventListener("dblclick", () => { from = 0; to = data.end; draw(); });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const t = time(event.clientX - canvas.getBoundingClientRect().left), by = Math.exp(event.deltaY * 0.002);
  const span = Math.min(data.end, Math.max(data.end / 5000, (to - from) * by));
  from = Math.max(0, Math.min(data.end - span, t - (t - from) * span / (to - from))); to = from + span; draw();
}, {passive: false});
window.addEventListener("resize", draw);
draw();
</script></body></html>
"""
