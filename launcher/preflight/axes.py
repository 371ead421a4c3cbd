"""The collectives of each axis over the run's own process groups: right results, and how fast."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.preflight.team import Team, pattern
from launcher.preflight.verdict import Row
from parallel.mesh import Groups, Mesh

EVERYONE = -1  # in place of a receiver: what is sent is the same for all


@dataclass(frozen=True)
class Outcome:
    """One collective of one group as one rank saw it. wrong: ranks whose part of the result is not what they sent."""

    axis: str
    ranks: tuple[int, ...]
    seconds: float
    wrong: tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """A group of the run that this rank is in, and what the run does over it."""

    name: str
    group: dist.ProcessGroup
    collective: Callable[[dist.ProcessGroup, Tensor, Tensor, int], None]
    to_all: bool


def all_reduce(group: dist.ProcessGroup, out: Tensor, parts: Tensor, me: int) -> None:
    """out [n, L]: the sum over ranks of zeros with the own part in row `me`, so row i is what rank i gave."""
    out.zero_()
    out[me] = parts[me]
    dist.all_reduce(out, group=group)


def reduce_scatter(group: dist.ProcessGroup, out: Tensor, parts: Tensor, me: int) -> None:
    """As `all_reduce`, each rank receiving a table of its own: every rank gives row `me` of all n tables."""
    count = out.shape[0]
    tables = torch.zeros(count, *out.shape, device=out.device)
    tables[:, me] = parts
    dist.reduce_scatter_single(out, tables.flatten(0, 1), group=group)


def all_gather(group: dist.ProcessGroup, out: Tensor, parts: Tensor, me: int) -> None:
    """out [n, L]: row i is rank i's part."""
    dist.all_gather_single(out.view(-1), parts[me].contiguous(), group=group)


def all_to_all(group: dist.ProcessGroup, out: Tensor, parts: Tensor, me: int) -> None:
    """out [n, L]: row i is what rank i has for this one."""
    dist.all_to_all_single(out, parts, group=group)


def axes_of(groups: Groups, mesh: Mesh, holder_sets: Iterable[tuple[int, ...]]) -> list[Axis]:
    """What the run uses, in an order that is the same on all ranks; groups of one rank are left out."""
    found = [Axis("all ranks: all-reduce", groups.world, all_reduce, True)]
    found.append(Axis("pipeline down: all-gather", groups.down, all_gather, True))
    found.append(Axis("pipeline up: all-gather", groups.up, all_gather, True))
    found.append(Axis("experts: all-to-all", groups.expert, all_to_all, False))
    for holders in sorted(set(holder_sets)):
        if mesh.pipeline_rank in holders:
            for expert, words in ((False, "dense"), (True, "expert")):
                group = groups.gradient(holders, expert=expert)
                found.append(Axis(f"{words} gradients: reduce-scatter", group, reduce_scatter, False))
                found.append(Axis(f"{words} weights: all-gather", group, all_gather, True))
    return [axis for axis in found if dist.get_world_size(axis.group) > 1]


def try_axis(team: Team, axis: Axis) -> Outcome:
    """Run one collective a few times and compare every rank's part."""
    ranks = tuple(dist.get_process_group_ranks(axis.group))
    me, count, device = ranks.index(team.rank), len(ranks), team.process.device
    length = max(1, team.payload_bytes // 4 // count // (count if axis.collective is reduce_scatter else 1))
    targets = [EVERYONE] * count if axis.to_all else list(ranks)
    parts = torch.stack([pattern(team.rank, target, length, device) for target in targets])
    out = torch.empty(count, length, device=device)
    seconds = team.best_seconds(lambda: axis.collective(axis.group, out, parts, me))
    to = EVERYONE if axis.to_all else team.rank
    wrong = [rank for row, rank in zip(out, ranks, strict=True) if not row.equal(pattern(rank, to, length, device))]
    return Outcome(axis.name, ranks, seconds, tuple(wrong))


def check_axes(team: Team, axes: list[Axis]) -> list[Row]:
    """One row for each axis."""
    mine = [team.phase(axis.name, lambda axis=axis: try_axis(team, axis)) for axis in axes]
    return judge([outcome for said in team.everyone(mine) for outcome in said], team)


def judge(outcomes: list[Outcome], team: Team) -> list[Row]:
    """Rows from what all ranks saw: a rank is wrong if its part arrives wrong; a group slow beside its like."""
    rows = []
    for axis, size in dict.fromkeys((outcome.axis, len(outcome.ranks)) for outcome in outcomes):
        seconds: dict[tuple[int, ...], float] = {}
        wrong: dict[int, int] = {}
        for outcome in outcomes:
            if (outcome.axis, len(outcome.ranks)) == (axis, size):
                seconds[outcome.ranks] = max(seconds.get(outcome.ranks, 0.0), outcome.seconds)
                for rank in outcome.wrong:
                    wrong[rank] = wrong.get(rank, 0) + 1
        middle = median(seconds.values())
        bad = [f"{team.nodes.name(rank)}: its part is wrong on {count} ranks" for rank, count in sorted(wrong.items())]
        if len(seconds) > 2:
            bad += [
                f"{team.nodes.group(ranks)}: {middle / took:.2g} of the median group's speed"
                for ranks, took in seconds.items()
                if took * team.slow_share > middle
            ]
        groups = f"{len(seconds)} group{'s' if len(seconds) > 1 else ''} of {size}"
        rows.append(Row(axis, f"{groups}, median {1e3 * middle:.3g} ms", tuple(bad)))
    return rows
