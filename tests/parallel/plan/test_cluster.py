from dataclasses import replace

import pytest

from parallel.mesh import Mesh
from parallel.plan.cluster import faults, simulate_cluster, summary
from parallel.plan.memory import holdings
from tests.parallel.plan.jobs import small


@pytest.fixture(scope="module")
def cluster():
    job = small(global_batch_size=16 * 8)
    return simulate_cluster(job.with_parallel(pipeline=4, data=16, schedule="dualpipe"))


def planted(cluster, rank, **changes):
    records = list(cluster.records)
    records[rank] = replace(records[rank], **changes)
    return replace(cluster, records=tuple(records))


def test_a_sound_cluster_has_no_faults(cluster):
    assert faults(cluster) == []
    found = summary(cluster)
    assert found["ranks"] == 64 and found["messages"] > 0 and found["transfers"] > 0


def test_modules_hold_what_the_memory_model_counts(cluster):
    held = holdings(cluster.job.model, cluster.job.parallel, cluster.schedule, cluster.stages)
    for rank, record in enumerate(cluster.records):
        at = Mesh(cluster.job.parallel, rank).pipeline_rank
        assert record.parameters == sum(h.parameters for h in held[at])


def test_a_swapped_receive_is_named(cluster):
    receives = dict(cluster.records[37].receives)
    key = next(iter(receives))
    first, second, *rest = receives[key]
    found = faults(planted(cluster, 37, receives={**receives, key: (second, first, *rest)}))
    assert any("rank 37 (pipeline 2, data 5)" in line and "as receive 0" in line for line in found)


def test_a_lost_receive_is_named(cluster):
    receives = dict(cluster.records[37].receives)
    key = next(iter(receives))
    found = faults(planted(cluster, 37, receives={**receives, key: receives[key][:-1]}))
    assert any("rank 37" in line and "receives from rank" in line for line in found)


def test_another_order_of_groups_is_named(cluster):
    groups = cluster.records[9].groups
    found = faults(planted(cluster, 9, groups=(groups[1], groups[0], *groups[2:])))
    assert len(found) == 1 and "rank 9 (pipeline 0, data 9)" in found[0] and "as group 0" in found[0]


def test_one_stage_too_few_is_named(cluster):
    found = faults(replace(cluster, stages=cluster.stages[:-1]))
    assert "4 stages, the layers are split over 3" in found[0] and "no stage holds layer" in found[1]


def test_swapped_actions_deadlock_or_unmatch(cluster):
    steps = cluster.records[20].steps
    found = faults(planted(cluster, 20, steps=(steps[-1], *steps[1:-1], steps[0])))
    assert any("deadlock: rank" in line for line in found)


def test_another_order_of_transfers_is_named(cluster):
    one, two, *rest = cluster.records[12].transfers
    found = faults(planted(cluster, 12, transfers=(two, one, *rest)))
    assert len(found) == 1 and "rank 12" in found[0] and "transfer 0 of its expert group, rank 8" in found[0]


def test_another_bucket_is_named(cluster):
    buckets = cluster.records[3].buckets
    found = faults(planted(cluster, 3, buckets=(replace(buckets[0], elements=1), *buckets[1:])))
    assert any("rank 3" in line and "buckets" in line for line in found)
