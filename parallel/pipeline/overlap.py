"""From a rank's actions to the phases it issues: what the executor interprets and the simulator prices. No torch.

Three things hide transfers, each switched by `Overlap`: a pair interleaves its two chunks; a chunk without a partner in
its forward or its backward goes through the layer in two halves; and weight gradients run under the transfers of the
chunk itself (B, or I with its own W next to it) or of the input gradient that follows them (W then I).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Pair, Schedule, Step, parts
from parallel.pipeline.phases import Phase, Program, backward_program, forward_program, turns

LEVELS = ("off", "pairs", "all")


@dataclass(frozen=True, slots=True)
class Placed:
    """A phase of the chunk of an action."""

    action: Action
    phase: Phase


@dataclass(frozen=True)
class Work:
    """Actions that run as one: their phases in the order of issue."""

    actions: tuple[Action, ...]
    phases: tuple[Placed, ...]


def halves_of(schedule: Schedule, level: str) -> dict[tuple[int, int], int]:
    """In how many parts each chunk (stage, micro-batch) sends its tokens: 2 where F or backward has no partner."""
    if level != "all":
        return {}
    return {
        (step.stage, step.microbatch): 2
        for steps in schedule.ranks
        for step in steps
        if isinstance(step, Action) and step.kind != "W"
    }


def plan(schedule: Schedule, rank: int, *, num_links: Callable[[int], int], level: str) -> list[Work]:
    """The rank's work in order.

    num_links: links in a stage's chain, the end included; 1 if nothing of it can be overlapped. level: `off` (actions
    one after the other, each chunk undivided), `pairs`, or `all`.
    """
    halves = halves_of(schedule, level)

    def forward(action: Action) -> Program:
        return forward_program(num_links(action.stage), halves=halves.get((action.stage, action.microbatch), 1))

    def backward(action: Action, *, weights: bool) -> Program:
        parts_of = halves.get((action.stage, action.microbatch), 1)
        return backward_program(num_links(action.stage), halves=parts_of, weights=weights)

    def place(action: Action) -> tuple[Placed, ...]:
        if action.kind == "F":
            return tuple(Placed(action, phase) for phase in forward(action))
        if action.kind == "W":
            return (Placed(action, Phase("weights", 0)),)
        return tuple(Placed(action, phase) for phase in backward(action, weights=action.kind == "B"))

    def pair(step: Pair) -> tuple[Placed, ...]:
        key = (step.forward.stage, step.forward.microbatch), (step.backward.stage, step.backward.microbatch)
        sides = (
            (
                step.backward,
                turns(backward(step.backward, weights=step.backward.kind == "B"), halves=halves.get(key[1], 1)),
            ),
            (step.forward, turns(forward(step.forward), halves=halves.get(key[0], 1))),
        )
        return tuple(_interleaved(sides))

    work: list[Work] = []
    for step in _joined(schedule.ranks[rank], level):
        if isinstance(step, Pair) and level != "off":
            work.append(Work(parts(step), pair(step)))
        elif isinstance(step, tuple):
            first, second = step
            if first.kind == "I":  # its own W
                placed = tuple(Placed(first, phase) for phase in backward(first, weights=True))
            else:
                placed = tuple(_filled(backward(second, weights=False), second, first))
            work.append(Work(step, placed))
        else:
            work += [Work((action,), place(action)) for action in parts(step)]
    return work


def _interleaved(sides: tuple[tuple[Action, list[Program]], ...]) -> Iterator[Placed]:
    """Turn by turn, the backward first (report, figure 4): each computes while the other's rows travel.

    Of the longer one, what is left follows alone.
    """
    for i in range(max(len(side) for _, side in sides)):
        for action, side in sides:
            if i < len(side):
                yield from (Placed(action, phase) for phase in side[i])


def _joined(steps: tuple[Step, ...], level: str) -> Iterator[Step | tuple[Action, Action]]:
    """Steps, with each I beside a W taken together: with its own W after it, else with the W before it."""
    i = 0
    while i < len(steps):
        here, following = steps[i], steps[i + 1] if i + 1 < len(steps) else None
        i += 1
        if level == "all" and isinstance(here, Action) and isinstance(following, Action):
            own = here.kind == "I" and following == Action("W", here.stage, here.microbatch)
            if own or (here.kind == "W" and following.kind == "I"):
                yield here, following
                i += 1
                continue
        yield here


def _filled(program: Program, input_grad: Action, weights: Action) -> Iterator[Placed]:
    """An input gradient with another chunk's weight gradients, link by link, under its transfers to the experts."""
    for phase in program:
        yield Placed(input_grad, phase)
        if phase.kind == "shared_grad":
            yield Placed(weights, Phase("weights", phase.link))
    yield Placed(weights, Phase("weights", 0))
