"""Calibration files: factors of each class of kernels, with where they were measured. No torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from parallel.plan.hardware import Hardware, HardwareError
from parallel.plan.job import Job
from parallel.plan.kernels import ALL_TO_ALL_SMS, CLASSES, Calibration, Machine
from parallel.plan.layers import LayerShape, layer_bill, transfers
from parallel.plan.trace import TraceSummary, calibrate, read_trace

FASTEST, SLOWEST = 0.2, 5.0  # a factor outside is a wrong file rather than a slow kernel
FASTEST_MACHINE, SLOWEST_MACHINE = 0.02, 50.0  # of a file of factors, whose machine may be a CPU


def predicted_classes(shape: LayerShape, hardware: Hardware, *, layers: int) -> dict[str, float]:
    """First-principles seconds of each class in an overlapped pair of `layers` MoE layers, by class."""
    machine = Machine.beside_all_to_all(hardware, expert=shape.expert)
    bill, moved = layer_bill(shape, machine, moe=True), transfers(shape, machine, sms=ALL_TO_ALL_SMS)
    found = {kind: layers * bill.kind(kind) for kind in CLASSES}
    found["dispatch"] = layers * (moved.dispatch + moved.combine_grad)
    found["combine"] = layers * (moved.combine + moved.dispatch_grad)
    return found


def trace_shape(model: ModelConfig, *, tokens: int, expert: int, ranks_per_node: int) -> LayerShape:
    """The layer of a trace of DeepSeek's own kernels, whose rows travel with FP32 scales."""
    return LayerShape(model, tokens, tokens, expert, ranks_per_node, scale_bytes=4, recompute="report")


def shape_in_trace(job: Job) -> LayerShape:
    """The layer of a trace of a job's own pair."""
    parallel = job.parallel
    per_node = min(parallel.expert, parallel.ranks_per_node or job.hardware.gpus_per_node)
    tokens = job.micro_batch_size * job.sequence_length
    return trace_shape(job.model, tokens=tokens, expert=parallel.expert, ranks_per_node=per_node)


@dataclass(frozen=True)
class FromTrace:
    """A trace's factors, and the seconds that they come from."""

    calibration: Calibration
    measured: TraceSummary


def of_trace(path: Path, shape: LayerShape, hardware: Hardware, *, layers: int | None = None) -> Calibration:
    """Factors from a profiler trace of one overlapped pair; HardwareError where it is no such trace.

    layers: see `read_trace`.
    """
    return from_trace(path, shape, hardware, layers=layers).calibration


def from_trace(path: Path, shape: LayerShape, hardware: Hardware, *, layers: int | None = None) -> FromTrace:
    """As `of_trace`, with what was measured."""
    measured = read_trace(path, layers=layers, local_experts=shape.local_experts)
    predicted = predicted_classes(shape, hardware, layers=measured.layers)
    found = calibrate(measured, predicted, source=f"trace {path.name}")
    return FromTrace(_sane(found, where=str(path)), measured)


def to_tree(
    calibration: Calibration, measured: TraceSummary, *, training: float, training_source: str
) -> dict[str, object]:
    """What a calibration file holds: the factors, and the seconds that they come from."""
    return {
        "source": calibration.source,
        "device": measured.device,
        "pair_seconds": round(measured.seconds, 6),
        "compute_busy_seconds": round(measured.compute_busy, 6),
        "transfer_busy_seconds": round(measured.transfer_busy, 6),
        "class_seconds": {kind: round(seconds, 6) for kind, seconds in measured.classes.items()},
        "factors": {kind: round(factor, 4) for kind, factor in calibration.factors.items()},
        "training": training,
        "training_source": training_source,
    }


def read(path: Path) -> tuple[Calibration, Mapping[str, object]]:
    """A calibration and the whole file; HardwareError names what is wrong."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HardwareError(f"{path}: not a calibration: {error}") from error
    factors = tree.get("factors") if isinstance(tree, dict) else None
    if not isinstance(factors, dict) or set(factors) - set(CLASSES):
        raise HardwareError(f"{path}: needs `factors` by class: {', '.join(CLASSES)}")
    if not all(isinstance(factor, int | float) for factor in factors.values()):
        raise HardwareError(f"{path}: every factor is a number")
    found = Calibration(str(tree.get("source", path.name)), factors, float(tree.get("training", 1.0)))
    strange = [f"{kind} {f:.3g}" for kind, f in factors.items() if not FASTEST_MACHINE <= f <= SLOWEST_MACHINE]
    if strange:
        raise HardwareError(
            f"{path}: {', '.join(strange)} times the prediction: measured on another machine than --cluster names, or "
            "while it was busy; measure again with expertpipe bench kernels"
        )
    return found, tree


def _sane(calibration: Calibration, *, where: str) -> Calibration:
    strange = [f"{kind} {f:.3g}" for kind, f in calibration.factors.items() if not FASTEST <= f <= SLOWEST]
    if strange:
        raise HardwareError(
            f"{where}: {', '.join(strange)} times the prediction from the shapes: not a trace of one overlapped "
            "pair of this model's layers; use one, or leave --trace out"
        )
    return calibration
