"""What a training step takes beside its chunks' phases, each part measured apart from the steps that are predicted.

After the pipeline: reductions, clipping, update, metrics, by the clock. Beside the pipeline: the executor's own work,
messages and data, as processor time of the very executor over chunks that compute nothing.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.build import DTYPES, Run
from launcher.plan.measured.row import over_ranks
from launcher.step import conclude_step, microbatch, run_pipeline
from model.transformer import Microbatch, StageLoss
from parallel.pipeline.chunk import Chunk
from parallel.pipeline.executor import Executor
from parallel.pipeline.phases import Phase


@dataclass(frozen=True)
class InTwo:
    """A training step as two: processor seconds of all ranks in its pipeline, seconds of what follows on it."""

    pipeline_cpu: float
    after_seconds: float


def step_in_two(run: Run) -> InTwo:
    """A whole training step, with all ranks together in front of each half."""
    dist.barrier()
    cpu = time.process_time()
    losses = run_pipeline(run)
    used = over_ranks(time.process_time() - cpu)
    dist.barrier()
    start = time.perf_counter()
    conclude_step(run, losses)
    return InTwo(used, over_ranks(time.perf_counter() - start, dist.ReduceOp.MAX))


def frame_cpu(run: Run, *, level: str) -> float:
    """Processor seconds of all ranks in a pipeline whose chunks compute nothing: its messages, data and actions."""
    known = run.executor
    hollow = Executor(
        known.schedule, known.mesh, known.groups, HollowStages(run),
        dtype=known.dtype, device=known.device, overlap=level,
    )  # fmt: skip
    dist.barrier()
    cpu = time.process_time()
    hollow.step(lambda number: microbatch(run, number))
    return over_ranks(time.process_time() - cpu)


class HollowStages:
    """`Stages` of a run's own links and messages, and nothing in between."""

    def __init__(self, run: Run) -> None:
        stages = run.executor.stages
        self.hidden_size, self._links = stages.hidden_size, stages.num_links
        self.last = run.executor.schedule.num_stages - 1
        self.dtype = DTYPES[run.config.train.precision]

    def num_links(self, stage: int) -> int:
        """See `Stages`."""
        return self._links(stage)

    def new_chunk(self, stage: int, batch: Microbatch, halves: int) -> Chunk:
        """See `Stages`."""
        return HollowChunk(self, stage, batch)


class HollowChunk:
    """`Chunk` that only makes what it sends."""

    def __init__(self, stages: HollowStages, stage: int, batch: Microbatch) -> None:
        self._stages, self._stage = stages, stage
        self._shape = (batch.tokens.shape[0], batch.tokens.shape[1] - 1, stages.hidden_size)
        self.output: torch.Tensor | None = None
        self.loss: StageLoss | None = None
        self.input_grad: torch.Tensor | None = None

    def begin(self, hidden_BSD: torch.Tensor | None) -> None:
        """See `Chunk`."""

    def begin_backward(self, grad_BSD: torch.Tensor | None) -> None:
        """See `Chunk`."""

    def run(self, phase: Phase) -> None:
        """See `Chunk`."""
        first = Phase("attend_grad" if self._stages.num_links(self._stage) > 1 else "end_grad", 0)
        if phase == first and self._stage:
            self.input_grad = torch.zeros(self._shape, dtype=self._stages.dtype)
        if phase.kind == "end" and self._stage < self._stages.last:
            self.output = torch.zeros(self._shape, dtype=self._stages.dtype)
        elif phase.kind == "end":
            self.loss = StageLoss(torch.zeros(()), torch.zeros(()), ())
