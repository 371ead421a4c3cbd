from dataclasses import replace

import pytest

from parallel.plan.search import layouts, search, short_schedule, weigh
from parallel.plan.step import plan
from tests.parallel.plan.jobs import small


@pytest.fixture(scope="module")
def found():
    return search(small(hardware=replace(small().hardware, memory_bytes=120e9)), simulated=4)


def test_the_fastest_that_fits_comes_first(found):
    timed = [c for c in found.candidates if c.step_seconds is not None]
    assert len(timed) == 4 and [c.step_seconds for c in timed] == sorted(c.step_seconds for c in timed)
    for candidate in timed:
        whole = plan(candidate.job)
        assert whole.fits and whole.step_seconds == pytest.approx(candidate.step_seconds, rel=0.02)


def test_every_layout_is_a_candidate_or_counted_as_none(found):
    assert len(found.candidates) + sum(found.rejections.number.values()) == found.looked_at
    assert {"memory", "more stages than layers"} <= set(found.rejections.number)
    assert all(found.rejections.example[kind] for kind in found.rejections.number)


def test_axes_multiply_to_the_gpus():
    job = small()
    assert all(layout.num_gpus == job.num_gpus for layout in layouts(job))


def test_too_small_a_cluster_gets_the_smallest_that_can():
    job = small(hardware=replace(small().hardware, memory_bytes=40e9)).with_parallel(data=4, pipeline=2, expert=4)
    none = search(job, simulated=1)
    assert none.candidates == () and none.smallest_gpus is not None
    assert none.smallest_gpus > job.num_gpus


def test_weighing_follows_the_simulation():
    """Within a fifth, which is what choosing the ones to simulate needs."""
    for name in ("1f1b", "zbv", "dualpipev", "dualpipe"):
        job = small().with_parallel(schedule=name)
        schedule = short_schedule(job)
        assert weigh(job, schedule, job.stages(schedule)) == pytest.approx(plan(job).step_seconds, rel=0.2)
