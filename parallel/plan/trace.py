"""Seconds of each class of kernels from a PyTorch profiler trace, and the calibration that follows from them. No torch.

The trace is one overlapped pair: a forward and a backward of `layers` MoE layers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.plan.hardware import HardwareError
from parallel.plan.kernels import CLASSES, Calibration

# The first pattern that a kernel's name contains says its class. `wait`: a rank looking for its peers.
_PATTERNS = (
    ("wait", r"cached_notify|notify_dispatch|nccl.*barrier"),
    ("dispatch", r"::dispatch<|get_dispatch_layout"),
    ("combine", r"::combine<"),
    ("attention", r"flash|attn"),
    ("grouped_gemm", r"m_grouped"),
    ("quantise", r"cast|grouped_gemm::cuda::utils::transpose|batched_transpose|special_fmt"),
    ("norm", r"layer_norm|rms_?norm"),
    ("gemm", r"fp8_ptp128c|fp8_dptp128c|deep_gemm|nvjet"),
    ("elementwise", r""),
)
_GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
_WHAT_WORKS = (
    "record one with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) and its export_chrome_trace, or leave "
    "--trace out: DeepSeek's published one then calibrates"
)


@dataclass(frozen=True)
class TraceSummary:
    """One pair as measured: seconds in all, of kernels by class, of each stream while anything ran on it.

    expert_weight_gemm: of the grouped products, those that a name does not tell from linear ones (the experts' weight
    gradients, one launch an expert): they are told by their order and number.
    """

    seconds: float
    classes: Mapping[str, float]
    num_kernels: int
    compute_busy: float
    transfer_busy: float
    device: str


def read_trace(path: Path, *, layers: int, local_experts: int) -> TraceSummary:
    """The pair in a trace of torch.profiler's; HardwareError for a file that is none, or has no kernels."""
    kernels, device = _kernels(path)
    start = min(k["ts"] for k in kernels)
    end = max(k["ts"] + k["dur"] for k in kernels)
    classes: dict[str, float] = {kind: 0.0 for kind in (*CLASSES, "wait")}
    streams: dict[bool, list[Any]] = {False: [], True: []}
    products = []
    for kernel in kernels:
        kind = class_of(kernel["name"])
        streams[kind in ("wait", "dispatch", "combine")].append(kernel)
        if kind == "gemm":
            products.append(kernel)
        else:
            classes[kind] += kernel["dur"] * 1e-6
    for kind, spans in _split_products(products, layers=layers, local_experts=local_experts).items():
        classes[kind] += _union(spans)
    return TraceSummary(
        (end - start) * 1e-6, classes, len(kernels), _union(streams[False]), _union(streams[True]), device
    )


def class_of(name: str) -> str:
    """Class of a kernel by its name; `gemm` where only its place tells linear from expert."""
    return next(kind for kind, pattern in _PATTERNS if re.search(pattern, name))


def calibrate(measured: TraceSummary, predicted: Mapping[str, float], *, source: str) -> Calibration:
    """Factors: measured over predicted seconds of each class; a class that was not predicted stays at 1."""
    return Calibration(
        source, {k: measured.classes[k] / predicted[k] for k in CLASSES if predicted.get(k) and measured.classes[k]}
    )


def _kernels(path: Path) -> tuple[list[dict[str, Any]], str]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HardwareError(f"{path}: not a profiler trace: {error}; {_WHAT_WORKS}") from error
    events = tree.get("traceEvents") if isinstance(tree, dict) else None
    found = [e for e in events or () if isinstance(e, dict) and e.get("cat") in _GPU_EVENTS and e.get("dur")]
    if not found:
        raise HardwareError(f"{path}: not a profiler trace of a GPU, no kernels in it; {_WHAT_WORKS}")
    devices = tree.get("deviceProperties") or [{}]
    return found, str(devices[0].get("name", "unknown GPU"))


def _split_products(
    products: Sequence[dict[str, Any]], *, layers: int, local_experts: int
) -> dict[str, list[dict[str, Any]]]:
    """FP8 products into linear ones and the experts' weight gradients.

    Weight gradients have kernels of their own (`acc`). Of a layer's, the experts' are 2 * local_experts and take place
    between the shared expert's and the attention's; on the side stream there are no others.
    """
    found: dict[str, list[dict[str, Any]]] = {"linear_gemm": [], "grouped_gemm": []}
    weights = [p for p in sorted(products, key=lambda p: p["ts"]) if "_acc" in p["name"]]
    found["linear_gemm"] += [p for p in products if "_acc" not in p["name"]]
    per_layer = len(weights) // layers if layers else 0
    for layer in range(layers):
        mine = weights[layer * per_layer : (layer + 1) * per_layer]
        experts = 2 * local_experts
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
