"""`expertpipe fp8-report RUN`: where FP8 hurts, from the samples in a run's event log (fp8.watch_every)."""

import json
import math
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from launcher.record.events import read

TENSORS = ("input", "swiglu_input", "weight", "gradient", "gradient_columns")
# What rounding to E4M3 alone costs on Gaussian data; clearly above it, a tile's range is too wide.
GAUSSIAN_ERROR = 2.7e-2
NOT_FINITE = "red"  # no colour of the scale


class ReportError(ValueError):
    """The log has no samples."""

    user_error = True


@dataclass(frozen=True)
class Sample:
    """One tensor in one sampled step; the figures of `model.fp8.watch.TensorStats`."""

    step: int
    layer: str
    tensor: str
    amax: float
    saturated: float
    underflow: float
    relative_error: float


def fp8_report(argv: list[str]) -> int:
    """Print the report, write the picture with --png, or print everything with --json; the exit code."""
    parser = ArgumentParser(
        prog="expertpipe fp8-report",
        description="Where FP8 hurts: amax, saturation, underflow and error of every tensor, from the event log.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or its events.jsonl")
    parser.add_argument("--png", action="store_true", help="also draw fp8.png beside the log")
    parser.add_argument("--worst", type=int, default=10, help="tensors to list (default 10)")
    parser.add_argument("--json", action="store_true", help="every sample as one JSON object")
    args = parser.parse_args(argv)
    log = args.run / "events.jsonl" if args.run.is_dir() or not args.run.suffix else args.run
    samples = samples_of(log)
    if args.json:
        print(json.dumps({"samples": [{k: _plain(v) for k, v in asdict(s).items()} for s in samples]}))
    else:
        print("\n".join(lines(samples, num_worst=args.worst)))
    if args.png:
        path = log.with_name("fp8.png")
        draw(samples, path)
        if not args.json:
            print(f"drawn in {path}")
    return 0


def samples_of(log: Path) -> list[Sample]:
    """All samples of a log, oldest first; ReportError when there are none."""
    # rows as StepEvent.fp8 documents them
    rows = [(event.step, cast(tuple[Any, ...], row)) for event in read(log) for row in event.fp8]
    samples = [Sample(step, *row) for step, row in rows]
    if not samples:
        from launcher.report.read import read_run

        raise ReportError(f"{log}: no FP8 samples{_how_to_sample(read_run(log).config)}")
    return samples


def _how_to_sample(config: Mapping[str, Any]) -> str:
    """What to change in a run of this configuration, {} if it is not known: keys that its back ends take."""
    precision, fp8 = config.get("train", {}).get("precision"), config.get("fp8", {})
    keys, unseen = [], []
    if fp8.get("backend") == "transformer_engine":
        keys.append("fp8.backend=oracle_fast")
        unseen.append("Transformer Engine")
    if fp8.get("grouped") == "deep_gemm":
        keys.append("fp8.grouped=same")
        unseen.append("DeepGEMM")
    every = fp8.get("watch_every", 0)
    if precision == "fp8" and every and not keys:
        return f" yet; steps that are multiples of fp8.watch_every={every} are sampled"
    why = f" ({' and '.join(unseen)}, which the run chose, cannot be sampled)" if unseen else ""
    return f"; train with {' '.join(['train.precision=fp8', 'fp8.watch_every=10', *keys])}{why}"


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def badness(sample: Sample) -> float:
    """By which samples are ordered: the relative error, infinity where the tensor was not finite."""
    return _nan_largest(sample.relative_error)


def _nan_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _names(samples: Sequence[Sample]) -> list[str]:
    return [tensor for tensor in TENSORS if any(s.tensor == tensor for s in samples)]


def lines(samples: Sequence[Sample], *, num_worst: int) -> Iterator[str]:
    """The report of the last sample, at most 80 columns, and how errors moved since the first."""
    first, last = samples[0].step, samples[-1].step
    now = [s for s in samples if s.step == last]
    yield f"step {last}; samples of {len({s.step for s in samples})} steps since step {first}"
    yield f"rounding alone costs {GAUSSIAN_ERROR:.1e} on Gaussian data"
    yield ""
    yield f"{'tensor':<18}{'error: median':>14}{'worst':>9}{'first':>9}{'underflow':>11}{'at 448':>9}{'amax':>10}"
    for tensor in _names(now):
        group = [s for s in now if s.tensor == tensor]
        errors = sorted(map(badness, group))
        since = min(s.step for s in samples if s.tensor == tensor)
        begin = max(badness(s) for s in samples if (s.step, s.tensor) == (since, tensor))
        most = [max(_nan_largest(getattr(s, name)) for s in group) for name in ("underflow", "saturated", "amax")]
        yield (
            f"{tensor:<18}{errors[len(errors) // 2]:>14.2e}{errors[-1]:>9.1e}{begin:>9.1e}"
            f"{most[0]:>11.1e}{most[1]:>9.1e}{most[2]:>10.2e}"
        )
    yield ""
    yield f"{f'the {min(num_worst, len(now))} worst':<45}{'tensor':<17}{'error':>8}{'underflow':>10}"
    for s in sorted(now, key=badness, reverse=True)[:num_worst]:
        yield f"{_short(s.layer, 44):<45}{s.tensor:<17}{s.relative_error:>8.1e}{s.underflow:>10.1e}"
    bad = [s for s in samples if math.isnan(s.relative_error)]
    if bad:
        yield ""
        yield f"not finite first: {bad[0].tensor} of {bad[0].layer} in step {bad[0].step}"


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]


