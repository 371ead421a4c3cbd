"""The layout of a run over ranks, as numbers; no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks each axis has and how the pipeline is driven.

    World size = pipeline * data; the expert axis lies inside the data axis. Under a bidirectional schedule every
    stage lives on two pipeline ranks.
    """

    pipeline: int = 1
    data: int = 1
    expert: int = 1
    schedule: str = "1f1b"  # 1f1b | dualpipe
    # Main-model layers of each stage, first to last; None: balanced by cost, embedding and head counted.
    layers_per_stage: tuple[int, ...] | None = None
    dispatcher: str = "flat"  # flat: one all-to-all, a row for every (token, expert)

    @property
    def world_size(self) -> int:
        """Ranks the run needs."""
        return self.pipeline * self.data
