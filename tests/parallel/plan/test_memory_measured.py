"""Predicted memory against the tensors that a run really allocates, on gloo processes."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config import RunConfig
from parallel.plan.job import Job
from parallel.plan.memory import CPU_LOGITS_BYTES, memory_of
from tests.distributed import run_distributed
from tests.launcher.spine import MODEL, config, write_tokens
from tests.parallel.plan.jobs import h800

WIDE = replace(
    MODEL, vocab_size=4096, hidden_size=192, intermediate_size=512, moe_intermediate_size=128, num_attention_heads=4,
    kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    max_position_embeddings=256,
)  # fmt: skip


def tensor_bytes() -> int:
    """Of every tensor's storage that Python can reach."""
    gc.collect()
    sizes = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def measure(run_config: RunConfig) -> tuple[int, int]:
    """Bytes that stay after a step, and most that the next one allocates beside them."""
    from torch.profiler import ProfilerActivity, profile

    from launcher.build import build
    from launcher.runtime import process_group
    from launcher.step import train_step

    with process_group(run_config.train) as process:
        before = tensor_bytes()
        run = build(run_config, process)
        train_step(run)
        stays = tensor_bytes() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            train_step(run)
        results: Any = recorded.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return stays, peak


def compare(tmp_path: Path, world: int, **options: Any) -> list[tuple[float, float]]:
    """(measured, predicted) bytes of every rank."""
    prefix = write_tokens(str(tmp_path / "tokens"))
    run_config = config(prefix, microbatches=4, **options)
    run_config = replace(run_config, model=WIDE, data=replace(run_config.data, sequence_length=256))
    measured = run_distributed(world, measure, run_config)
    parallel = run_config.parallel
    job = Job(WIDE, parallel, h800(), 256, 1, 4 * parallel.data, "fp32", 1e6, 4)
    schedule = job.schedule()
    ranks = memory_of(
        job.shape(), parallel, schedule, job.stages(schedule), precision="fp32", moments_bytes=4,
        logits_chunk_bytes=CPU_LOGITS_BYTES,
    )  # fmt: skip
    found = []
    for rank, (stays, peak) in enumerate(measured):
        memory = ranks[rank // parallel.data]
        found.append((float(stays + peak), memory.total - memory.nccl - memory.margin))
    return found


def test_a_pipeline_of_two(tmp_path: Path) -> None:
    for measured, predicted in compare(tmp_path, 2, pipeline=2, expert=1, data=1, schedule="1f1b"):
        assert predicted == pytest.approx(measured, rel=0.05)
