"""Seconds of every stage's phases, from kernels, and where the time of a simulated step goes. No torch."""

from dataclasses import dataclass, fields, replace

from parallel.pipeline.actions import Action, Pair, Schedule
from parallel.pipeline.overlap import Placed
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.simulate_phases import PhaseTimeline
from parallel.plan.hardware import Hardware
from parallel.plan.kernels import ALL_TO_ALL_SMS, DEEPEP_SMS, Calibration, Machine
from parallel.plan.layers import PHASES, LayerShape, layer_bill, transfers

_BY_HALF = ("experts", "experts_grad", "dispatch", "combine", "dispatch_grad", "combine_grad")


@dataclass(frozen=True)
class Ends:
    """Seconds of what follows a stage's last block, and of what precedes it: forward, input and weight gradient."""

    forward: float = 0.0
    grad: float = 0.0
    weights: float = 0.0

    def __add__(self, other: "Ends") -> "Ends":
        return Ends(self.forward + other.forward, self.grad + other.grad, self.weights + other.weights)


@dataclass(frozen=True)
class Chain:
    """One stage: its MoE layers with what is computed in front of each, and the end."""

    links: tuple[LayerCosts, ...]
    end: Ends


@dataclass(frozen=True)
class StageCosts(PhaseCosts):
    """Costs of every stage, apart for chunks alone and in pairs: in a pair the all-to-all takes SMs and bandwidth.

    alone, paired: a chain for each stage. single: chunks (is a forward, stage, micro-batch) that run alone.
    bare: transfers of chunks alone hide under nothing, as in an engine without overlap inside a chunk.
    """

    alone: tuple[Chain, ...] = ()
    paired: tuple[Chain, ...] = ()
    single: frozenset[tuple[bool, int, int]] = frozenset()
    bare: bool = False

    def num_links(self, stage: int) -> int:
        """See `PhaseCosts`."""
        return 1 + len(self.paired[stage].links)

    def seconds(self, placed: Placed, *, halves: int) -> float:
        """See `PhaseCosts`."""
        kind, alone = placed.phase.kind, self._alone(placed)
        chain = (self.alone if alone else self.paired)[placed.action.stage]
        if kind in ("end", "end_grad"):
            return chain.end.forward if kind == "end" else chain.end.grad
        layer, share = chain.links[placed.phase.link], 1 / halves if kind in _BY_HALF else 1.0
        if not (alone and self.bare):
            return getattr(layer, kind) * share
        if placed.phase.is_transfer:
            return 0.0
        moved = {"shared": "dispatch", "experts": "combine", "shared_grad": "combine_grad"}
        moved["experts_grad"] = "dispatch_grad"
        return (getattr(layer, kind) + (getattr(layer, moved[kind]) if kind in moved else 0.0)) * share

    def put_off(self, placed: Placed, *, halves: int) -> float:
        """See `PhaseCosts`."""
        kind = placed.phase.kind
        chain = (self.alone if self._alone(placed) else self.paired)[placed.action.stage]
        if kind == "end_grad":
            return chain.end.weights
        if kind in ("attend_grad", "shared_grad", "experts_grad"):
            seconds = getattr(chain.links[placed.phase.link], kind.replace("_grad", "_weights"))
            return seconds / (halves if kind == "experts_grad" else 1)
        return 0.0

    def all_weights(self, stage: int) -> dict[int, float]:
        """See `PhaseCosts`."""
        chain = self.alone[stage]
        found = {i: x.attend_weights + x.shared_weights + x.experts_weights for i, x in enumerate(chain.links)}
        return {**found, len(chain.links): chain.end.weights}

    def _alone(self, placed: Placed) -> bool:
        action = placed.action
        return (action.kind == "F", action.stage, action.microbatch) in self.single


def layer_costs(shape: LayerShape, machine: Machine, *, sms: int) -> LayerCosts:
    """A MoE layer's phases; sms: those that the all-to-all has."""
    bill, moved = layer_bill(shape, machine, moe=True), transfers(shape, machine, sms=sms)
    compute = {phase: bill.phase(phase) for phase in PHASES}
    weights = {phase.replace("_grad", "_weights"): bill.phase(f"{phase}_weights") for phase in PHASES[3:]}
    travel = {part.name: getattr(moved, part.name) for part in fields(moved)}
    slower = machine.calibration.training
    return LayerCosts(**{key: slower * value for key, value in {**compute, **weights, **travel}.items()})


