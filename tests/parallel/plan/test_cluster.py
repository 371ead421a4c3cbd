"""All ranks of a run held against one another: what is planted is found, and named by the rank that has it."""

from dataclasses import replace
from datetime import timedelta
from unittest.mock import patch

import pytest

from parallel.apply import Layout
from parallel.expert import hops
from parallel.mesh import Groups, Mesh
from parallel.plan.cluster import Bucket, Cluster, Transfer, simulate_cluster, summary
from parallel.plan.cluster_faults import MOST_FAULTS, faults
from parallel.plan.memory import holdings
from tests.parallel.plan.jobs import small

# First rank of all, one inside an expert group, first of a later group, of a later pipeline rank, the last rank.
RANKS = (0, 9, 24, 32, 37, 63)


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """4 x 16 ranks, experts over 8 of them on two nodes of 4."""
    job = small(global_batch_size=16 * 8)
    return simulate_cluster(job.with_parallel(pipeline=4, data=16, schedule="dualpipe", ranks_per_node=4))


def planted(cluster: Cluster, rank: int, **changes) -> Cluster:
    records = list(cluster.records)
    records[rank] = replace(records[rank], **changes)
    return replace(cluster, records=tuple(records))


def named(rank: int) -> str:
    return f"rank {rank} (pipeline {rank // 16}, data {rank % 16})"


def the_line(found: list[str], rank: int) -> str:
    """The only line, which begins with the rank that errs."""
    assert len(found) == 1 and found[0].removeprefix("deadlock: ").startswith(named(rank)), found
    return found[0]


def test_a_sound_cluster_has_no_faults(cluster):
    assert faults(cluster) == []
    found = summary(cluster)
    assert found["ranks"] == 64 and found["messages"] > 0 and found["transfers"] > 0
    # of each of 8 expert groups: 4 rails and 2 nodes, for dispatch and for combine
    assert found["dispatcher_groups"] == 8 * (4 + 2) * 2
    # two stages each, and the counts before a first dispatch
    assert found["transfer_collectives"] == found["transfers"] * 2.25


@pytest.mark.parametrize("rank", RANKS)
def test_the_constructor_creates_the_groups_of_the_records(cluster, rank):
    """`Groups` on any rank calls new_group for these ranks in this order."""
    created = []

    def record(ranks: list[int], **_: object) -> object:
        created.append(tuple(ranks))
        return len(created)

    layout = Layout(cluster.schedule, cluster.stages, cluster.job.model.num_nextn_predict_layers > 0)
    mesh = Mesh(cluster.job.parallel, rank)
    with patch("parallel.mesh.dist.new_group", record):
        groups = Groups(mesh, layout.holder_sets(), timeout=timedelta(seconds=1))
    assert tuple(created) == cluster.records[rank].groups
    of = {number: ranks for number, ranks in enumerate(created, 1)}
    assert of[groups.world] == tuple(range(64)) and of[groups.expert] == mesh.expert_ranks()  # type: ignore[index]
    assert of[groups.down] == of[groups.up] == mesh.pipeline_ranks() and groups.down != groups.up  # type: ignore[index]
    for holders in layout.holder_sets():
        if mesh.pipeline_rank in holders:
            for expert in (False, True):
                made = groups.gradient(holders, expert=expert)
                assert of[made] == mesh.gradient_ranks(holders, expert=expert)  # type: ignore[index]


@pytest.mark.parametrize(("dispatcher", "groups"), [("flat", 0), ("native", 0), ("deepep", 0)])
def test_other_dispatchers_have_no_groups_of_their_own(dispatcher, groups):
    job = small(global_batch_size=16 * 8).with_parallel(dispatcher=dispatcher)
    cluster = simulate_cluster(job)
    found = summary(cluster)
    assert faults(cluster) == [] and found["dispatcher_groups"] == groups
    assert found["transfer_collectives"] == (found["transfers"] if dispatcher == "flat" else 0)


def test_modules_hold_what_the_memory_model_counts(cluster):
    held = holdings(cluster.job.model, cluster.job.parallel, cluster.schedule, cluster.stages)
    for rank, record in enumerate(cluster.records):
        at = Mesh(cluster.job.parallel, rank).pipeline_rank
        assert record.parameters == sum(h.parameters for h in held[at])


# --- planted, on ranks that others are held against too ----------------------------------------------------------


@pytest.mark.parametrize(("ways", "said"), [("receives", "as receive 0"), ("sends", "as message 0")])
@pytest.mark.parametrize("rank", RANKS)
def test_swapped_messages_are_named(cluster, rank, ways, said):
    messages = dict(getattr(cluster.records[rank], ways))
    key = next(iter(messages))
    first, second, *rest = messages[key]
    found = faults(planted(cluster, rank, **{ways: {**messages, key: (second, first, *rest)}}))
    assert said in the_line(found, rank)


