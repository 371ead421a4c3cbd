"""Which ranks meet in each stage of a transfer, and in which order the stages come: arithmetic alone, no torch.

`collective` has a process group of its own for every stage; the other dispatchers have none beside the expert group.
"""

from collections.abc import Mapping, Sequence

Ranks = tuple[int, ...]
ALL = "all ranks"  # the expert group itself

_THERE, _BACK = ("dispatch rail", "dispatch node"), ("combine node", "combine rail")
# Of each kind of transfer (`parallel.pipeline.phases.TRANSFERS`) the hops on which it has collectives, in order. A
# first dispatch tells the counts to all ranks before it. The kernels of the others have no collectives at all.
_STAGES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "flat": dict.fromkeys(("dispatch", "combine", "combine_grad", "dispatch_grad"), (ALL,)),
    "collective": {"dispatch": (ALL, *_THERE), "combine": _BACK, "combine_grad": _THERE, "dispatch_grad": _BACK},
}


def memberships(expert_ranks: Sequence[int], ranks_per_node: int) -> tuple[dict[str, Ranks], ...]:
    """Global ranks of every group of `collective`, by member of the expert group: hop -> ranks, in order of creation.

    ranks_per_node: neighbours of the expert group on one node; divides it. A group of one rank is not created.
    """
    found = []
    for me in range(len(expert_ranks)):
        first = me // ranks_per_node * ranks_per_node
        rail = tuple(expert_ranks[me % ranks_per_node :: ranks_per_node])
        node = tuple(expert_ranks[first : first + ranks_per_node])
        # A group each for every stage of both kinds: their collectives then need no common order.
        found.append(dict(zip((*_THERE, *_BACK), (rail, node, node, rail), strict=True)))
    return tuple(found)


def stages(dispatcher: str, kind: str) -> tuple[str, ...]:
    """Hops of a transfer of this kind in order, as `memberships` calls them, `ALL` being the expert group."""
    return _STAGES.get(dispatcher, {}).get(kind, ())
