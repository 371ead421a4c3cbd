"""MFU, and the peak that it is a share of: from a cluster file, or measured where there is none."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.config import RunConfig
from launcher.runtime import Process
from model.counts import flops_per_token
from parallel.plan.hardware import read

CPU_SIZE, GPU_SIZE = 384, 8192  # rows and columns of the measured products
CPU_SECONDS, GPU_SECONDS = 0.05, 0.5


@dataclass(frozen=True)
class Peak:
    """FLOPs a second of all ranks together, and where the number is from, in words."""

    flops: float
    source: str


def clusters() -> dict[str, Path]:
    """The files of configs/cluster by name."""
    import configs

    return {path.stem: path for path in sorted((Path(next(iter(configs.__path__))) / "cluster").glob("*.yaml"))}


@dataclass(frozen=True)
class MFU:
    """Share of the peak that a trained token's FLOPs take, in two conventions (`model.counts.FlopsPerToken`).

    As in arXiv 2505.09343, table 4, and as `expertpipe plan` gives it: the main model, MTP and recomputation not
    counted. causal: attention over the positions that a token sees; full: over the whole sequence.
    """

    causal: float
    full: float


def mfu(config: RunConfig, peak: Peak, *, tokens_per_second: float, sequence_length: int) -> MFU:
    """Of a step with sequences of that length."""
    flops, share = flops_per_token(config.model, sequence_length, mtp=False), tokens_per_second / peak.flops
    return MFU(flops.causal * share, flops.full * share)


def peak_of(config: RunConfig, process: Process, world: dist.ProcessGroup) -> Peak:
    """By train.mfu_against; all ranks call it together: what is measured is measured on all of them at once."""
    against = config.train.mfu_against
    if against == "auto" and process.device.type == "cuda":
        name = torch.cuda.get_device_name(process.device).lower()
        against = next((known for known in clusters() if known in name), "measured")
    if against not in ("auto", "measured"):
        hardware = read(clusters().get(against, Path(against)))
        source = f"{hardware.name}, BF16 dense: {hardware.sources['bf16_flops']}"
        return Peak(hardware.bf16_flops * process.world_size, source)
    return _measured(process, world)


def _measured(process: Process, world: dist.ProcessGroup) -> Peak:
    gpu = process.device.type == "cuda"
    size, seconds = (GPU_SIZE, GPU_SECONDS) if gpu else (CPU_SIZE, CPU_SECONDS)
    dtype = torch.bfloat16 if gpu else torch.float32
    a = torch.randn(size, size, device=process.device).to(dtype)
    out = a @ a
    dist.all_reduce(torch.zeros(1, device=process.device), group=world)  # begin together
    began, products = time.perf_counter(), 0
    while True:
        torch.mm(a, a, out=out)
        products += 1
        if gpu and products % 8 == 0:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
        if elapsed >= seconds and (not gpu or products % 8 == 0):
            break
    flops = torch.tensor([2 * size**3 * products / elapsed], dtype=torch.float64, device=process.device)
    dist.all_reduce(flops, group=world)
    kind = f"{'BF16' if gpu else 'FP32'} products of {size} x {size}"
    where = "1 rank" if process.world_size == 1 else f"{process.world_size} ranks at once"
    number = torch.get_num_threads()
    threads = "" if gpu else f", {number} thread{'s' if number > 1 else ''} a rank"
    return Peak(flops.item(), f"measured: {kind} for {seconds:g} s on {where}{threads}")
