from dataclasses import fields, replace

import pytest

from model.fp8.config import FP8Config
from parallel.pipeline.simulate_phases import simulate_phases
from parallel.plan import recipe
from parallel.plan.advice import assumptions, bound_by, candidates, changes
from parallel.plan.feasible import memory_problems
from parallel.plan.kernels import LINK_SHARE
from parallel.plan.memory import holdings
from parallel.plan.recipe import hours
from parallel.plan.step import estimate, plan
from tests.parallel.plan.jobs import ENGINE, small, v3


def test_the_parts_add_up_to_the_step():
    found = plan(small())
    rows = found.split.rows()
    assert sum(rows.values()) == pytest.approx(found.step_seconds)
    pipeline = found.step_seconds - rows["optimizer"] - rows["exposed_communication"]
    assert pipeline == pytest.approx(found.timeline.makespan)


def test_bare_chunks_take_longer_than_overlapped_ones():
    job = small().with_parallel(schedule="dualpipe", overlap="all")
    assert plan(replace(job, bare=True)).step_seconds > plan(replace(job, bare=False)).step_seconds


def test_all_to_all_in_series_equals_the_sum_of_the_phases():
    """One rank without pairs: the pipeline takes what its phases take, one after the other."""
    job = replace(small(), bare=True).with_parallel(pipeline=1, overlap="off")
    found = plan(job)
    chain = found.costs.alone[0]
    one = chain.end.forward + chain.end.grad + chain.end.weights
    one += sum(getattr(link, field.name) for link in chain.links for field in fields(link))
    assert found.timeline.makespan == pytest.approx(job.num_microbatches * one)


def test_mfu_is_flops_over_peak():
    found = plan(small())
    per_second = found.tokens_per_second_per_gpu * found.flops_per_token.causal
    assert found.mfu_causal == pytest.approx(per_second / 989.4e12)
    assert found.mfu_full > found.mfu_causal


def test_published_run_as_predicted():
    """The step that the README states; published is 19.926 s."""
    found = plan(v3())
    assert found.fits and 16 < found.step_seconds < 21
    assert simulate_phases(found.schedule, found.costs, level="pairs").makespan == found.timeline.makespan


def test_drawing_out_a_long_step_equals_simulating_it():
    job = v3()
    seconds, fits = estimate(job)
    whole = plan(job)
    assert seconds == pytest.approx(whole.step_seconds, rel=0.002) and fits == whole.fits


def test_what_does_not_fit_is_bound_by_memory_and_told_what_would():
    tiny_gpu = replace(small().hardware, memory_bytes=20e9)
    found = plan(small(hardware=tiny_gpu, precision="bf16"))
    assert bound_by(found) == "memory"
    assert all(change.step_seconds > 0 for change in changes(found))


def test_offloaded_masters_take_their_time_over_pcie():
    """Gradients out, weights in, and the update beside them; an average of the weights takes the masters' way out."""
    job = small()
    fast = replace(job.hardware, host_bytes_per_second=1e30)
    here, free = plan(job).split.optimizer, plan(replace(job, offload=True, hardware=fast)).split.optimizer
    there, average = (plan(replace(job, **{key: True})).split.optimizer for key in ("offload", "ema"))
    slow = replace(job.hardware, host_bytes_per_second=job.hardware.host_bytes_per_second / 2)
    slower = plan(replace(job, offload=True, hardware=slow)).split.optimizer
    assert free < here < average < there and slower - free == pytest.approx(2 * (there - free))
    held = max(sum(h.parameters / h.group for h in rank) for rank in holdings_of(job))
    assert average - here == pytest.approx(4 * held / (LINK_SHARE * job.hardware.host_bytes_per_second), rel=0.05)


def holdings_of(job):
    schedule = job.schedule()
    return holdings(job.model, job.parallel, schedule, job.stages(schedule))


