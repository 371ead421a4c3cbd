"""Our mesh against megatron-core's `parallel_state`: the same ranks in the same groups, tensor parallelism being 1.

What differs by intent: under DualPipe a stage lives on two pipeline ranks, so a gradient group joins Megatron's data
groups (and its expert data groups) of both; under 1F1B each is one of Megatron's. An embedding that two stages share is
in Megatron a group of two ranks for each data rank, summed after the data group; ours is one group of both stages' data
ranks.
"""

import json

import pytest

from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from tests.extras import environment_with, run_there

VERSION = "0.16.1"  # the newest for Python 3.11
SIZES = [(1, 8, 8), (2, 4, 2), (4, 4, 2), (4, 2, 1), (8, 2, 2), (2, 8, 4), (16, 2, 2), (3, 6, 3)]


def mirrored(mesh: Mesh) -> tuple[int, int]:
    """Pipeline ranks of a stage that this rank holds under DualPipe."""
    return mesh.pipeline_rank, mesh.config.pipeline - 1 - mesh.pipeline_rank


@pytest.mark.slow
def test_groups_are_megatrons() -> None:
    python = environment_with(f"megatron-core=={VERSION}", "psutil")
    output = run_there(python, "tests.parallel.megatron_program", json.dumps(SIZES))
    for (pipeline, data, expert), ranks in zip(SIZES, json.loads(output.splitlines()[-1]), strict=True):
        config = ParallelConfig(pipeline=pipeline, data=data, expert=expert)
        for rank, theirs in enumerate(ranks):
            mesh, where = Mesh(config, rank), f"rank {rank} of {pipeline}x{data}, expert {expert}"
            own = (mesh.pipeline_rank,)
            assert list(mesh.pipeline_ranks()) == theirs["pipeline"], where
            assert list(mesh.gradient_ranks(own, expert=False)) == theirs["data"], where
            assert list(mesh.gradient_ranks(own, expert=True)) == theirs["expert_data"], where
            first = rank - mesh.expert_rank
            assert list(range(first, first + expert)) == theirs["expert"], where
            if pipeline % 2 == 0:  # DualPipe: the groups of both holders together
                other = ranks[mesh.rank_at(mirrored(mesh)[1], mesh.data_rank)]
                for kind, is_expert in (("data", False), ("expert_data", True)):
                    joined = sorted(theirs[kind] + other[kind])
                    assert list(mesh.gradient_ranks(mirrored(mesh), expert=is_expert)) == joined, where
            if pipeline > 1 and mesh.pipeline_rank in (0, pipeline - 1):
                ends = mesh.gradient_ranks((0, pipeline - 1), expert=False)
                assert [r for r in ends if Mesh(config, r).data_rank == mesh.data_rank] == theirs["embedding"], where


def test_the_comparison_sees_another_order() -> None:
    """With the data axis outside the pipeline, as in Megatron's order ...-pp-dp, the groups would be others."""
    mesh = Mesh(ParallelConfig(pipeline=2, data=4, expert=2), 1)
    assert mesh.pipeline_ranks() == (1, 5) and mesh.gradient_ranks((0,), expert=True) == (1, 3)
    assert mesh.pipeline_ranks() != (0, 1)
