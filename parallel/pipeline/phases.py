"""The phases of a chunk as data: which computation runs while which rows travel. No torch.

A chunk is one micro-batch on one stage. Its stage is a chain of links (`Transformer.chain`), each a MoE layer with the
work in front of it; the last link has no layer. A program is a chunk's phases in the order in which one rank issues
them. Computation runs in that order, transfers run in that order beside it, and a phase that needs a transfer waits
for it (`waits_for`). The executor interprets programs, the simulator prices the same ones.

Halves: a chunk that has no partner sends its tokens in two halves, so that one half computes while the other travels.
"""

from functools import cache
from typing import NamedTuple

# Computation: attend (the link's entry, attention, router), shared and routed experts, the chain's end, and their
# gradients of inputs; weights computes the weight gradients put off in this link and those after it.
COMPUTE = ("attend", "shared", "experts", "end", "end_grad", "shared_grad", "experts_grad", "attend_grad", "weights")
# Transfers: they start where they stand in the program. combine_grad sends gradients to the experts, dispatch_grad
# brings them back.
TRANSFERS = ("dispatch", "combine", "combine_grad", "dispatch_grad")


class Phase(NamedTuple):
    """One step of a chunk: `kind` of link number `link`, for half number `half` of the tokens where that matters.

    A tuple, because simulations look phases up by the million.
    """

    kind: str
    link: int
    half: int = 0

    @property
    def is_transfer(self) -> bool:
        """Whether it starts a transfer; else it computes."""
        return self.kind in TRANSFERS


Program = tuple[Phase, ...]


@cache
def forward_program(num_links: int, *, halves: int = 1) -> Program:
    """Forward of a chunk whose chain has num_links links, the end included; halves: 1 or 2.

    Shared experts run under the dispatch; with two halves the first half's experts run under the second's dispatch,
    and the second's under the first's combine.
    """
    phases: list[Phase] = []
    for link in range(num_links - 1):
        phases.append(Phase("attend", link))
        phases += [Phase("dispatch", link, half) for half in range(halves)]
        phases.append(Phase("shared", link))
        for half in range(halves):
            phases += [Phase("experts", link, half), Phase("combine", link, half)]
    return (*phases, Phase("end", num_links - 1))


@cache
def backward_program(num_links: int, *, halves: int = 1, weights: bool) -> Program:
    """Backward of a chunk; halves as in its forward.

    weights: with its weight gradients, which run under its transfers (B); else without (I).
    """
    phases = [Phase("end_grad", num_links - 1)]
    filler = ["weights"] if weights else []
    for link in reversed(range(num_links - 1)):
        phases += [Phase("combine_grad", link, half) for half in range(halves)]
        phases.append(Phase("shared_grad", link))
        phases += [Phase(kind, link + 1) for kind in filler]
        for half in range(halves):
            phases += [Phase("experts_grad", link, half), Phase("dispatch_grad", link, half)]
        phases += [Phase(kind, link) for kind in filler]
        phases.append(Phase("attend_grad", link))
    return (*phases, *(Phase(kind, 0) for kind in filler))


@cache
def waits_for(phase: Phase, *, halves: int = 1) -> tuple[Phase, ...]:
    """Transfers of its own chunk that a computing phase needs; those of the program that it is part of."""
    link, half = phase.link, phase.half
    if phase.kind in ("attend", "end"):
        return tuple(Phase("combine", link - 1, h) for h in range(halves)) if link else ()
    if phase.kind == "experts":
        return (Phase("dispatch", link, half),)
    if phase.kind == "experts_grad":
        return (Phase("combine_grad", link, half),)
    if phase.kind == "attend_grad":
        return tuple(Phase("dispatch_grad", link, h) for h in range(halves))
    return ()


def turns(program: Program, *, halves: int = 1) -> list[Program]:
    """The program cut in front of every phase that waits: between two turns somebody else may compute.

    Both halves stay in one turn: the partner hides the first one's transfer, and that hides the second one's.
    """
    found: list[list[Phase]] = [[]]
    for phase in program:
        if phase.half == 0 and waits_for(phase, halves=halves) and found[-1]:
            found.append([])
        found[-1].append(phase)
    return [tuple(turn) for turn in found]