def test_offload_is_advised_where_it_makes_a_run_fit():
    job = small(to_offload="optim.offload=true optim.adamw=torch_fused")
    full = plan(job).memory[plan(job).fullest_rank]
    tight = replace(job, hardware=replace(job.hardware, memory_bytes=full.total - full.moments))
    words = [change.what for change in changes(plan(tight), most=9)]
    assert "optim.offload=true optim.adamw=torch_fused" in words
    assert any("use optim.offload=true" in line for line in memory_problems(tight))
    assert not any("offload" in change.what for change in changes(plan(job), most=9))
    assert not any("offload" in what for what, _ in candidates(replace(tight, offload=True), fits=False))


ORACLE = FP8Config()
ON_GPUS = (
    "train.precision=fp8 fp8.backend=transformer_engine fp8.input_cache=wide fp8.attention_cache=wide "
    "fp8.recompute_swiglu=false"
)


def test_fp8_is_advised_with_all_that_it_needs_on_a_gpu():
    """The defaults of the section fp8 are an emulation, which no tensor core speeds up."""
    changed = dict(candidates(small(precision="bf16", fp8=ORACLE), fits=True))
    assert changed[ON_GPUS].fp8 == ENGINE and changed[ON_GPUS].precision == "fp8"
    assert "train.precision=fp8" in dict(candidates(small(precision="bf16"), fits=True))
    odd = small(precision="bf16", fp8=ORACLE, model=replace(small().model, moe_intermediate_size=2040))
    assert not any("fp8.backend" in what for what, _ in candidates(odd, fits=True))


def test_an_emulation_priced_as_fp8_is_told():
    assert assumptions(small()) == assumptions(small(precision="bf16", fp8=ORACLE)) == []
    (said,) = assumptions(small(fp8=ORACLE))
    assert "fp8.backend=oracle_fast is an emulation" in said and ON_GPUS.split(maxsplit=1)[1] in said
    (said,) = assumptions(small(fp8=ORACLE, model=replace(small().model, moe_intermediate_size=2040)))
    assert "which they cannot" in said and "7168 x 2040" in said


def test_three_changes_that_help_and_each_does():
    found = plan(v3())
    best = changes(found)
    assert len(best) == 3 and best == sorted(best, key=lambda c: -c.saved_seconds)
    assert all(0 < c.step_seconds < found.step_seconds for c in best)


def test_a_slower_network_makes_it_bound_by_the_all_to_all():
    slow = replace(small().hardware, ib_bytes_per_second=5e9, nvlink_bytes_per_second=5e9, memory_bytes=1e12)
    assert bound_by(plan(small(hardware=slow))) == "all_to_all"


def test_hours_of_a_constant_batch():
    job = small(tokens=1e10)
    found, cost = plan(job), hours(plan(job), price_per_hour=3.0)
    expected = 1e10 / job.tokens_per_step * found.step_seconds * job.num_gpus / 3600
    assert cost.total == pytest.approx(expected) and cost.dollars == pytest.approx(3 * expected)
    assert cost.ramp == 0 and cost.extensions == () and cost.assumed == ()


def test_what_the_hours_put_in_is_told(monkeypatch):
    """By the run's size alone the report's growing batch and its longer contexts are counted."""
    job = small(tokens=1e12, global_batch_size=3200).with_parallel(data=128)
    found = plan(job)
    cost = hours(found)
    grows, *longer = cost.assumed
    assert "growing batch, 3,072 to 3,200 sequences" in grows and len(longer) == len(cost.extensions) == 2
    assert "extension to 32K, 1,000 steps of 1,920 sequences, each cut over" in longer[0]
    own = hours(plan(replace(job, ramp=((1600, 1e10),))))
    assert own.ramp > 0 and own.assumed == cost.assumed[1:]
    monkeypatch.setattr(recipe, "EXTENSIONS", ((8192, 256, 10),))
    less = replace(job, hardware=replace(job.hardware, memory_bytes=1e9))
    assert hours(plan(less)).assumed[1].endswith("no cut of them fits the GPUs")
