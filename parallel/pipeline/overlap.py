"""From a rank's actions to the phases it issues: what the executor interprets and the simulator prices. No torch.

Three things hide transfers: a pair interleaves its two chunks; a chunk without a partner in its forward or its backward
goes through the layer in two halves; and weight gradients run under the transfers of their own chunk (B, or I with its
own W after it). A gradient leaves for the stage before as soon as it is there, before the chunk's last weights'.
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
        if isinstance(step, Pair) and joins_pairs(level):
            work.append(Work(parts(step), pair(step)))
        elif isinstance(step, tuple):
            placed = tuple(Placed(step[0], phase) for phase in backward(step[0], weights=True))
            work.append(Work(step, placed))
        else:
            work += [Work((action,), place(action)) for action in parts(step)]
    return work


def joins_pairs(level: str) -> bool:
    """Whether the two chunks of a pair run as one work."""
    return level != "off"


def sending(work: Work) -> tuple[Action, ...]:
    """The actions whose messages leave during the work, in that order: of a pair first the gradient.

    Both go to the same rank, which matches messages by order alone (`Schedule.messages_from`).
    """
    return tuple(
        sorted((action for action in work.actions if action.kind != "W"), key=lambda action: action.kind == "F")
    )


def completes(placed: Placed, *, num_links: int) -> bool:
    """Whether the action's message is ready after this phase: an activation at the end, a gradient before its W."""
    if placed.action.kind == "F":
        return placed.phase.kind == "end"
    return placed.phase == Phase("attend_grad" if num_links > 1 else "end_grad", 0) and placed.action.kind != "W"


def _interleaved(sides: tuple[tuple[Action, list[Program]], ...]) -> Iterator[Placed]:
    """Turn by turn, the backward first (report, figure 4): each computes while the other's rows travel.

    Of the longer one, what is left follows alone.
    """
    for i in range(max(len(side) for _, side in sides)):
        for action, side in sides:
            if i < len(side):
                yield from (Placed(action, phase) for phase in side[i])


def _joined(steps: tuple[Step, ...], level: str) -> Iterator[Step | tuple[Action, Action]]:
    """Steps, with each I whose own W comes next taken together with it."""
    position = 0
    while position < len(steps):
        here, following = steps[position], steps[position + 1 : position + 2]
        position += 1
        if level == "all" and isinstance(here, Action) and here.kind == "I":
            own = Action("W", here.stage, here.microbatch)
            if following == (own,):
                yield here, own
                position += 1
                continue
        yield here
