from dataclasses import replace

import pytest

from model.fp8.config import FP8Config
from parallel.plan.search import Rejections, _fitting, layouts, on_gpus, search, weigh
from parallel.plan.step import estimate, plan
from tests.parallel.plan.jobs import ENGINE, small


@pytest.fixture(scope="module")
def found():
    return search(small(hardware=replace(small().hardware, memory_bytes=115e9)), simulated=4)


def test_the_fastest_that_fits_comes_first(found):
    timed = [c for c in found.candidates if c.step_seconds is not None]
    assert len(timed) == 4 and [c.step_seconds for c in timed] == sorted(c.step_seconds for c in timed)
    assert "memory" in found.rejections.number and not any(c.is_own for c in found.candidates)  # it does not fit
    for candidate in timed:
        whole = plan(candidate.job)
        assert whole.fits and whole.step_seconds == pytest.approx(candidate.step_seconds, rel=0.02)


def test_every_layout_is_a_candidate_or_counted_as_none(found):
    assert len(found.candidates) + sum(found.rejections.number.values()) == found.looked_at
    assert {"memory", "more stages than layers"} <= set(found.rejections.number)
    assert all(found.rejections.example[kind] for kind in found.rejections.number)


def test_axes_multiply_to_the_gpus():
    job = small()
    found = list(layouts(job, ("fp8", "bf16")))
    assert all(layout.num_gpus == job.num_gpus for layout in found)
    assert {layout.precision for layout in found} == {"fp8", "bf16"}


def test_too_small_a_cluster_gets_the_smallest_that_can():
    job = small(hardware=replace(small().hardware, memory_bytes=40e9)).with_parallel(data=4, pipeline=2, expert=4)
    none = search(job, precisions=("fp8",), simulated=1)
    assert none.candidates == () and none.smallest_gpus is not None
    node = job.hardware.gpus_per_node
    assert none.smallest_gpus > job.num_gpus and none.smallest_gpus % node == 0
    for gpus in (none.smallest_gpus - node, none.smallest_gpus):
        larger = replace(on_gpus(job, gpus), global_batch_size=max(job.global_batch_size, gpus))
        assert bool(next(_fitting(larger, Rejections(), ("fp8",)), None)) == (gpus == none.smallest_gpus), gpus


def test_precisions_that_are_not_asked_for_are_not_looked_at():
    job = small(hardware=replace(small().hardware, memory_bytes=115e9))
    both, one = search(job, simulated=0), search(job, precisions=("bf16",), simulated=0)
    assert {c.job.precision for c in both.candidates} == {"fp8", "bf16"}
    assert {c.job.precision for c in one.candidates} == {"bf16"} and 2 * one.looked_at + 1 == both.looked_at
    assert "train.precision=bf16" in one.candidates[0].words()


def test_fp8_that_would_be_emulated_is_searched_for_as_gpus_run_it():
    job = small(hardware=replace(small().hardware, memory_bytes=115e9), precision="bf16", fp8=FP8Config())
    best = search(job, precisions=("fp8",), simulated=0).candidates[0]
    assert best.job.fp8 == ENGINE
    assert best.words().endswith("fp8.input_cache=wide fp8.attention_cache=wide fp8.recompute_swiglu=false")
    odd = replace(job, model=replace(job.model, moe_intermediate_size=2040))
    assert "no FP8 on tensor cores" in search(odd, simulated=0).rejections.number


def test_the_own_layout_is_looked_at_once():
    """Whatever its split, schedule or recomputation; where the search comes to the same layout it is not told twice."""
    roomy = small(hardware=replace(small().hardware, memory_bytes=400e9))
    for changes in (
        {"recompute": "none"}, {"layers_per_stage": (3, 5)}, {"schedule": "interleaved", "stages_per_rank": 4},
        {"schedule": "gpipe"},
    ):  # fmt: skip
        job = roomy.with_parallel(**{"recompute": "none", **changes})
        found = search(job, precisions=("fp8",), simulated=0)
        (own,) = (c for c in found.candidates if c.is_own)
        assert own.job == job and own.step_seconds == estimate(job)[0]
        assert len(found.candidates) + sum(found.rejections.number.values()) == found.looked_at
        others = [c for c in found.candidates if not c.is_own]
        given = {key for key in ("layers_per_stage", "stages_per_rank") if key in changes}
        assert all(f"parallel.{key}=null" in c.words() for c in others for key in given)
        assert "null" not in own.words()
    assert not any(c.is_own for c in search(roomy, precisions=("fp8",), simulated=0, gpus=64).candidates)
    tight = search(small(hardware=replace(roomy.hardware, memory_bytes=55e9)), precisions=("fp8",), simulated=0)
    assert len(tight.candidates) + sum(tight.rejections.number.values()) == tight.looked_at


def test_weighing_follows_the_simulation():
    """Within a fifth, which is what choosing the ones to simulate needs."""
    for name in ("1f1b", "zbv", "dualpipev", "dualpipe"):
        job = small().with_parallel(schedule=name)
        schedule = job.short_schedule()
        assert weigh(job, schedule, job.stages(schedule)) == pytest.approx(plan(job).step_seconds, rel=0.2)
