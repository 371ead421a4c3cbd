"""`expertpipe bench kernels`: seconds of each class of kernels on this machine, as a calibration for `expertpipe plan`.

Each class is timed on the shapes of one MoE layer and held against the planner's price of the same shapes. On a CPU the
cluster's numbers are measured too (a product's FLOPs, a copy's bytes) and written beside the calibration. Under
torchrun dispatch and combine are timed as all-to-alls over all ranks. With --trace nothing is timed: the classes are
those of a profiler trace of one overlapped pair.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from launcher.config import ConfigError
from launcher.plan.inputs import CALIBRATION, config_of, folder, hardware_of, of_config
from parallel.plan import calibration
from parallel.plan.hardware import Hardware
from parallel.plan.kernels import GEMM_SHARE, HBM_SHARE, LINK_SHARE, Machine

PUBLISHED = "experiment=deepseek_v3_2048_h800"  # the run of DeepSeek's own trace


@dataclass(frozen=True)
class Sizes:
    """Of the layer that is timed: tokens and rows, hidden and expert width, heads, head size, experts."""

    tokens: int
    rows: int
    hidden: int
    width: int
    heads: int
    head: int
    experts: int


GPU_SIZES = Sizes(4096, 32768, 7168, 2048, 128, 128, 4)
CPU_SIZES = Sizes(512, 1024, 256, 128, 8, 32, 4)


@dataclass(frozen=True)
class Timed:
    """One class: measured and predicted seconds of the same work."""

    kind: str
    what: str
    seconds: float
    predicted: float


def bench_kernels(argv: list[str]) -> int:
    """Prints a row for each kernel and writes the calibration; the exit code."""
    args = _parser().parse_intermixed_args(argv)
    if args.trace is not None:
        return _from_trace(args)
    if args.overrides:
        raise ConfigError([f"{args.overrides[0]}: a run goes with --trace, whose layers it has"])
    import torch

    device = _device(args.device)
    on_cpu = device.type == "cpu"
    if args.device == "cuda" and on_cpu:
        print("expertpipe: --device cuda: no usable GPU here; use --device cpu")
        return 2
    if on_cpu:
        torch.set_num_threads(args.threads)
    clock = Clock(device, args.repeats)
    hardware = measured_hardware(clock) if on_cpu else hardware_of(args.cluster)
    found = list(times(clock, CPU_SIZES if on_cpu else GPU_SIZES, Machine(hardware, hardware.num_sms)))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found += all_to_alls(clock, CPU_SIZES if on_cpu else GPU_SIZES, hardware)
    if int(os.environ.get("RANK", "0")):
        return 0
    name = platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name(device)
    _write(args, found, calibration_tree(found, device=f"cpu {name}" if on_cpu else name))
    if on_cpu:
        cluster = args.out.with_suffix(".cluster.yaml")
        cluster.write_text(cluster_text(hardware))
        if not args.json:
            print(f"wrote {cluster}")
    return 0


def _device(choice: str):
    """What is timed. A GPU is this rank's own, and the current one from here on: no product runs on another rank's."""
    import torch

    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _from_trace(args: argparse.Namespace) -> int:
    """The calibration of a trace, without torch; chunks in training as much slower as in the shipped file."""
    job = of_config(config_of(args.overrides or [PUBLISHED]), hardware_of(args.cluster))
    shape = calibration.shape_in_trace(job)
    found = calibration.from_trace(args.trace, shape, job.hardware)
    layers = found.measured.layers
    predicted = calibration.predicted_classes(shape, job.hardware, layers=layers)
    rows = [
        Timed(kind, f"pair of {layers} layers", found.measured.classes[kind], predicted[kind])
        for kind in found.calibration.factors
    ]
    shipped, tree = calibration.read(folder() / "calibration" / CALIBRATION)
    source = str(tree["training_source"])
    _write(
        args,
        rows,
        calibration.to_tree(found.calibration, found.measured, training=shipped.training, training_source=source),
    )
    return 0


def _write(args: argparse.Namespace, found: list[Timed], tree: dict[str, object]) -> None:
    """The calibration to its file, the rows to the screen."""
    named = {**tree, "source": args.source} if args.source else tree
    args.out.write_text(json.dumps(named, indent=2) + "\n")
    if args.json:
        for row in found:
            print(json.dumps({field.name: getattr(row, field.name) for field in fields(row)}))
        return
    print(f"{'class':<14}{'kernel':<26}{'measured us':>13}{'predicted us':>14}{'factor':>8}")
    for row in found:
        ratio = row.seconds / row.predicted
        print(f"{row.kind:<14}{row.what:<26}{1e6 * row.seconds:13.1f}{1e6 * row.predicted:14.1f}{ratio:8.2f}")
    print(f"wrote {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="expertpipe bench kernels", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help=f"with --trace: the run in the trace (default {PUBLISHED})"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a profiler trace of a pair instead of this machine")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--cluster", default="h100", help="hardware that a GPU's or a trace's seconds are held against")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU, as a rank of the run will have")
    parser.add_argument("--repeats", type=int, default=7, help="of each kernel; the median counts")
    parser.add_argument("--out", type=Path, default=Path("kernels.json"), help="the calibration file")
    parser.add_argument("--source", metavar="TEXT", help="where the seconds are from, as the file is to say")
    parser.add_argument("--json", action="store_true", help="one row a line")
    return parser


class Clock:
    """Median seconds of a call on a device, after one that warms up."""

    def __init__(self, device: object, repeats: int) -> None:
        self.device, self.repeats = device, max(1, repeats)

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds of `call`."""
        call()
        return statistics.median(self._once(call) for _ in range(self.repeats))

    def _once(self, call: Callable[[], object]) -> float:
        import torch

        if getattr(self.device, "type", "cpu") != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3


