"""Heat maps as tiny PNG images within SVG: a pixel a cell, so that a hundred thousand cells take kilobytes."""

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.report.charts import Scale, frame, short

# One hue, dark where much: for 1 (balanced) to the most there can be.
SEQUENTIAL = (
    "#e8f1f8",
    "#cfe3f2",
    "#b0d0e8",
    "#8bb9dc",
    "#66a0ce",
    "#4a86bd",
    "#3a6ca8",
    "#2f548f",
    "#273f73",
    "#1e2c55",
)
# Around 1: blue less than the mean, orange more.
DIVERGING = (
    "#1d4f86", "#3a76b0", "#6ba0ce", "#a1c4e2", "#d0e0ee", "#ece9e3", "#f6dcbd", "#f2bd82", "#e99645", "#cf6a12",
    "#9a4708",
)  # fmt: skip
NOTHING, UNKNOWN = "#111418", "#9aa3af"


def _rgb(colour: str) -> bytes:
    return bytes.fromhex(colour[1:])


def png(rows: Sequence[Sequence[int]], palette: Sequence[str]) -> bytes:
    """An image of palette numbers, at most 16, 4 bits a pixel."""
    width = len(rows[0])

    def packed(row: Sequence[int]) -> bytes:
        pairs = [*row, 0] if width % 2 else row
        return bytes(pairs[i] << 4 | pairs[i + 1] for i in range(0, len(pairs), 2))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, len(rows), 4, 3, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + packed(row) for row in rows), 9)
    colours = b"".join(map(_rgb, palette))
    chunks = ((b"IHDR", head), (b"PLTE", colours), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def data_uri(image: bytes) -> str:
    """For an href."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def level(value: float, low: float, high: float, count: int, *, log: bool) -> int:
    """Which of `count` colours from low to high."""
    if log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return min(count - 1, max(0, int((value - low) / (high - low) * count))) if high > low else 0


@dataclass(frozen=True)
class HeatMap:
    """cells: rows of values, None where nothing is known; x: from the first to the last column, in steps.

    low, high: of the colours. diverging: around 1, by logarithm, with 0 in black. labels: of the rows; none where there
    are too many, then `rows_name` stands beside.
    """

    title: str
    cells: Sequence[Sequence[float | None]]
    x: tuple[float, float]
    labels: Sequence[str]
    low: float
    high: float
    diverging: bool = False
    rows_name: str = ""
    note: str = ""
    width: float = 1080.0
    row_height: float = 20.0


def palette(heat: HeatMap) -> tuple[str, ...]:
    """Its colours, then black for nothing and grey for unknown."""
    return (*(DIVERGING if heat.diverging else SEQUENTIAL), NOTHING, UNKNOWN)


def image(heat: HeatMap) -> bytes:
    """The cells."""
    colours = palette(heat)
    count = len(colours) - 2

    def number(value: float | None) -> int:
        if value is None or not math.isfinite(value):
            return count + 1
        if heat.diverging and value == 0:
            return count
        return level(value, heat.low, heat.high, count, log=heat.diverging)

    return png([[number(value) for value in row] for row in heat.cells], colours)


def draw(heat: HeatMap) -> str:
    """The map as a figure with its key."""
    labelled = heat.row_height >= 9
    left = 62.0 if labelled else 30.0
    height = heat.row_height * len(heat.cells)
    x = Scale(heat.x[0], heat.x[1] if heat.x[1] > heat.x[0] else heat.x[0] + 1, left, heat.width - 12)
    parts = [
        f'<image href="{data_uri(image(heat))}" x="{left}" y="0" width="{heat.width - 12 - left:g}" '
        f'height="{height:g}" preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    ]
    for row, label in enumerate(heat.labels):
        if labelled:
            at = (row + 0.5) * heat.row_height + 3.5
            parts.append(
                f'<text class="tick" x="{left - 8}" y="{at:.1f}" text-anchor="end">{html.escape(label)}</text>'
            )
    if not labelled and heat.rows_name:
        middle = height / 2
        parts.append(
            f'<text class="tick" transform="translate(20 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{html.escape(heat.rows_name)}</text>"
        )
    steps = [value for value in x.ticks(max(4, int(heat.width / 130))) if float(value).is_integer()]
    parts += [
        f'<text class="tick" x="{x(value):.1f}" y="{height + 16:.1f}" text-anchor="middle">{value:,.0f}</text>'
        for value in steps
    ]
    note = f'<p class="note">{html.escape(heat.note)}</p>' if heat.note else ""
    title = f"<figcaption>{html.escape(heat.title)}</figcaption>" if heat.title else ""
    return (
        f'<figure class="{frame(heat.width)} heat">{title}<svg viewBox="0 0 {heat.width:g} {height + 22:g}" role="img" '
        f'aria-label="{html.escape(heat.title)}">{"".join(parts)}</svg>{note}</figure>'
    )


def key(heat: HeatMap, what: str) -> str:
    """The colours and what they mean, once for several maps."""
    colours = palette(heat)[:-2]
    swatches = "".join(f'<i style="background:{colour}"></i>' for colour in colours)
    ends = (short(heat.low), short(heat.high))
    extra = f'<span><i style="background:{NOTHING}"></i>no token</span>' if heat.diverging else ""
    return (
        f'<div class="key"><span>{html.escape(what)}</span><span>{ends[0]}</span><span class="ramp">{swatches}</span>'
        f"<span>{ends[1]}</span>{extra}</div>"
    )