def test_a_lost_receive_is_named(cluster):
    receives = dict(cluster.records[37].receives)
    key = next(iter(receives))
    found = faults(planted(cluster, 37, receives={**receives, key: receives[key][:-1]}))
    assert f"posts nothing as receive {len(receives[key]) - 1} from rank" in the_line(found, 37)


@pytest.mark.parametrize("rank", RANKS)
def test_another_order_of_groups_is_named(cluster, rank):
    groups = cluster.records[rank].groups
    found = faults(planted(cluster, rank, groups=(groups[1], groups[0], *groups[2:])))
    assert "as group 0" in the_line(found, rank)


@pytest.mark.parametrize("rank", RANKS)
def test_another_order_of_the_dispatchers_groups_is_named(cluster, rank):
    rail, node, *rest = cluster.records[rank].hops
    assert len(rail.ranks) == 2 and len(node.ranks) == 4
    found = faults(planted(cluster, rank, hops=(node, rail, *rest)))
    assert "of its dispatcher" in the_line(found, rank)


@pytest.mark.parametrize("rank", RANKS)
def test_a_group_of_other_ranks_is_named(cluster, rank):
    rail, node, *rest = cluster.records[rank].hops
    strangers = tuple((member + 8) % 64 for member in node.ranks)
    found = faults(planted(cluster, rank, hops=(rail, node._replace(ranks=strangers), *rest)))
    assert "as group 1 of its dispatcher" in the_line(found, rank)


def test_one_stage_too_few_is_named(cluster):
    found = faults(replace(cluster, stages=cluster.stages[:-1]))
    assert "4 stages, the layers are split over 3" in found[0] and "no stage holds layer" in found[1]


def test_swapped_actions_deadlock_or_unmatch(cluster):
    steps = cluster.records[20].steps
    found = faults(planted(cluster, 20, steps=(steps[-1], *steps[1:-1], steps[0])))
    assert any("deadlock: rank" in line for line in found)


@pytest.mark.parametrize("rank", RANKS)
def test_another_order_of_transfers_is_named(cluster, rank):
    one, two, *rest = cluster.records[rank].transfers
    found = faults(planted(cluster, rank, transfers=(two, one, *rest)))
    assert "transfer 0 of its expert group" in the_line(found, rank)


@pytest.mark.parametrize("rank", RANKS)
def test_another_order_of_a_transfers_stages_is_named(cluster, rank):
    one, *rest = cluster.records[rank].transfers
    assert one.hops == hops.stages("collective", "dispatch") and len(one.hops) == 3
    turned = Transfer(one.action, one.phase, one.hops[::-1])
    found = faults(planted(cluster, rank, transfers=(turned, *rest)))
    assert "over dispatch node and dispatch rail and all ranks" in the_line(found, rank)


def test_two_ranks_of_two_minds_are_settled_by_the_others():
    """An expert group of two has no majority, its place in the pipeline does."""
    cluster = simulate_cluster(small().with_parallel(expert=2))
    for rank in (0, 1, 30, 31):
        one, two, *rest = cluster.records[rank].transfers
        assert "transfer 0" in the_line(faults(planted(cluster, rank, transfers=(two, one, *rest))), rank)


@pytest.mark.parametrize("rank", RANKS)
def test_another_bucket_is_named(cluster, rank):
    one, *rest = cluster.records[rank].buckets
    (line, size) = faults(planted(cluster, rank, buckets=(Bucket(one.ranks, 1), *rest)))
    assert line.startswith(f"{named(rank)} reduces 1 elements in [") and size.startswith(named(rank))


@pytest.mark.parametrize("rank", RANKS)
def test_buckets_of_two_groups_in_another_order_are_named(cluster, rank):
    buckets = list(cluster.records[rank].buckets)
    other = next(i for i, bucket in enumerate(buckets) if bucket.ranks != buckets[0].ranks)
    buckets[0], buckets[other] = buckets[other], buckets[0]
    assert "as bucket 0 of gradients" in the_line(faults(planted(cluster, rank, buckets=tuple(buckets))), rank)


def test_an_order_that_all_of_a_place_share_is_a_deadlock(cluster):
    """Both stages of pipeline rank 0 are on rank 3 too, which reduces them the other way round."""
    records = list(cluster.records)
    for rank in range(16):
        buckets = list(records[rank].buckets)
        other = next(i for i, bucket in enumerate(buckets) if bucket.ranks != buckets[0].ranks)
        buckets[0], buckets[other] = buckets[other], buckets[0]
        records[rank] = replace(records[rank], buckets=tuple(buckets))
    (line,) = faults(replace(cluster, records=tuple(records)))
    assert line.startswith("deadlock: rank") and "of gradients and waits for rank" in line


def test_a_list_that_is_cut_says_so(cluster):
    records = [replace(record, parameters=1) for record in cluster.records]
    found = faults(replace(cluster, records=tuple(records)))
    assert len(found) == MOST_FAULTS + 1 and found[-1] == f"and {64 - MOST_FAULTS} more"
