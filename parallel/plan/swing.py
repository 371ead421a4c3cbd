"""A `Work` as a `Swing`: how far the level rises while it runs, and where it leaves it. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.pipeline.phases import Phase, turns
from parallel.plan.live import Ledger, Passing, Stage, Swing


@dataclass(frozen=True)
class Acting:
    """An action of one `Work`: its kind, its stage's bytes and the parts that its chunk's tokens take."""

    kind: str
    stage: Stage
    halves: int = 1

    def passing(self) -> Passing:
        """Its chunk as it comes to the action."""
        return Passing(self.halves, self.stage.all_put_off() if self.kind == "W" else {})


def swing_of(actions: tuple[Acting, ...]) -> Swing:
    """Of actions that run as one. Of a pair the phases take turns, the backward first.

    What is left in `put_off` of a B is nothing; a backward's own gradient leaves with its message.
    """
    ledger = Ledger()
    chunks = [action.passing() for action in actions]
    for which, phase in order_of(actions):
        actions[which].stage.play(phase, ledger, chunks[which])
    for action in actions:
        if action.kind in "BI":
            ledger.move(travelling=-action.stage.s.hidden)
    return ledger.swing()


def order_of(actions: tuple[Acting, ...]) -> Iterator[tuple[int, Phase]]:
    """Phases in their order, each with the number of its action; as `parallel.pipeline.overlap` interleaves."""
    programs = [action.stage.program(action.kind, halves=action.halves) for action in actions]
    if len(actions) < 2 or actions[0].kind != "F":
        for which, program in enumerate(programs):
            yield from ((which, phase) for phase in program)
        return
    sides = [turns(program, halves=action.halves) for program, action in zip(programs, actions, strict=True)]
    for i in range(max(map(len, sides))):
        for which in (1, 0):
            if i < len(sides[which]):
                yield from ((which, phase) for phase in sides[which][i])
