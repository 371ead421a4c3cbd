"""Bytes of tensors that runs on gloo processes allocate, beside what the planner says of them.

`python -m tests.bench.memory_measured [NAME ...]` prints a table; the slow tests hold it to 5%. Measured: tensors that
stay after a step, by their storages, and the most that the next step allocates beside them, from torch's allocator.
Predicted twice: with the rows that each rank's experts got, as an untrained gate is not balanced, which is what the 5%
are of; and with balanced rows, which is what `expertpipe plan` says.
`--phases RANK NAME` prints the levels of one case phase by phase instead, beside those of the planner's walk.
"""

import gc
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from launcher.config import RunConfig
from model.config import ModelConfig
from model.experts import Experts
from parallel.pipeline.actions import parts
from parallel.plan.job import Job
from parallel.plan.layers import LayerShape
from parallel.plan.live import KINDS, Ledger
from parallel.plan.memory import Walk, memory_of, setting_of
from parallel.plan.swing import order_of
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
    """Bytes of one rank. predicted: with its experts' measured rows; balanced: with as many on every rank."""

    measured: float
    predicted: float
    balanced: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def balanced_ratio(self) -> float:
        """As a user gets it, who knows no rows."""
        return self.balanced / self.measured


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


class Rows:
    """Rows that the experts of a rank get, in whatever parts a chunk's tokens come."""

    def __init__(self, run: Any) -> None:
        self.run, self.total = run, 0
        for stage in run.model.stages.values():
            for module in stage.modules():
                if isinstance(module, Experts):
                    module.register_forward_pre_hook(self._count)

    def _count(self, _module: Any, given: Any) -> None:
        self.total += len(given[0])

    def mean(self) -> float:
        """Of a layer and micro-batch, over a step since; with recompute=layer every chunk comes twice."""
        schedule, rank = self.run.executor.schedule, self.run.mesh.pipeline_rank
        actions = [action for step in schedule.ranks[rank] for action in parts(step) if action.kind == "F"]
        layers = {
            number: sum(isinstance(module, Experts) for module in stage.modules())
            for number, stage in self.run.model.stages.items()
        }
        twice = 2 if self.run.config.parallel.recompute == "layer" else 1
        return self.total / twice / sum(layers[action.stage] for action in actions)


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
        rows = Rows(run)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            train_step(run)
        results: Any = recorded.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return stays, peak, rows.mean()


@dataclass(frozen=True)
class Level:
    """Bytes above the level at the step's beginning: the most in a phase, and at its end."""

    name: str
    most: float
    end: float


def levels(run_config: RunConfig) -> tuple[list[Level], float]:
    """Measured levels of a step's phases on this rank, and mean rows of its experts."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from launcher.build import build
    from launcher.runtime import process_group
    from launcher.step import train_step
    from parallel.pipeline.chunk import ModelChunk

    with process_group(run_config.train) as process:
        run = build(run_config, process)
        train_step(run)
        rows = Rows(run)
        plain = ModelChunk.run

        def watched(chunk: Any, phase: Any) -> None:
            with record_function(f"phase {phase.kind} {phase.link} {phase.half}"):
                plain(chunk, phase)

        ModelChunk.run = watched  # type: ignore[method-assign]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            train_step(run)
        results: Any = recorded.profiler
        events = results.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        spans = sorted(
            (e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if e.name().startswith("phase ")
        )
        found, level, position = [], 0.0, 0
        for start, end, name in spans:
            while position < len(memory) and memory[position][0] < start:
                level += memory[position][1]
                position += 1
            most = level
            while position < len(memory) and memory[position][0] <= end:
                level += memory[position][1]
                most = max(most, level)
                position += 1
            found.append(Level(name.removeprefix("phase "), most, level))
        level += sum(size for _, size in memory[position:])
        return [*found, Level("after", level, level)], rows.mean()


def predicted_levels(case: Case, rank: int, rows: float) -> list[Level]:
    """The planner's levels of the same phases."""
    job, shape = _job(case, rows)
    schedule = job.schedule()
    setting = setting_of(shape, job.parallel, precision=case.precision, fp8=job.fp8, on_cpu=True)
    level = case.overlap if case.expert > 1 else "off"
    walk = Walk(schedule, job.stages(schedule), setting, level=level)
    found: list[Level] = []
    held: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for actions in walk.works(rank):
        acting = walk.acting(actions)
        chunks = [one.passing() for one in acting]
        for which, phase in order_of(acting):
            ledger = Ledger(dict(held), dict.fromkeys(KINDS, 0.0))
            acting[which].stage.play(phase, ledger, chunks[which])
            held = ledger.level
            most = max(sum(ledger.peak.values()), sum(held.values()))
            found.append(Level(f"{phase.kind} {phase.link} {phase.half}", most, sum(held.values())))
        for one in acting:
            if one.kind in "BI":
                held["travelling"] -= setting.hidden
    return found


