"""Which pipeline rank runs which stage: a row of ranks by stage, one row for each direction of travel. No torch."""

from collections.abc import Sequence

Placement = tuple[tuple[int, ...], ...]  # [direction][stage] -> pipeline rank


def linear(num_ranks: int) -> Placement:
    """Stage s on rank s."""
    return loop(num_ranks, 1)


def loop(num_ranks: int, stages_per_rank: int) -> Placement:
    """Stage s on rank s % P, round and round."""
    return (tuple(stage % num_ranks for stage in range(num_ranks * stages_per_rank)),)


def v_shape(num_ranks: int) -> Placement:
    """Down and back up: rank r holds stages r and 2P - 1 - r, so rank 0 holds the first and the last."""
    return ((*range(num_ranks), *reversed(range(num_ranks))),)


def mirror(num_ranks: int) -> Placement:
    """Two directions: stage s is on rank s for the micro-batches from rank 0, on P - 1 - s for those from the last."""
    return (tuple(range(num_ranks)), tuple(reversed(range(num_ranks))))


def shape(placement: Placement) -> str:
    """`linear`, `loop`, `v` or `mirror`; `free` for any other."""
    num_ranks = 1 + max(rank for row in placement for rank in row)
    known = {"linear": linear(num_ranks), "v": v_shape(num_ranks), "mirror": mirror(num_ranks)}
    if len(placement[0]) % num_ranks == 0:
        known.setdefault("loop", loop(num_ranks, len(placement[0]) // num_ranks))
    return next((name for name, ranks in known.items() if ranks == placement), "free")


def stages_on(placement: Placement, rank: int) -> tuple[int, ...]:
    """Stages whose weights the rank holds: direction by direction, first to last in each, none twice."""
    return tuple(dict.fromkeys(stage for row in placement for stage, place in enumerate(row) if place == rank))


def holders(placement: Placement, stage: int) -> tuple[int, ...]:
    """Ranks that hold the stage's weights, ascending."""
    return tuple(sorted({row[stage] for row in placement}))


def copies(placement: Placement) -> int:
    """How many ranks hold each weight at most: 1, or 2 with two directions."""
    return max(len(holders(placement, stage)) for stage in range(len(placement[0])))


def is_complete(placement: Placement, num_ranks: int) -> bool:
    """Whether every row names every rank and no other."""
    return all(set(row) == set(range(num_ranks)) for row in placement) and bool(placement)


def describe(placement: Placement, ranks: Sequence[int]) -> str:
    """Stages of some ranks in words, e.g. `rank 0: 0 and 7`."""
    return "; ".join(f"rank {rank}: {' and '.join(map(str, stages_on(placement, rank)))}" for rank in ranks)
