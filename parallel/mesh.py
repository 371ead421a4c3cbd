"""Ranks to axes and groups: pure arithmetic first, process groups from it second. A mesh is passed in, never global.

Ranks count expert axis fastest, then the rest of the data axis, then pipeline: rank = pipeline * data_size + data,
data = outer * expert_size + expert. So an expert group is a run of neighbouring ranks (nodes, on a cluster).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Where a rank stands and which ranks stand with it; no communication."""

    config: ParallelConfig
    rank: int

    def rank_at(self, pipeline: int, data: int) -> int:
        """Global rank at a position."""
        return pipeline * self.config.data + data

    @property
    def pipeline_rank(self) -> int:
        """Position on the pipeline axis."""
        return self.rank // self.config.data

    @property
    def data_rank(self) -> int:
        """Position on the data axis."""
        return self.rank % self.config.data

    @property
    def expert_rank(self) -> int:
        """Position on the expert axis, inside the data axis."""
        return self.data_rank % self.config.expert

    def expert_ids(self, num_experts: int) -> range:
        """Global ids of the routed experts that this rank holds of every MoE layer of its stages."""
        size = num_experts // self.config.expert
        return range(self.expert_rank * size, (self.expert_rank + 1) * size)

    def expert_ranks(self) -> tuple[int, ...]:
        """The ranks that hold all experts between them, this one among them."""
        first = self.rank - self.expert_rank
        return tuple(range(first, first + self.config.expert))

    def pipeline_ranks(self) -> tuple[int, ...]:
        """This rank's pipeline, first to last."""
        return tuple(self.rank_at(p, self.data_rank) for p in range(self.config.pipeline))

    def gradient_ranks(self, holders: Iterable[int], *, expert: bool) -> tuple[int, ...]:
        """Ranks that hold a copy of a weight of this rank, and so sum its gradient.

        holders: pipeline ranks that hold its stage; expert: a routed expert's weight, held by one expert position.
        """
        size = self.config.expert
        data = [d for d in range(self.config.data) if not expert or d % size == self.expert_rank]
        return tuple(self.rank_at(p, d) for p in sorted(holders) for d in data)


@dataclass(frozen=True)
class Membership:
    """One process group of a run: its ranks. up: the pipeline's second one, for messages to lower ranks."""

    ranks: tuple[int, ...]
    up: bool = False


def memberships(config: ParallelConfig, holder_sets: Iterable[tuple[int, ...]]) -> tuple[Membership, ...]:
    """Every process group that `Groups` creates, in the order in which all ranks do, each but the pipelines' once.

    holder_sets: of pipeline ranks, each of which holds a stage or a weight between them.
    """
    data_ranks, experts = ([Mesh(config, rank) for rank in range(n)] for n in (config.data, config.expert))
    found = dict.fromkeys([Membership(tuple(range(config.world_size)))])
    found |= dict.fromkeys(Membership(mesh.pipeline_ranks()) for mesh in data_ranks)
    found |= dict.fromkeys(Membership(mesh.pipeline_ranks(), up=True) for mesh in data_ranks)
    starts = range(0, config.world_size, config.expert)
    found |= dict.fromkeys(Membership(Mesh(config, start).expert_ranks()) for start in starts)
    for holders in sorted(set(holder_sets)):
        found |= dict.fromkeys([Membership(data_ranks[0].gradient_ranks(holders, expert=False))])
        found |= dict.fromkeys(Membership(mesh.gradient_ranks(holders, expert=True)) for mesh in experts)
    return tuple(found)


class Groups:
    """Process groups of one rank, created in the same order by all ranks (`memberships`).

    expert: the rank's expert group. down, up: the pipeline, for messages to higher and to lower ranks, so that the two
    directions of traffic never queue behind each other. world: all ranks. timeout: of every collective.
    """

    def __init__(self, mesh: Mesh, holder_sets: Iterable[tuple[int, ...]], *, timeout: timedelta) -> None:
        self.mesh, self.timeout = mesh, timeout
        made: dict[Membership, dist.ProcessGroup] = {}
        for one in memberships(mesh.config, holder_sets):
            made[one] = dist.new_group(list(one.ranks), timeout=timeout)  # type: ignore[assignment]
        self._made = made
        self.world = made[Membership(tuple(range(mesh.config.world_size)))]
        self.down = made[Membership(mesh.pipeline_ranks())]
        self.up = made[Membership(mesh.pipeline_ranks(), up=True)]
        self.expert = made[Membership(mesh.expert_ranks())]

    def gradient(self, holders: Iterable[int], *, expert: bool) -> dist.ProcessGroup:
        """Group over which a weight's gradient is summed and its optimizer state is sharded."""
        return self._made[Membership(self.mesh.gradient_ranks(holders, expert=expert))]
