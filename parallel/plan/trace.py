"""Seconds of each class of kernels from a PyTorch profiler trace, and the calibration that follows from them. No torch.

The trace is one overlapped pair: a forward and a backward of some MoE layers. A name says the class of a kernel where
that is certain; a kernel that no class knows is never counted in silence.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.plan.hardware import HardwareError
from parallel.plan.kernels import CLASSES, Calibration

# The first pattern that a kernel's name contains says its class. `wait`: a rank looking for its peers. `outside`: of no
# layer. `gemm`, `library`: products that only their place, or what else is in the trace, tells apart.
_PATTERNS = (
    ("wait", r"cached_notify|notify_dispatch|nccl.*barrier"),
    ("outside", r"nccl.*(AllReduce|ReduceScatter|AllGather|Broadcast)"),
    ("dispatch", r"::dispatch<|get_dispatch_layout|ep_(dispatch|layout|exchange|tables)_kernel"),
    ("combine", r"::combine<|ep_combine_kernel"),
    ("attention", r"flash|attn|fmha|sdpa"),
    ("grouped_gemm", r"[mk]_grouped|GroupProblemShape|GemmType\)[1-9]"),
    (
        "quantise",
        r"(?<!road)cast|dequantise|quantise_kernel|grouped_gemm::cuda::utils::transpose|batched_transpose|special_fmt",
    ),
    ("norm", r"layer_?norm|rms_?norm"),
    ("gemm", r"fp8_ptp128c|fp8_dptp128c|deep_gemm"),
    ("library", r"nvjet|cublas|xmma_gemm|cutlass_\d+_\w*gemm|cutlass::gemm|splitKreduce"),
    (
        "elementwise",
        r"at::native|at6native|elementwise|Memcpy|Memset|^triton_(poi|red|per)_|_copy_tensor|rotary|swiglu|silu"
        r"|^(gather|combine)_kernel$"
        r"|cuda::(expand_to_fused|reduce_fused|get_fused_mapping|clean_and_count|topk_sum|aux_fi|unique_group)"
        r"|fill_tensormaps",
    ),
    ("unknown", r""),
)
_GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
_BACKWARD = r"FlashAttnBwd(?!P)|flash_bwd_dq_dk_dv|bprop|fmha_cutlassB"  # of attention, one kernel a layer
MOST_UNKNOWN = 0.02  # of the kernels' seconds
_WHAT_WORKS = (
    "record one with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) and its export_chrome_trace, or leave "
    "--trace out: DeepSeek's published one then calibrates"
)


@dataclass(frozen=True)
class TraceSummary:
    """One pair as measured: its layers, seconds in all, of kernels by class, of each stream while anything ran on it.

    unknown: seconds of kernels whose names no class knows, counted with `elementwise`, by name.
    """

    seconds: float
    classes: Mapping[str, float]
    num_kernels: int
    compute_busy: float
    transfer_busy: float
    device: str
    layers: int
    unknown: Mapping[str, float]


def read_trace(path: Path, *, local_experts: int, layers: int | None = None) -> TraceSummary:
    """The pair in a trace of torch.profiler's, also gzipped.

    layers: of the pair, None: as many as it has backward kernels of attention. local_experts: of a rank. HardwareError
    for a file that is none, has no kernels, or is of another number of layers or experts.
    """
    kernels, device = _kernels(path)
    layers = _layers(kernels, layers, where=path)
    start = min(k["ts"] for k in kernels)
    end = max(k["ts"] + k["dur"] for k in kernels)
    classes: dict[str, float] = {kind: 0.0 for kind in (*CLASSES, "wait")}
    streams: dict[bool, list[Any]] = {False: [], True: []}
    found: dict[str, list[dict[str, Any]]] = {}
    for kernel in kernels:
        found.setdefault(class_of(kernel["name"]), []).append(kernel)
    # Beside products with names of their own, those of a library are the router's, which count as elementwise.
    named = "gemm" in found or "grouped_gemm" in found
    found.setdefault("elementwise" if named else "gemm", []).extend(found.pop("library", ()))
    unknown: dict[str, float] = {}
    for kernel in found.pop("unknown", ()):
        unknown[kernel["name"]] = unknown.get(kernel["name"], 0.0) + kernel["dur"] * 1e-6
        found.setdefault("elementwise", []).append(kernel)
    for kind, spans in found.items():
        if kind != "outside":
            streams[kind in ("wait", "dispatch", "combine")] += spans
        if kind in classes:
            classes[kind] += sum(span["dur"] for span in spans) * 1e-6
    products = _split_products(found.get("gemm", []), layers=layers, local_experts=local_experts, where=path)
    for kind, spans in products.items():
        classes[kind] += _union(spans)
    return TraceSummary(
        (end - start) * 1e-6, classes, len(kernels), _union(streams[False]), _union(streams[True]), device, layers,
        unknown,
    )  # fmt: skip


def class_of(name: str) -> str:
    """Class of a kernel by its name: one of CLASSES, or of what `_PATTERNS` has beside them."""
    return next(kind for kind, pattern in _PATTERNS if re.search(pattern, name))


def calibrate(measured: TraceSummary, predicted: Mapping[str, float], *, source: str) -> Calibration:
    """Factors: measured over predicted seconds of each class that is predicted.

    HardwareError names those that have no kernels in the trace, and the longest of the names that no class knows; also
    where such kernels take more than 2% of the time.
    """
    missing = [kind for kind in CLASSES if predicted.get(kind) and not measured.classes[kind]]
    longest = sorted(measured.unknown.items(), key=lambda found: -found[1])[:3]
    names = ", ".join(f"{name[:60]} ({1e3 * seconds:.3g} ms)" for name, seconds in longest)
    if missing:
        raise HardwareError(
            f"{source}: no kernels of {', '.join(missing)}, which the shapes have; "
            f"{f'longest that no class knows: {names}' if names else 'every kernel is of another class'}; "
            "use a trace of one overlapped pair of this model's layers, or leave --trace out"
        )
    share = sum(measured.unknown.values()) / sum(measured.classes.values())
    if share > MOST_UNKNOWN:
        raise HardwareError(
            f"{source}: {share:.0%} of the kernels' time is of no known class, at most {MOST_UNKNOWN:.0%} may be: "
            f"{names}; leave --trace out, or name them in parallel/plan/trace.py"
        )
    return Calibration(source, {k: measured.classes[k] / predicted[k] for k in CLASSES if predicted.get(k)})


def _kernels(path: Path) -> tuple[list[dict[str, Any]], str]:
    try:
        content = path.read_bytes()
        tree = json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise HardwareError(f"{path}: not a profiler trace: {error}; {_WHAT_WORKS}") from error
    events = tree.get("traceEvents") if isinstance(tree, dict) else None
    found = [e for e in events or () if isinstance(e, dict) and e.get("cat") in _GPU_EVENTS and _is_timed(e)]
    if not found:
        raise HardwareError(f"{path}: not a profiler trace of a GPU, no kernels in it; {_WHAT_WORKS}")
    devices = tree.get("deviceProperties") or [{}]
    return found, str(devices[0].get("name", "unknown GPU"))


def _is_timed(event: Mapping[str, Any]) -> bool:
    """Whether an event says when it began and how long it took."""
    return bool(event.get("dur")) and all(isinstance(event.get(key), int | float) for key in ("ts", "dur"))


def _layers(kernels: Iterable[Mapping[str, Any]], wanted: int | None, *, where: Path) -> int:
    found = sum(bool(re.search(_BACKWARD, kernel["name"])) for kernel in kernels)
    if wanted is None and not found:
        raise HardwareError(
            f"{where}: no backward of FlashAttention or cuDNN in it, by which its layers are counted; {_WHAT_WORKS}"
        )
    if wanted is not None and found not in (0, wanted):
        raise HardwareError(f"{where}: {found} layers by the backwards of attention in it, not {wanted}")
    return wanted or found


def _split_products(
    products: Sequence[dict[str, Any]], *, layers: int, local_experts: int, where: Path
) -> dict[str, list[dict[str, Any]]]:
    """FP8 products into linear ones and the experts' weight gradients.

    Weight gradients have kernels of their own (`acc`). Of a layer's, the experts' are 2 * local_experts and take place
    between the shared expert's and the attention's; on the side stream there are no others. HardwareError where there
    are not as many in every layer.
    """
    found: dict[str, list[dict[str, Any]]] = {"linear_gemm": [], "grouped_gemm": []}
    weights = [p for p in sorted(products, key=lambda p: p["ts"]) if "_acc" in p["name"]]
    found["linear_gemm"] += [p for p in products if "_acc" not in p["name"]]
    per_layer, over = divmod(len(weights), layers)
    experts = 2 * local_experts
    if over or 0 < per_layer < experts:
        raise HardwareError(
            f"{where}: {len(weights)} kernels of weight gradients are not as many in each of {layers} layers with "
            f"{experts} of {local_experts} experts: the model or parallel.expert is not the trace's"
        )
    for layer in range(layers):
        mine = weights[layer * per_layer : (layer + 1) * per_layer]
        shared = 2 if per_layer > experts + 2 else 0
        # the shared expert's two first, then the experts', then attention's
        found["linear_gemm"] += [*mine[:shared], *mine[shared + experts :]]
        found["grouped_gemm"] += mine[shared : shared + experts]
    return found


def _union(spans: Sequence[dict[str, Any]]) -> float:
    """Seconds during which at least one of the spans runs."""
    total, end = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span["ts"]):
        start = max(end, span["ts"])
        end = max(end, span["ts"] + span["dur"])
        total += max(0.0, end - start)
    return total * 1e-6
