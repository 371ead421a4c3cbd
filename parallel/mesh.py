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


class Groups:
    """Process groups of one rank, created in the same order by all ranks.

    expert: the rank's expert group. down, up: the pipeline, for messages to higher and to lower ranks, so that the two
    directions of traffic never queue behind each other. world: all ranks. timeout: of every collective.
    """

    def __init__(self, mesh: Mesh, holder_sets: Iterable[tuple[int, ...]], *, timeout: timedelta) -> None:
        self.mesh, self.timeout = mesh, timeout
        config = mesh.config
        everyone = [Mesh(config, rank) for rank in range(config.world_size)]
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.world = self._create([tuple(range(config.world_size))])
        self.down = self._create(m.pipeline_ranks() for m in everyone[: config.data])
        self.up = self._create((m.pipeline_ranks() for m in everyone[: config.data]), again=True)
        self.expert = self._create(tuple(m.rank - m.expert_rank + e for e in range(config.expert)) for m in everyone)
        for holders in sorted(set(holder_sets)):
            for expert in (False, True):
                self._create(m.gradient_ranks(holders, expert=expert) for m in everyone)

    def _create(self, memberships: Iterable[tuple[int, ...]], *, again: bool = False) -> dist.ProcessGroup:
        """Create every distinct group; the one this rank is in is returned (None if it is in none of them)."""
        mine = None
        for ranks in dict.fromkeys(memberships):
            if again or ranks not in self._groups:
                group = dist.new_group(list(ranks), timeout=self.timeout)
                if not again:
                    self._groups[ranks] = group  # type: ignore[assignment]
            else:
                group = self._groups[ranks]
            if self.mesh.rank in ranks:
                mine = group
        return mine  # type: ignore[return-value]

    def gradient(self, holders: Iterable[int], *, expert: bool) -> dist.ProcessGroup:
        """Group over which a weight's gradient is summed and its optimizer state is sharded."""
        return self._groups[self.mesh.gradient_ranks(holders, expert=expert)]