def _place(layer: str) -> tuple[str, str]:
    """(block, linear) of a name: ("3", "experts.down_proj"), ("mtp 0", "eh_proj")."""
    top, number, *rest = layer.split(".")
    block = number if top == "layers" else f"{top} {number}"
    return block, ".".join(part for part in rest if part not in ("block", "mlp", "self_attn"))


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Error and underflow of the last sample by block and linear, and the worst error of every sample, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    now = [s for s in samples if s.step == samples[-1].step]
    tensors = _names(now)
    places = [_place(s.layer) for s in now]
    blocks = list(dict.fromkeys(block for block, _ in sorted(places, key=_block_order)))
    linears = list(dict.fromkeys(linear for _, linear in places))
    height = 2.2 + 0.5 * len(linears)
    figure = Figure(figsize=(2.2 + 2.6 * len(tensors), height + 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=[height, 2.6]))
    axes = top.subplots(2, len(tensors), sharex=True, sharey=True, squeeze=False)
    for row, (name, label, low, high) in enumerate(
        [("relative_error", "relative error", 1e-2, 1e-1), ("underflow", "underflow", 1e-6, 1e-1)]
    ):
        image = None
        for column, tensor in enumerate(tensors):
            grid = _grid([s for s in now if s.tensor == tensor], name, blocks, linears, low)
            image = _heat(axes[row][column], grid, low, high)
            axes[row][column].set_title(tensor if row == 0 else "", fontsize=9)
            axes[row][column].set_xticks(range(len(blocks)), blocks, fontsize=7, rotation=90 if len(blocks) > 8 else 0)
            axes[row][column].set_yticks(range(len(linears)), linears, fontsize=7)
            if row == 1:
                axes[row][column].set_xlabel("block", fontsize=8)
        top.colorbar(image, ax=list(axes[row]), label=label, extend="both")
    _history(bottom.subplots(), samples, tensors)
    colours = "white where a block has no such linear"
    if not all(math.isfinite(s.relative_error) for s in now):
        colours += f", {NOT_FINITE} where a tensor was not finite"
    figure.suptitle(f"FP8 at step {samples[-1].step}: {colours}", fontsize=10)
    figure.savefig(path, dpi=130)


def _block_order(place: tuple[str, str]) -> tuple[bool, int]:
    block = place[0]
    return not block.isdecimal(), int(block.split()[-1])


def _grid(
    samples: Sequence[Sample], name: str, blocks: Sequence[str], linears: Sequence[str], low: float
) -> list[list[float]]:
    grid = [[math.nan] * len(blocks) for _ in linears]
    for s in samples:
        block, linear = _place(s.layer)
        value = getattr(s, name)
        grid[linears.index(linear)][blocks.index(block)] = _nan_largest(max(value, low / 2))
    return grid


def _heat(axis: Any, grid: list[list[float]], low: float, high: float) -> Any:
    """The grid as a picture: white where it has NaN, NOT_FINITE where it has infinity."""
    from matplotlib.colors import ListedColormap, LogNorm

    axis.tick_params(length=0)
    shape: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    # a cell that is not finite has no colour of a scale
    marks = [[1.0 if math.isinf(value) else math.nan for value in row] for row in grid]
    axis.imshow(marks, cmap=ListedColormap([NOT_FINITE]), vmin=0, vmax=1, **shape)
    finite = [[math.nan if math.isinf(value) else value for value in row] for row in grid]
    return axis.imshow(finite, norm=LogNorm(low, high), cmap="viridis", **shape)


def _history(axis: Any, samples: Sequence[Sample], tensors: Sequence[str]) -> None:
    steps = list(dict.fromkeys(s.step for s in samples))
    for tensor in tensors:
        at = [[badness(s) for s in samples if (s.step, s.tensor) == (n, tensor)] for n in steps]
        worst = [max(errors, default=math.nan) for errors in at]
        axis.plot(steps, worst, marker="o", markersize=3, label=tensor)
    axis.axhline(GAUSSIAN_ERROR, color="grey", linewidth=0.8, linestyle="--", label="Gaussian data")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("worst relative error")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
