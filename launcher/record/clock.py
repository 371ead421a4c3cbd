"""Where a step's time goes on one rank: a stack of phases, each charged only with what no inner phase takes.

The seconds are the host's. On a CPU that is the work itself. On a GPU it is the time to issue work, and whatever the
host waits for is charged to the phase that waits; the sum is the wall time on both. What is timed: the chunks of the
pipeline (`forward`, `backward`; the executor's other time is `messages`: posting, waiting, sending), the experts'
transfers (`all_to_all`: issuing and waiting, inside a chunk), the data, and the parts of a step after the pipeline.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from model.dispatch import Combined, Dispatched, Pending, TokenDispatcher
from model.transformer import Microbatch, StageLoss
from parallel.pipeline.chunk import Chunk, Stages
from parallel.pipeline.phases import Phase

T = TypeVar("T", Dispatched, Combined)

PHASES = (
    "data", "forward", "backward", "all_to_all", "messages", "reduce_scatter", "optimizer", "all_gather", "metrics",
    "checkpoint", "other",
)  # fmt: skip
BACKWARD = ("end_grad", "combine_grad", "shared_grad", "experts_grad", "dispatch_grad", "attend_grad", "weights")


class PhaseClock:
    """Seconds by phase since the last `take`, and rows that arrived at this rank's experts. One thread at a time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._stack = ["other"]
        self._since = self._began = time.perf_counter()
        self.rows = 0  # of the step under way: `train_step` reads and clears it
        self._rows_taken = 0

    def enter(self, phase: str) -> None:
        """From now on time is charged to `phase`, until `leave`."""
        self._charge()
        self._stack.append(phase)

    def leave(self) -> None:
        """Back to the phase before."""
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to a phase, also when it raises."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str) -> Callable[..., Any]:
        """Calls a function with its arguments, charged to a phase."""

        def call(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*args, **named)

        return call

    def take_rows(self) -> int:
        """Rows of the step; the count begins anew."""
        rows, self.rows = self.rows, 0
        self._rows_taken += rows
        return rows

    def take(self) -> tuple[float, dict[str, float], int]:
        """(wall seconds, seconds by phase, rows) since the last call, which begin anew."""
        self._charge()
        found, wall, rows = self._seconds, self._since - self._began, self._rows_taken
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._began, self._rows_taken = self._since, 0
        return wall, found, rows


class TimedStages:
    """`Stages` whose chunks are timed."""

    def __init__(self, stages: Stages, clock: PhaseClock) -> None:
        self._stages, self._clock = stages, clock

    @property
    def hidden_size(self) -> int:
        """See `Stages`."""
        return self._stages.hidden_size

    def new_chunk(self, stage: int, batch: Microbatch, halves: int) -> Chunk:
        """See `Stages`."""
        return cast(Chunk, _TimedChunk(self._stages.new_chunk(stage, batch, halves), self._clock))

    def num_links(self, stage: int) -> int:
        """See `Stages`."""
        return self._stages.num_links(stage)


class _TimedChunk:
    """`Chunk` that charges its phases."""

    def __init__(self, chunk: Chunk, clock: PhaseClock) -> None:
        self._chunk, self._clock = chunk, clock

    @property
    def output(self) -> Tensor | None:
        return self._chunk.output

    @output.setter
    def output(self, value: Tensor | None) -> None:
        self._chunk.output = value

    @property
    def loss(self) -> StageLoss | None:
        return self._chunk.loss

    @loss.setter
    def loss(self, value: StageLoss | None) -> None:
        self._chunk.loss = value

    @property
    def input_grad(self) -> Tensor | None:
        return self._chunk.input_grad

    @input_grad.setter
    def input_grad(self, value: Tensor | None) -> None:
        self._chunk.input_grad = value

    def begin(self, hidden_BSD: Tensor | None) -> None:
        self._chunk.begin(hidden_BSD)

    def begin_backward(self, grad_BSD: Tensor | None) -> None:
        self._chunk.begin_backward(grad_BSD)

    def run(self, phase: Phase) -> None:
        self._clock.enter("backward" if phase.kind in BACKWARD else "forward")
        try:
            self._chunk.run(phase)
        finally:
            self._clock.leave()


class _TimedPending(Generic[T]):
    """`Pending` whose wait is timed, and whose rows are counted the first time it is over."""

    def __init__(self, pending: Pending[T], clock: PhaseClock, *, counted: bool) -> None:
        self._pending, self._clock, self._counted = pending, clock, counted

    def wait(self) -> T:
        self._clock.enter("all_to_all")
        try:
            found = self._pending.wait()
        finally:
            self._clock.leave()
        if self._counted and isinstance(found, Dispatched):
            self._clock.rows += sum(found.counts)
            self._counted = False
        return found

    def done(self) -> bool:
        return self._pending.done()


class TimedDispatcher:
    """`TokenDispatcher` that charges its transfers and counts the rows that arrive by a first dispatch."""

    def __init__(self, dispatcher: TokenDispatcher, clock: PhaseClock) -> None:
        self.inner, self._clock = dispatcher, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor | None = None, weights_TK: Tensor | None = None, *, handle: Any = None
    ) -> Pending[Dispatched]:
        """See `TokenDispatcher`."""
        with self._clock.phase("all_to_all"):
            pending = self.inner.dispatch(x_TD, ids_TK, weights_TK, handle=handle)
        return _TimedPending(pending, self._clock, counted=handle is None)

    def combine(self, rows_RD: Tensor, handle: Any, weights_R: Tensor | None = None) -> Pending[Combined]:
        """See `TokenDispatcher`."""
        with self._clock.phase("all_to_all"):
            pending = self.inner.combine(rows_RD, handle, weights_R)
        return _TimedPending(pending, self._clock, counted=False)
