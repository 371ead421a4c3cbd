"""Line and area charts as inline SVG: colours are the page's variables, so one picture serves light, dark and print."""

import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from launcher.report.thin import Thinned
from launcher.show.display import compact

LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 10.0, 24.0
NUM_COLOURS = 11  # --c0 .. of the page


@dataclass(frozen=True)
class Series:
    """One curve. colour: number of the page's palette. faint: drawn thin behind the others, not named."""

    name: str
    points: Thinned
    colour: int = 0
    faint: bool = False
    line: Sequence[float] | None = None  # in place of the mean, such as a smoothed one


@dataclass(frozen=True)
class Chart:
    """height, width: of the picture's own units, which are pixels on a laptop. log: a logarithmic y axis."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    note: str = ""
    width: float = 520.0
    height: float = 210.0
    log: bool = False
    from_zero: bool = False
    marks: Sequence[tuple[float, str]] = ()  # horizontal lines, with what they say
    points: Sequence[tuple[float, float, str]] = ()  # single values at an x
    events: Sequence[float] = ()  # vertical lines at an x
    format: Callable[[float], str] = field(default=lambda value: short(value))


def short(value: float) -> str:
    """A number of an axis in few characters: 0.5, 12k, 3M, 2e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}"
    if size < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 step`, `1,200 steps`: a number with its noun. plural: where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= span / about)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """From values to the picture: a straight line, or one in logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value stands."""
        low, high, at = (self.low, self.high, value)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Where to write numbers."""
        if not self.log:
            return nice_ticks(self.low, self.high, about)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [n * 10.0**p for p in powers for n in (1, 2, 5) if self.low <= n * 10.0**p <= self.high]
        tens = [value for value in found if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
        return found if len(found) <= 6 else tens or found[:: len(found) // 5]


def _bounds(chart: Chart) -> tuple[float, float]:
    values = [v for s in chart.series for v in (*s.points.low, *s.points.high)]
    values += [value for value, _ in chart.marks] + [y for _, y, _ in chart.points]
    values = [v for v in values if math.isfinite(v) and (v > 0 or not chart.log)]
    if not values:
        return (0.1, 1.0) if chart.log else (0.0, 1.0)
    low, high = min(values), max(values)
    if chart.log:
        return (low / 1.15, high * 1.15) if low < high else (low / 2, high * 2)
    if chart.from_zero or (low >= 0 and low < 0.25 * high):
        low = 0.0
    if low == high:
        low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if low else (0.0, 1.0)
    return (low if low == 0 else low - 0.05 * (high - low)), high + 0.06 * (high - low)


def path(points: Iterable[tuple[float, float]]) -> str:
    """An SVG path through the points, broken where one is not finite."""
    parts, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(parts)


def _band(points: Thinned, x: Scale, y: Scale) -> str:
    """From the least to the most of each stretch."""
    pairs = [(x(at), y(a), y(b)) for at, a, b in zip(points.x, points.low, points.high, strict=True) if a == a]
    if not pairs:
        return ""
    there = "L".join(f"{at:.1f} {top:.1f}" for at, _, top in pairs)
    back = "L".join(f"{at:.1f} {bottom:.1f}" for at, bottom, _ in reversed(pairs))
    return f"M{there}L{back}Z"


def draw(chart: Chart) -> str:
    """The chart as a figure with title, legend and note; a hover shows the values of a step."""
    xs = [value for s in chart.series for value in s.points.x]
    low_x, high_x = (min(xs), max(xs)) if xs else (0.0, 1.0)
    x = Scale(low_x, high_x if high_x > low_x else low_x + 1, LEFT, chart.width - RIGHT)
    low, high = _bounds(chart)
    y = Scale(low, high, chart.height - BOTTOM, TOP, chart.log)
    parts = [axes(x, y, chart.width, chart.height, chart.format)]
    parts += [
        f'<line class="event" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{chart.height - BOTTOM}"/>'
        for at in chart.events if low_x <= at <= high_x
    ]  # fmt: skip
    parts += [
        f'<line class="mark" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        for value, _ in chart.marks
    ]
    parts += [_curve(series, x, y, chart) for series in chart.series]
    parts += [  # over the curves, which may cross them
        f'<text class="marked" x="{chart.width - RIGHT - 4}" y="{y(value) - 5:.1f}">{html.escape(text)}</text>'
        for value, text in chart.marks
    ]
    for at, value, text in chart.points:
        parts.append(
            f'<path class="diamond" d="M{x(at):.1f} {y(value) - 5:.1f}l5 5l-5 5l-5-5Z">'
            f"<title>{html.escape(text)}</title></path>"
        )
    return figure(chart, "".join(parts), x)


def _curve(series: Series, x: Scale, y: Scale, chart: Chart) -> str:
    points, line = series.points, series.line or series.points.mean
    colour = f"var(--c{series.colour % NUM_COLOURS})"
    found = ""
    if points.size > 1 and not series.faint:
        found += f'<path d="{_band(points, x, y)}" fill="{colour}" opacity=".16"/>'
    drawn = [
        (x(at), y(v) if v == v and (v > 0 or not chart.log) else math.nan) for at, v in zip(points.x, line, strict=True)
    ]
    style = 'stroke-width="1" opacity=".38"' if series.faint else 'stroke-width="1.8"'
    found += f'<path d="{path(drawn)}" fill="none" stroke="{colour}" stroke-linejoin="round" {style}/>'
    if len(drawn) == 1 and math.isfinite(drawn[0][1]):
        found += f'<circle cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="3" fill="{colour}"/>'
    return found


def axes(x: Scale, y: Scale, width: float, height: float, form: Callable[[float], str]) -> str:
    """Grid and numbers; x in steps."""
    parts = []
    for value in y.ticks(4 if height < 260 else 6):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{form(value)}</text>')
    for value in x.ticks(max(3, int(width / 110))):
        if float(value).is_integer():
            parts.append(
                f'<text class="tick" x="{x(value):.1f}" y="{height - 7}" text-anchor="middle">{value:,.0f}</text>'
            )
    return "".join(parts)


def frame(width: float) -> str:
    """The class of a figure: one as wide as the page keeps its size on a narrow one and is scrolled."""
    return "chart wide" if width > 700 else "chart"


def figure(chart: Chart, inside: str, x: Scale, *, legend: str | None = None) -> str:
    """The frame of a picture. legend: in place of the series' own."""
    named = [series for series in chart.series if not series.faint]
    if legend is None:
        legend = "".join(
            f'<span><i style="background:var(--c{s.colour % NUM_COLOURS})"></i>{html.escape(s.name)}</span>'
            for s in named
        )  # fmt: skip
        legend = legend if len(named) > 1 else ""
    data = {
        "left": LEFT, "right": chart.width - RIGHT, "top": TOP, "bottom": chart.height - BOTTOM, "width": chart.width,
        "low": x.low, "high": x.high, "x": named[0].points.x if named else [],
        "span": named[0].points.size if named else 1,
        "series": [
            {"name": s.name, "colour": s.colour % NUM_COLOURS, "y": [_text(v) for v in s.points.mean]} for s in named
        ],
    }  # fmt: skip
    unit = f' <span class="unit">{html.escape(chart.unit)}</span>' if chart.unit else ""
    note = f'<p class="note">{html.escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="{frame(chart.width)}"><figcaption>{html.escape(chart.title)}{unit}</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {chart.width:g} {chart.height:g}" role="img" '
        f'aria-label="{html.escape(chart.title)}">{inside}</svg>'
        f'<script type="application/json">{json.dumps(data, separators=(",", ":")).replace("<", "")}</script></div>'
        f'<div class="legend">{legend}</div>{note}</figure>'
    )


def _text(value: float) -> str:
    return compact(value, 8) if math.isfinite(value) else "-"


@dataclass(frozen=True)
class Layer:
    """One band of a stack."""

    name: str
    values: Sequence[float]
    colour: int


def stack(chart: Chart, x_values: Sequence[float], layers: Sequence[Layer]) -> str:
    """Bands one on the other, as areas over x; chart.series name and colour them."""
    totals = [sum(layer.values[i] for layer in layers) for i in range(len(x_values))]
    high = max(totals, default=1.0) or 1.0
    x = Scale(x_values[0], x_values[-1] if x_values[-1] > x_values[0] else x_values[0] + 1, LEFT, chart.width - RIGHT)
    y = Scale(0.0, high * 1.04, chart.height - BOTTOM, TOP)
    inside, base = [axes(x, y, chart.width, chart.height, chart.format)], [0.0] * len(x_values)
    single = len(x_values) == 1
    for layer in layers:
        top = [low + value for low, value in zip(base, layer.values, strict=True)]
        ends = (x(x_values[0]), chart.width - RIGHT) if single else None
        upper = [(ends[i] if ends else x(at), y(v)) for i, (at, v) in enumerate(_doubled(x_values, top, single))]
        lower = [(ends[i] if ends else x(at), y(v)) for i, (at, v) in enumerate(_doubled(x_values, base, single))]
        inside.append(
            f'<path d="{path(upper)}{path(reversed(lower)).replace("M", "L", 1)}Z" fill="var(--c{layer.colour})"/>'
        )
        base = top
    return figure(chart, "".join(inside), x)


def _doubled(x: Sequence[float], y: Sequence[float], single: bool) -> list[tuple[float, float]]:
    pairs = list(zip(x, y, strict=True))
    return pairs * 2 if single else pairs
