"""The vocabulary of a pipeline schedule: what one rank does to one micro-batch of one stage. No torch.

Letters are those of torch.distributed.pipelining: F forward, I input gradient, W weight gradient, B both. A pair is
one forward and one backward action whose phases may be interleaved; torch writes it OVERLAP_F_B.
"""

from dataclasses import dataclass

from parallel.pipeline.placement import Placement, holders, stages_on

KINDS = ("F", "I", "W", "B")


@dataclass(frozen=True, slots=True)
class Action:
    """`kind` (F, I, W or B) of `microbatch` on `stage`; both count from 0."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def describe(self) -> str:
        """For messages to people, e.g. `F stage 1 micro-batch 5`."""
        return f"{self.kind} stage {self.stage} micro-batch {self.microbatch}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A forward action and a backward action (B or I) of different micro-batches, to be overlapped."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"

    def describe(self) -> str:
        """For messages to people."""
        return f"{self.forward.describe()} with {self.backward.describe()}"


Step = Action | Pair


def parts(step: Step) -> tuple[Action, ...]:
    """The actions of a step in the order in which they run when nothing overlaps."""
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


@dataclass(frozen=True)
class Message:
    """What crosses ranks: the activation that F of (stage, microbatch) consumes, or the gradient that its B or I does.

    kind is F or B.
    """

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """What every rank does in one training step, in order.

    placement: see `parallel.pipeline.placement`. With two directions the second half of the micro-batches (the smaller
    one, where they are odd) enters at the last rank; num_microbatches counts both.
    """

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    placement: Placement
    ranks: tuple[tuple[Step, ...], ...]

    @property
    def bidirectional(self) -> bool:
        """Whether micro-batches enter at both ends, so that every stage lives on two ranks."""
        return len(self.placement) > 1

    @property
    def stages_per_rank(self) -> int:
        """Stages that one micro-batch visits on a rank: 1, or more in a loop or a V."""
        return self.num_stages // self.num_ranks

    def direction(self, microbatch: int) -> int:
        """0 if the micro-batch enters at rank 0, 1 if at the last rank."""
        return int(len(self.placement) > 1 and 2 * microbatch >= self.num_microbatches)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Pipeline rank that runs the stage for this micro-batch."""
        return self.placement[self.direction(microbatch)][stage]

    def holders(self, stage: int) -> tuple[int, ...]:
        """Pipeline ranks that hold the stage's weights."""
        return holders(self.placement, stage)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages whose weights the rank holds, in the order of its directions."""
        return stages_on(self.placement, rank)

    def inputs(self, action: Action) -> Message | None:
        """What the action needs from another stage, wherever that runs; None for W and at the ends."""
        if action.kind == "F":
            return None if action.stage == 0 else Message("F", action.stage, action.microbatch)
        if action.kind in "BI" and action.stage < self.num_stages - 1:
            return Message("B", action.stage, action.microbatch)
        return None

    def output(self, action: Action) -> Message | None:
        """What the action produces for another stage; None for W and at the ends."""
        if action.kind == "F":
            last = action.stage == self.num_stages - 1
            return None if last else Message("F", action.stage + 1, action.microbatch)
        if action.kind in "BI" and action.stage > 0:
            return Message("B", action.stage - 1, action.microbatch)
        return None

    def consumer(self, message: Message) -> int:
        """Pipeline rank that a message goes to."""
        return self.rank_of(message.stage, message.microbatch)

    def messages_from(self, source: int, *, pairs_joined: bool = False) -> dict[int, list[Message]]:
        """Messages the rank sends, by destination, in the order in which it sends them; itself included.

        pairs_joined: the chunks of a pair run interleaved; then its gradient leaves before its activation.
        """
        sent: dict[int, list[Message]] = {}
        for step in self.ranks[source]:
            for action in reversed(parts(step)) if pairs_joined else parts(step):
                message = self.output(action)
                if message is not None:
                    sent.setdefault(self.consumer(message), []).append(message)
        return sent
