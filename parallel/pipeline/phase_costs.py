"""What the phases of a chunk take, and the time of any program of phases on two resources. No torch.

Computation runs in the order of issue, transfers run in that order beside it, and a phase waits for the transfers that
`phases.waits_for` names: the very rules by which the executor interprets the same programs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.pipeline.actions import Action
from parallel.pipeline.overlap import Placed
from parallel.pipeline.phases import Phase, waits_for
from parallel.pipeline.simulate import Cost, Costs, of_stage


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of one link's layer for a whole micro-batch.

    attend, shared, experts compute; dispatch, combine transfer; `_grad` are those of the input gradients, `_weights` of
    the weight gradients.
    """

    attend: float
    shared: float
    experts: float
    dispatch: float
    combine: float
    attend_grad: float
    shared_grad: float
    experts_grad: float
    dispatch_grad: float
    combine_grad: float
    attend_weights: float
    shared_weights: float
    experts_weights: float

    @classmethod
    def even(
        cls, compute: float, transfer: float, *, attend: float = 0.5, shared: float = 0.1, dispatch: float = 0.5
    ) -> "LayerCosts":
        """F, I and W compute alike, F and I transfer alike. attend, shared, dispatch: shares of the whole."""
        parts = [compute * share for share in (attend, shared, 1 - attend - shared)]
        moves = [transfer * share for share in (dispatch, 1 - dispatch)]
        return cls(*parts, *moves, *parts, *moves, *parts)


@dataclass(frozen=True)
class PhaseCosts:
    """Costs of every stage: `num_layers` links of `layer`, then the chain's end; message: between ranks."""

    layer: LayerCosts
    num_layers: int | tuple[int, ...] = 1
    end: Cost = 0.0
    end_grad: Cost = 0.0
    end_weights: Cost = 0.0
    message: float = 0.0

    @classmethod
    def of_stage_costs(cls, costs: Costs, *, attend: float = 0.5, shared: float = 0.1) -> "PhaseCosts":
        """One layer a stage with the computation and all-to-all of `costs`, the same for every stage.

        attend, shared: their shares of each computation, the experts have the rest; dispatch and combine are alike.
        ValueError where a stage has costs of its own.
        """
        scalars = (costs.forward, costs.input_grad, costs.weight_grad, costs.forward_comm, costs.input_grad_comm)
        forward, input_grad, weight_grad, forward_comm, input_grad_comm = (_scalar(cost) for cost in scalars)
        parts = (attend, shared, 1 - attend - shared)
        first = [*(forward * part for part in parts), forward_comm / 2, forward_comm / 2]
        second = [*(input_grad * part for part in parts), input_grad_comm / 2, input_grad_comm / 2]
        third = [weight_grad * part for part in parts]
        return cls(LayerCosts(*first, *second, *third), message=costs.message)

    def num_links(self, stage: int) -> int:
        """Links of the stage's chain, the end included."""
        return 1 + (self.num_layers[stage] if isinstance(self.num_layers, tuple) else self.num_layers)

    def seconds(self, placed: Placed, *, halves: int) -> float:
        """Time of a phase, but of `weights`, which depends on what was put off."""
        kind, stage = placed.phase.kind, placed.action.stage
        if kind in ("end", "end_grad"):
            return of_stage(self.end if kind == "end" else self.end_grad, stage)
        by_half = kind in ("experts", "experts_grad", "dispatch", "combine", "dispatch_grad", "combine_grad")
        return getattr(self.layer, kind) / (halves if by_half else 1)

    def put_off(self, placed: Placed, *, halves: int) -> float:
        """Weight gradients that a phase leaves to a later `weights`."""
        kind = placed.phase.kind
        if kind == "end_grad":
            return of_stage(self.end_weights, placed.action.stage)
        if kind in ("attend_grad", "shared_grad", "experts_grad"):
            seconds = getattr(self.layer, kind.replace("_grad", "_weights"))
            return seconds / (halves if kind == "experts_grad" else 1)
        return 0.0

    def all_weights(self, stage: int) -> dict[int, float]:
        """Seconds of a chunk's weight gradients by link."""
        links = self.num_links(stage)
        layer = self.layer.attend_weights + self.layer.shared_weights + self.layer.experts_weights
        return {**dict.fromkeys(range(links - 1), layer), links - 1: of_stage(self.end_weights, stage)}


def _scalar(cost: Cost) -> float:
    if isinstance(cost, tuple):
        raise ValueError("phases need the same costs for every stage: give one number instead of one for each")
    return cost


Chunk = tuple[int, int]  # stage, micro-batch


@dataclass
class Resources:
    """One rank's computation and transfers, each free from a time on. serial: transfers stop computation.

    busy: seconds of computation so far.
    """

    costs: PhaseCosts
    halves: Mapping[Chunk, int]
    serial: bool = False
    compute: float = 0.0
    transfer: float = 0.0
    busy: float = 0.0

    def __post_init__(self) -> None:
        self._ends: dict[tuple[Chunk, Phase], float] = {}
        self._waiting: dict[Chunk, dict[int, float]] = {}

    def run(self, placed: Placed) -> None:
        """Issue a phase."""
        chunk = placed.action.stage, placed.action.microbatch
        halves = self.halves.get(chunk, 1)
        if placed.phase.is_transfer:
            start = max(self.compute, self.transfer)
            self.transfer = self._ends[chunk, placed.phase] = start + self.costs.seconds(placed, halves=halves)
            if self.serial:
                self.compute = self.transfer
            return
        for needed in waits_for(placed.phase, halves=halves):
            self.compute = max(self.compute, self._ends.pop((chunk, needed)))
        waiting = self._waiting.setdefault(chunk, {})
        if placed.phase.kind == "weights":
            due = [link for link in waiting if link >= placed.phase.link]
            seconds = sum(waiting.pop(link) for link in due)
        else:
            seconds = self.costs.seconds(placed, halves=halves)
            waiting[placed.phase.link] = waiting.get(placed.phase.link, 0.0) + self.costs.put_off(placed, halves=halves)
        self.compute += seconds
        self.busy += seconds


def time_of(phases: Sequence[Placed], costs: PhaseCosts, *, halves: int = 1, serial: bool = False) -> float:
    """Seconds of phases by themselves: a chunk alone, one in two halves, a pair. Of a W, all its chunk's weights."""
    chunks = {(placed.action.stage, placed.action.microbatch) for placed in phases}
    resources = Resources(costs, dict.fromkeys(chunks, halves), serial)
    for action in {placed.action for placed in phases if placed.action.kind == "W"}:
        prepare_weights(resources, action)
    for placed in phases:
        resources.run(placed)
    return max(resources.compute, resources.transfer)


def prepare_weights(resources: Resources, action: Action) -> None:
    """As after the I of a chunk that was run elsewhere: all its weight gradients wait."""
    resources._waiting[action.stage, action.microbatch] = resources.costs.all_weights(action.stage)