def print_levels(case: Case, prefix: str, rank: int) -> None:
    """Phase by phase, in KiB: the most and the end, measured and predicted."""
    measured = run_distributed(case.pipeline * case.data, levels, case.run_config(prefix))
    found, rows = measured[rank]
    predicted = predicted_levels(case, rank // case.data, rows)
    print(f"{case.name}, rank {rank}, {rows:.0f} rows; KiB: most measured, predicted, end measured, predicted, change")
    before = (0.0, 0.0)
    for here, there in zip(found, predicted, strict=False):
        numbers = [here.most, there.most, here.end, there.end, here.end - before[0], there.end - before[1]]
        print(f"{here.name:<20}{there.name:<20}" + " ".join(f"{number / 1024:9.0f}" for number in numbers))
        before = (here.end, there.end)
    print(f"{len(found)} phases, {len(predicted)} predicted; left after the step: {found[-1].end / 1024:.0f}")


def _job(case: Case, rows: float) -> tuple[Job, LayerShape]:
    """The case as a job, and its layers with so many rows a rank: an untrained gate is not balanced."""
    run_config = case.run_config("unused")
    batch = case.microbatches * case.data
    job = Job(
        case.model, run_config.parallel, h800(), case.length, 1, batch, case.precision, 1e6, 4, fp8=run_config.fp8
    )  # fmt: skip
    return job, replace(job.shape(), imbalance=rows / job.shape().rows)


def compare(case: Case, prefix: str) -> list[Compared]:
    """Every rank's bytes."""
    run_config = case.run_config(prefix)
    measured = run_distributed(case.pipeline * case.data, measure, run_config)
    parallel = run_config.parallel
    found = []
    for rank, (stays, peak, rows) in enumerate(measured):
        job, uneven = _job(case, rows)
        predicted = (_total(case, job, shape)[rank // parallel.data] for shape in (uneven, job.shape()))
        found.append(Compared(float(stays + peak), *predicted))
    return found


def _total(case: Case, job: Job, shape: LayerShape) -> list[float]:
    """Predicted bytes of every pipeline rank's tensors."""
    schedule = job.schedule()
    memory = memory_of(
        shape, job.parallel, schedule, job.stages(schedule), precision=case.precision, moments_bytes=4, fp8=job.fp8,
        on_cpu=True,
    )  # fmt: skip
    return [rank.total - rank.nccl - rank.margin for rank in memory]


def ratios(found: list[Compared]) -> str:
    """Of a case's ranks, the least and the most: with measured rows, then with balanced ones."""
    parts = []
    for values in ([pair.ratio for pair in found], [pair.balanced_ratio for pair in found]):
        parts.append(f"{min(values):.3f} to {max(values):.3f}")
    return "   ".join(parts)


BY_SCHEDULE = [Case(name) for name in ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "dualpipe")]
CASES = [
    *BY_SCHEDULE,
    Case("1f1b", data=1, expert=1),
    Case("zbv", data=1, expert=1),
    Case("dualpipe", recompute="report"),
    Case("dualpipe", recompute="attend"),
    Case("dualpipe", recompute="layer"),
    Case("dualpipe", overlap="all"),
    Case("1f1b", overlap="off"),
    Case("dualpipe", precision="bf16"),
    Case("dualpipe", precision="fp8"),
    Case("1f1b", precision="fp8", recompute="layer"),
    Case("dualpipe", precision="fp8", recompute="report"),
    Case("dualpipe", precision="bf16", overlap="all", recompute="report"),
    Case("dualpipe", model=TINY, length=64),
    Case("dualpipe", pipeline=4, data=4, expert=4, model=replace(MID, num_hidden_layers=8), microbatches=8),
]


def main(chosen: list[str]) -> None:
    """Prints a row for each case whose name has one of the words."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        prefix = write_tokens(f"{folder}/tokens")
        if chosen[:1] == ["--phases"]:
            (case,) = (case for case in CASES if case.name == chosen[2])
            return print_levels(case, prefix, int(chosen[1]))
        print(f"{'predicted / measured, ranks':<66}{'measured rows':<17}balanced rows")
        for case in CASES:
            if not chosen or any(all(part in case.name for part in word.split(",")) for word in chosen):
                print(f"{case.name:<66}{ratios(compare(case, prefix))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
