import math
from dataclasses import replace

import pytest

from model.counts import counts
from parallel.plan.live import KINDS, Stage
from parallel.plan.memory import MARGIN, held_by, holdings, memory_of, of_job, setting_of, stages_of
from parallel.plan.swing import Acting, swing_of
from tests.parallel.plan.jobs import small, v3


def parts(job):
    schedule = job.schedule()
    stages = job.stages(schedule)
    return schedule, stages


@pytest.mark.parametrize("job", [v3(), small()], ids=["v3", "small"])
def test_holdings_add_up_to_the_model(job):
    """Every weight once, times its holders, times the expert positions."""
    schedule, stages = parts(job)
    held = holdings(job.model, job.parallel, schedule, stages)
    data, expert = job.parallel.data, job.parallel.expert
    total = sum(
        h.parameters * data / h.group  # `data` ranks hold it, `group` hold the same
        for rank in held
        for h in rank
    )
    numbers = counts(job.model)
    biases = job.model.n_routed_experts * job.model.num_nextn_predict_layers
    assert total == pytest.approx(numbers.main + numbers.mtp - biases)
    groups = {h.group for rank in held for h in rank if h.expert}
    assert groups == {data * schedule_copies(schedule) // expert}


def schedule_copies(schedule):
    return len(schedule.holders(1))


def test_embedding_is_on_both_ends_with_mtp():
    stages = (range(0, 30), range(30, 61))
    assert stages_of("embed_tokens.weight", stages, has_mtp=True) == (0, 1)
    assert stages_of("embed_tokens.weight", stages, has_mtp=False) == (0,)
    assert stages_of("layers.30.norm.weight", stages, has_mtp=True) == (1,)
    assert stages_of("mtp.0.norm.weight", stages, has_mtp=True) == (1,)


@pytest.mark.parametrize(("primary", "wide", "each"), [("fp8", 0, 2), ("bf16", 2, 2)])
def test_kinds_of_the_published_run(primary, wide, each):
    """Transformer Engine reads a weight and its transpose, a byte each: alone, or made of BF16."""
    job = v3()
    job = replace(job, fp8=replace(job.fp8, primary_weights=primary))
    schedule, stages = parts(job)
    ranks = memory_of(job.shape(), job.parallel, schedule, stages, precision="fp8", fp8=job.fp8)
    middle, held = ranks[5], held_by(job, schedule, stages)[5]
    number = sum(h.parameters for h in held)
    rounded = sum(h.rounded for h in held)
    expected = 2 * (number - rounded) + (wide + each) * rounded
    assert middle.weights == pytest.approx(expected, rel=1e-5) and 0.97 < rounded / number < 1
    assert middle.gradients == pytest.approx(4 * number + 4 * sum(h.parameters / h.group for h in held), rel=1e-6)
    assert middle.masters == pytest.approx(4 * sum(h.parameters / h.group for h in held), rel=1e-6)
    assert middle.moments == pytest.approx(middle.masters)
    assert max(rank.total for rank in ranks) < job.hardware.memory_bytes


def test_activations_follow_the_schedule():
    """GPipe holds all micro-batches, 1F1B as many as ranks ahead; at its peak a layer's weight gradients wait too."""
    found = {}
    for name in ("gpipe", "1f1b"):
        job = small().with_parallel(schedule=name)
        schedule, stages = parts(job)
        ranks = memory_of(job.shape(), job.parallel, schedule, stages, precision="fp8")
        found[name] = ranks[0].activations
    assert found["gpipe"] / found["1f1b"] == pytest.approx(small().num_microbatches / 2, rel=0.04)


def swings(setting, layers):
    stage = Stage(setting, layers)
    return {kind: swing_of((Acting(kind, stage),)) for kind in "FIBW"}


@pytest.mark.parametrize("layers", [range(0, 3), range(3, 8)], ids=["first", "last"])
@pytest.mark.parametrize("recompute", ["none", "attend", "layer", "report"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("expert", [1, 8])
def test_what_a_chunk_allocates_it_frees(layers, recompute, precision, expert):
    """F then B, and F then I then W, come back to where they began, kind by kind; nothing is freed twice."""
    job = small(precision=precision).with_parallel(recompute=recompute, expert=expert)
    found = swings(setting_of(job.shape(), job.parallel, precision=precision, fp8=job.fp8), layers)
    for actions in ("FB", "FIW"):
        for kind in KINDS:
            assert sum(found[a].after[kind] for a in actions) == pytest.approx(0, abs=1), (actions, kind)
    assert found["F"].after["kept"] > 0 and found["I"].after["put_off"] > 0
    assert all(found[a].height >= sum(found[a].after.values()) for a in "FIB")


def test_recomputing_more_keeps_less():
    kept = []
    for level in ("none", "attend", "layer"):
        job = small(precision="bf16").with_parallel(recompute=level)
        setting = setting_of(job.shape(), job.parallel, precision="bf16", fp8=job.fp8)
        kept.append(swings(setting, range(0, 3))["F"].after["kept"])
    assert kept == sorted(kept, reverse=True) and kept[2] < 0.5 * kept[0]


def test_offload_moves_masters_and_moments_to_the_host():
    job = small()
    schedule, stages = parts(job)
    here, there, average = (of_job(replace(job, **changes), schedule, stages)[0]
                            for changes in ({}, {"offload": True}, {"ema": True}))  # fmt: skip
    assert (there.masters, there.moments) == (0, 0) and here.host.total == 0
    assert (there.host.masters, there.host.moments) == (here.masters, here.moments)
    assert there.host.gradients == here.masters  # reduced, FP32
    assert here.total - there.total == pytest.approx((1 + MARGIN) * (here.masters + here.moments))
    assert average.total == here.total and average.host.rows()["ema"] == average.host.total == 2 * here.masters


def test_masters_of_an_fp32_run_are_its_weights_until_they_are_offloaded():
    job = small(precision="fp32")
    schedule, stages = parts(job)
    here, there = (of_job(replace(job, offload=offload), schedule, stages)[0] for offload in (False, True))
    assert here.masters == 0 and there.host.masters > 0 and there.weights == here.weights


def test_a_short_schedule_peaks_as_the_whole_one():
    for name in ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev", "dualpipe"):
        job = small().with_parallel(schedule=name)
        peaks = [
            [rank.total for rank in of_job(job, schedule, job.stages(schedule))]
            for schedule in (job.schedule(), job.short_schedule())
        ]
        assert peaks[1] == pytest.approx(peaks[0], rel=1e-4), name


def test_zero1_shards_shrink_with_the_group():
    one, two = small(), small(global_batch_size=256).with_parallel(data=32)
    masters = []
    for job in (one, two):
        schedule, stages = parts(job)
        masters.append(memory_of(job.shape(), job.parallel, schedule, stages, precision="bf16")[0].masters)
    assert math.isclose(masters[0], 2 * masters[1], rel_tol=1e-4)
