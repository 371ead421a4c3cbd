from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.config import ParallelConfig
from parallel.expert.placement import Placement, PlacementError
from parallel.mesh import Mesh

V3 = Placement(num_experts=256, num_ranks=64, ranks_per_node=8)


def build(per_rank: int, ranks_per_node: int, nodes: int) -> Placement:
    return Placement(per_rank * ranks_per_node * nodes, ranks_per_node * nodes, ranks_per_node)


placements = st.builds(build, st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


def test_the_published_layout() -> None:
    assert (V3.num_nodes, V3.experts_per_rank, V3.experts_per_node) == (8, 4, 32)
    assert [V3.node_of(expert) for expert in (0, 31, 32, 255)] == [0, 0, 1, 7]
    assert all(V3.group_nodes(group, n_group=8) == range(group, group + 1) for group in range(8))
    assert V3.max_nodes(n_group=8, topk_group=4, top_k=8) == 4
    V3.require_node_limit(n_group=8, topk_group=4)
    assert V3.rail_rank(rank=13, node=6) == 6 * 8 + 5


@given(placements)
def test_ranks_hold_every_expert_once_and_agree_with_the_mesh(placement: Placement) -> None:
    config = ParallelConfig(data=placement.num_ranks, expert=placement.num_ranks)
    held = [e for rank in range(placement.num_ranks) for e in placement.experts_of(rank)]
    assert held == list(range(placement.num_experts))
    for rank in range(placement.num_ranks):
        assert placement.experts_of(rank) == Mesh(config, rank).expert_ids(placement.num_experts)
        for expert in placement.experts_of(rank):
            assert placement.rank_of(expert) == rank
            assert placement.node_of(expert) == placement.node_of_rank(rank) == rank // placement.ranks_per_node
        home = placement.node_of_rank(rank)
        assert placement.rail_rank(rank=rank, node=home) == rank


@given(placements, st.data())
def test_max_nodes_is_the_worst_choice_of_groups(placement: Placement, data: st.DataObject) -> None:
    divisors = [n for n in range(1, placement.num_experts + 1) if placement.num_experts % n == 0]
    n_group = data.draw(st.sampled_from(divisors))
    topk_group = data.draw(st.integers(1, n_group))
    if comb(n_group, topk_group) > 5000:
        return
    size = placement.num_experts // n_group
    nodes = [{placement.node_of(e) for e in range(g * size, (g + 1) * size)} for g in range(n_group)]
    worst = max(len(set().union(*chosen)) for chosen in combinations(nodes, topk_group))
    assert placement.max_nodes(n_group=n_group, topk_group=topk_group, top_k=10**6) == worst
    assert placement.max_nodes(n_group=n_group, topk_group=topk_group, top_k=2) == min(2, worst)
    if all(len(found) == 1 for found in nodes):
        placement.require_node_limit(n_group=n_group, topk_group=topk_group)
        assert worst <= topk_group
    else:
        with pytest.raises(PlacementError, match="lies across nodes"):
            placement.require_node_limit(n_group=n_group, topk_group=topk_group)


def test_what_would_fit_does_fit() -> None:
    with pytest.raises(PlacementError) as caught:
        Placement(256, 32, 8).require_node_limit(n_group=2, topk_group=1)
    message = str(caught.value)
    assert "group 0 lies across nodes 0 to 1 of 4" in message
    assert "use n_group 4, or 32 ranks on 2 nodes" in message
    Placement(256, 32, 8).require_node_limit(n_group=4, topk_group=1)
    Placement(256, 32, 16).require_node_limit(n_group=2, topk_group=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((256, 48, 8), "num_ranks=48 does not divide num_experts=256: use 32 or 64 ranks"),
        ((256, 64, 7), "ranks_per_node=7 does not divide num_ranks=64: use 4 or 8 ranks a node"),
        ((256, 0, 8), "num_ranks=0 must be at least 1"),
    ],
)
def test_bad_sizes_name_what_fits(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        Placement(*arguments)


def test_bad_numbers_name_the_range() -> None:
    with pytest.raises(PlacementError, match="expert 256 does not exist: experts go from 0 to 255"):
        V3.rank_of(256)
    with pytest.raises(PlacementError, match="rank -1 does not exist"):
        V3.experts_of(-1)
    with pytest.raises(PlacementError, match="n_group=5 does not divide num_experts=256: use 4 or 8 groups"):
        V3.max_nodes(n_group=5, topk_group=1, top_k=8)
    with pytest.raises(PlacementError, match="topk_group=9 must be from 1 to n_group=8"):
        V3.require_node_limit(n_group=8, topk_group=9)
