"""Bytes of tensors that runs on gloo processes allocate, beside what the planner says of them.

`python -m tests.bench.memory_measured [NAME ...]` prints a table; the slow tests hold it to 5%. Measured: tensors that
stay after a step, by their storages, and the most that the next step allocates beside them, from torch's allocator.
"""

import gc
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from launcher.config import RunConfig
from model.config import ModelConfig
from model.experts import Experts
from parallel.plan.job import Job
from parallel.plan.memory import memory_of
from tests.distributed import run_distributed
from tests.launcher.spine import MODEL, config, write_tokens
from tests.parallel.plan.jobs import h800

MID = replace(
    MODEL, vocab_size=4096, hidden_size=192, intermediate_size=512, moe_intermediate_size=128, num_attention_heads=4,
    kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    max_position_embeddings=256,
)  # fmt: skip
TINY = replace(MODEL, max_position_embeddings=64)


@dataclass(frozen=True)
class Case:
    """A run of MID or TINY; sequences of `length` tokens, one a micro-batch."""

    schedule: str
    pipeline: int = 2
    data: int = 2
    expert: int = 2
    overlap: str = "pairs"
    recompute: str = "none"
    precision: str = "fp32"
    microbatches: int = 4
    model: ModelConfig = MID
    length: int = 256

    @property
    def name(self) -> str:
        """Of the row."""
        size = "tiny" if self.model is TINY else "mid"
        axes = f"{self.pipeline}x{self.data} e{self.expert}"
        return f"{size} {self.schedule} {axes} {self.precision} overlap={self.overlap} recompute={self.recompute}"

    def run_config(self, prefix: str) -> RunConfig:
        """What runs."""
        found = config(
            prefix, pipeline=self.pipeline, expert=self.expert, data=self.data, schedule=self.schedule,
            overlap=self.overlap, recompute=self.recompute, microbatches=self.microbatches, model=self.model,
        )  # fmt: skip
        data = replace(found.data, sequence_length=self.length)
        return replace(found, data=data, train=replace(found.train, precision=self.precision))


@dataclass(frozen=True)
class Compared:
    """Bytes of one rank."""

    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def tensor_bytes() -> int:
    """Of every tensor's storage that Python can reach."""
    gc.collect()
    gc.collect()  # what the first pass freed held more
    sizes = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def measure(run_config: RunConfig) -> tuple[int, int, float]:
    """Bytes that stay after a step, most that the next one allocates beside them, and mean rows of its experts."""
    from torch.profiler import ProfilerActivity, profile

    from launcher.build import build
    from launcher.runtime import process_group
    from launcher.step import train_step

    with process_group(run_config.train) as process:
        before = tensor_bytes()
        run = build(run_config, process)
        train_step(run)
        stays = tensor_bytes() - before
        rows: list[int] = []
        for module in [m for stage in run.model.stages.values() for m in stage.modules() if isinstance(m, Experts)]:
            module.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            train_step(run)
        results: Any = recorded.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return stays, peak, sum(rows) / len(rows)


def compare(case: Case, prefix: str) -> list[Compared]:
    """Every rank's bytes."""
    run_config = case.run_config(prefix)
    measured = run_distributed(case.pipeline * case.data, measure, run_config)
    parallel = run_config.parallel
    batch = case.microbatches * case.data
    job = Job(case.model, parallel, h800(), case.length, 1, batch, case.precision, 1e6, 4, fp8=run_config.fp8)
    schedule = job.schedule()
    found = []
    for rank, (stays, peak, rows) in enumerate(measured):
        shape = replace(job.shape(), imbalance=rows / job.shape().rows)  # an untrained gate is not balanced
        memory = memory_of(
            shape, parallel, schedule, job.stages(schedule), precision=case.precision, moments_bytes=4, fp8=job.fp8,
            on_cpu=True,
        )[rank // parallel.data]  # fmt: skip
        found.append(Compared(float(stays + peak), memory.total - memory.nccl - memory.margin))
    return found


BY_SCHEDULE = [Case(name) for name in ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "dualpipe")]
CASES = [
    *BY_SCHEDULE,
    Case("1f1b", data=1, expert=1),
    Case("zbv", data=1, expert=1),
    Case("dualpipe", recompute="attend"),
    Case("dualpipe", recompute="layer"),
    Case("dualpipe", overlap="all"),
    Case("1f1b", overlap="off"),
    Case("dualpipe", precision="bf16"),
    Case("dualpipe", precision="fp8"),
    Case("1f1b", precision="fp8", recompute="layer"),
    Case("dualpipe", model=TINY, length=64),
    Case("dualpipe", pipeline=4, data=4, expert=4, model=replace(MID, num_hidden_layers=8), microbatches=8),
]


def main(chosen: list[str]) -> None:
    """Prints a row for each case whose name has one of the words."""
    import tempfile

    print(f"{'run':<66}{'predicted / measured, by rank'}")
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_tokens(f"{folder}/tokens")
        for case in CASES:
            if not chosen or any(all(part in case.name for part in word.split(",")) for word in chosen):
                ratios = sorted({f"{pair.ratio:.3f}" for pair in compare(case, prefix)})
                print(f"{case.name:<66}{' '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