def measured_hardware(clock: Clock) -> Hardware:
    """This CPU as a cluster of itself: a product of 1,024 rows, a copy of 64 MiB, and links as fast as the copy."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flops = 2 * 1024**3 / clock(lambda: a @ b) / GEMM_SHARE
    block = torch.empty(16 << 20)
    other = torch.empty_like(block)
    copied = 2 * block.nbytes / clock(lambda: other.copy_(block))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    numbers = {
        "num_sms": torch.get_num_threads(), "bf16_flops": flops, "fp8_flops": flops, "fp32_flops": flops,
        "memory_bytes": float(memory),
        "hbm_bytes_per_second": copied / HBM_SHARE, "nvlink_bytes_per_second": copied / 2 / LINK_SHARE,
        "ib_bytes_per_second": copied / 2 / LINK_SHARE, "host_bytes_per_second": copied, "gpus_per_node": 8,
        "dollars_per_gpu_hour": 0.0,
    }  # fmt: skip
    sources = dict.fromkeys(numbers, "expertpipe bench kernels")
    return Hardware(name="CPU", sources=sources, **numbers)  # type: ignore[arg-type]


def cluster_text(hardware: Hardware) -> str:
    """The hardware as the YAML that `expertpipe plan --cluster` reads."""
    lines = [f"name: {hardware.name}"]
    for key, source in hardware.sources.items():
        lines.append(f'{key}: {{value: {getattr(hardware, key)!r}, source: "{source}"}}')
    return "\n".join(lines) + "\n"


def times(clock: Clock, s: Sizes, machine: Machine) -> Iterator[Timed]:
    """Every class that one rank can time, in the model's own operations where there are any."""
    yield from _products(clock, s, machine)
    yield from _attention(clock, s, machine)
    yield from _passes(clock, s, machine)


def _random(clock: Clock, *shape: int, grad: bool = False):
    import torch

    dtype = torch.bfloat16 if getattr(clock.device, "type", "cpu") == "cuda" else torch.float32
    return torch.randn(*shape, device=clock.device, dtype=dtype, requires_grad=grad)  # type: ignore[call-overload]


def _products(clock: Clock, s: Sizes, machine: Machine) -> Iterator[Timed]:
    import torch

    from model.linear import add_grouped_product, add_product, grouped_product

    x, w, y = (_random(clock, *shape) for shape in ((s.tokens, s.hidden), (s.width, s.hidden), (s.tokens, s.width)))
    acc = torch.zeros(s.width, s.hidden, device=w.device)
    forward = machine.gemm(s.tokens, s.width, s.hidden, fp8=False)
    yield Timed("linear_gemm", "forward", clock(lambda: x @ w.t()), forward)
    yield Timed(
        "linear_gemm", "input gradient", clock(lambda: y @ w), machine.gemm(s.tokens, s.hidden, s.width, fp8=False)
    )
    price = machine.gemm(s.width, s.hidden, s.tokens, fp8=False, accumulate=True)
    yield Timed("linear_gemm", "weight gradient", clock(lambda: add_product(acc, y.t(), x)), price)
    rows, each = _random(clock, s.rows, s.hidden), s.rows // s.experts
    counts = (each,) * s.experts
    weights, grads = _random(clock, s.experts, s.hidden, s.width), _random(clock, s.rows, s.width)
    price = machine.grouped(s.rows, s.width, s.hidden, fp8=False, groups=s.experts)
    yield Timed("grouped_gemm", "forward", clock(lambda: grouped_product(rows, weights, counts)), price)
    sums = torch.zeros(s.experts, s.width, s.hidden, device=rows.device)
    price = machine.gemm(s.width, s.hidden, each, fp8=False, kind="grouped_gemm", groups=s.experts, accumulate=True)
    seconds = clock(lambda: add_grouped_product(sums, grads, rows, counts))
    yield Timed("grouped_gemm", "weight gradient", seconds, price)