def chains(stages: tuple[range, ...], shape: LayerShape, machine: Machine, *, sms: int) -> tuple[Chain, ...]:
    """Every stage on a machine: dense layers, head, loss and MTP's projection belong to the link that follows them."""
    model, moe = shape.model, layer_costs(shape, machine, sms=sms)
    bill = layer_bill(shape, machine, moe=False)
    dense = Ends(bill.phase("attend"), bill.phase("attend_grad"), bill.phase("attend_grad_weights"))
    head = _product(machine, shape.tokens, model.vocab_size, model.hidden_size)
    joined = _product(machine, shape.tokens, model.hidden_size, 2 * model.hidden_size)
    found = []
    for stage in stages:
        links, waiting = [], Ends()
        for layer in stage:
            if model.is_moe(layer):
                links.append(_with_front(moe, waiting))
                waiting = Ends()
            else:
                waiting += dense
        if stage.stop == model.num_hidden_layers:
            for _ in range(model.num_nextn_predict_layers):
                links.append(_with_front(moe, waiting + head + joined))
                waiting = Ends()
            waiting += head
        found.append(Chain(tuple(links), waiting))
    return tuple(found)


def _product(machine: Machine, rows: int, n: int, k: int) -> Ends:
    """A wide product with its two gradients."""
    forward, back = machine.gemm(rows, n, k, fp8=False), machine.gemm(rows, k, n, fp8=False)
    return Ends(forward, back, machine.gemm(n, k, rows, fp8=False, accumulate=True))


def _with_front(layer: LayerCosts, front: Ends) -> LayerCosts:
    return replace(
        layer,
        attend=layer.attend + front.forward,
        attend_grad=layer.attend_grad + front.grad,
        attend_weights=layer.attend_weights + front.weights,
    )


def single_chunks(schedule: Schedule) -> frozenset[tuple[bool, int, int]]:
    """Forwards and backwards without a partner."""
    return frozenset(
        (step.kind == "F", step.stage, step.microbatch)
        for steps in schedule.ranks
        for step in steps
        if isinstance(step, Action) and step.kind != "W"
    )


def price(
    schedule: Schedule,
    stages: tuple[range, ...],
    shape: LayerShape,
    hardware: Hardware,
    calibration: Calibration,
    *,
    bare: bool = False,
) -> StageCosts:
    """Costs of a schedule's stages. A calibration holds under overlap: alone, only its compute classes are used."""
    fp32 = shape.element == 4
    busy = Machine.beside_all_to_all(hardware, calibration, expert=shape.expert, fp32=fp32)
    compute = {k: v for k, v in calibration.factors.items() if k not in ("dispatch", "combine")}
    idle = Machine(hardware, hardware.num_sms, replace(calibration, factors=compute), fp32=fp32)
    hop = shape.tokens * shape.model.hidden_size * shape.element / hardware.ib_bytes_per_second
    paired = chains(stages, shape, busy, sms=ALL_TO_ALL_SMS)
    alone = chains(stages, shape, idle, sms=DEEPEP_SMS)
    nothing = LayerCosts.even(0.0, 0.0)
    return StageCosts(
        nothing, message=hop, alone=alone, paired=paired, single=single_chunks(schedule), bare=bare
    )  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Mean seconds of a rank by kind of work, as in table 4 of arXiv 2505.09343; they add up to the step.

    backward: chunks B and I that run alone; weight: chunks W. bubble: all of a rank's idling.
    optimizer: update of the shards; exposed_communication: gradients and weights between ranks, not hidden.
    """

    forward: float
    bubble: float
    backward: float
    weight: float
    pair: float
    optimizer: float = 0.0
    exposed_communication: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(getattr(self, part.name) for part in fields(self))

    def rows(self) -> dict[str, float]:
        """By the names of the table."""
        return {
            "1F": self.forward, "bubble": self.bubble, "1B": self.backward, "1W": self.weight, "1F1B": self.pair,
            "optimizer": self.optimizer, "exposed_communication": self.exposed_communication,
        }  # fmt: skip


def split_of(timeline: PhaseTimeline) -> Split:
    """Where the ranks' time in the pipeline goes, on average."""
    total = {"F": 0.0, "B": 0.0, "W": 0.0, "pair": 0.0}
    for row in timeline.ranks:
        for timed in row:
            seconds = timed.end - timed.start
            if isinstance(timed.step, Pair):
                total["pair"] += seconds
            else:
                total[{"F": "F", "I": "B", "B": "B", "W": "W"}[timed.step.kind]] += seconds
    ranks = len(timeline.ranks)
    busy = {key: seconds / ranks for key, seconds in total.items()}
    return Split(busy["F"], timeline.makespan - sum(busy.values()), busy["B"], busy["W"], busy["pair"])