def _attention(clock: Clock, s: Sizes, machine: Machine) -> Iterator[Timed]:
    import torch

    from model.attention import causal_attention

    q, k, v = (_random(clock, 1, s.heads, s.tokens, s.head, grad=True) for _ in range(3))
    flops = 2.0 * s.heads * s.head * s.tokens * (s.tokens + 1)
    with torch.no_grad():
        seconds = clock(lambda: causal_attention(q, k, v, s.head**-0.5))
    yield Timed("attention", "forward", seconds, machine.attention(flops, backward=False))
    out = causal_attention(q, k, v, s.head**-0.5)
    grad = torch.randn_like(out)
    seconds = clock(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    yield Timed("attention", "backward", seconds, machine.attention(2.6 * flops, backward=True))


def _passes(clock: Clock, s: Sizes, machine: Machine) -> Iterator[Timed]:
    import torch

    from model.mlp import swiglu
    from model.norm import RMSNorm

    x, norm = _random(clock, s.tokens, s.hidden), RMSNorm(s.hidden, 1e-6)
    norm.to(device=x.device, dtype=x.dtype)
    with torch.no_grad():
        size = x.element_size() * x.numel()
        yield Timed("norm", "RMSNorm", clock(lambda: norm(x)), machine.stream("norm", 2 * size))
        gate_up = _random(clock, s.rows, 2 * s.width)
        size = gate_up.element_size() * gate_up.numel()
        yield Timed("elementwise", "SwiGLU", clock(lambda: swiglu(gate_up)), machine.stream("elementwise", 1.5 * size))
        size = x.numel() * (x.element_size() + 1)
        yield Timed("quantise", "tiles of 1 x 128", clock(_quantising(x)), machine.stream("quantise", size))


def _quantising(x_TD) -> Callable[[], object]:
    """Rounds x to E4M3 in one kernel, with one scale for 128 numbers: Triton on a GPU, compiled on a CPU."""
    from model.fp8.native import NativeKernels
    from parallel.expert.kernels.rows import quantise
    from parallel.expert.wire import QUANTISER

    if x_TD.is_cuda:
        return lambda: quantise(x_TD, backend="triton")
    quantiser = replace(QUANTISER, kernels=NativeKernels())
    return lambda: quantiser.quantise(x_TD)


def all_to_alls(clock: Clock, s: Sizes, hardware: Hardware) -> list[Timed]:
    """Dispatch and combine of the layer's rows, spread evenly over all ranks that torchrun started."""
    import torch
    import torch.distributed as dist

    on_cpu = getattr(clock.device, "type", "cpu") == "cpu"
    dist.init_process_group("gloo" if on_cpu else "nccl")
    ranks = dist.get_world_size()
    rows = s.rows // ranks * ranks
    link = hardware.nvlink_bytes_per_second if ranks <= hardware.gpus_per_node else hardware.ib_bytes_per_second
    found = []
    for kind in ("dispatch", "combine"):
        sent = _random(clock, rows, s.hidden)
        arriving = torch.empty_like(sent)
        seconds = clock(lambda sent=sent, arriving=arriving: dist.all_to_all_single(arriving, sent))
        away = sent.nbytes * (ranks - 1) / ranks
        found.append(Timed(kind, f"{ranks} ranks", seconds, away / (LINK_SHARE * link)))
    dist.destroy_process_group()
    return found


def calibration_tree(found: list[Timed], *, device: str) -> dict[str, object]:
    """What `parallel.plan.calibration.read` takes: of each class all seconds over all predicted ones."""
    kinds = dict.fromkeys(row.kind for row in found)
    sums = {
        kind: [sum(getattr(row, name) for row in found if row.kind == kind) for name in ("seconds", "predicted")]
        for kind in kinds
    }
    return {
        "source": f"expertpipe bench kernels on {device}",
        "device": device,
        "class_seconds": {kind: round(seconds, 9) for kind, (seconds, _) in sums.items()},
        "factors": {kind: round(seconds / predicted, 4) for kind, (seconds, predicted) in sums.items()},
    }
