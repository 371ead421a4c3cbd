"""`parallel.schedule=auto` becomes a schedule once, the same for everybody, and says why."""

from dataclasses import replace

import pytest

from launcher.check.run import checked
from launcher.config import ConfigError, RunConfig, compose
from launcher.schedule_choice import choice, costs_of, level_of, memory_of, on_cluster, phase_costs_of, resolved
from model.counts import counts
from parallel.pipeline.actions import Action, Schedule
from parallel.pipeline.auto import Phases
from parallel.pipeline.overlap import plan
from parallel.pipeline.phase_costs import PhaseCosts, time_of
from parallel.pipeline.schedules import SCHEDULES, build
from parallel.pipeline.simulate import peak_bytes
from parallel.plan.hardware import HardwareError

AUTO = ["experiment=tiny", "train.device=cpu", "parallel.schedule=auto"]


def auto(*overrides: str) -> RunConfig:
    return compose([*AUTO, *overrides])


def test_auto_becomes_a_name_before_anything_starts() -> None:
    config = checked(AUTO, with_data=False)
    assert config.parallel.schedule == choice(auto()).best.name
    assert checked(AUTO, with_data=False) == config == resolved(config)
    assert build(config.parallel.schedule, num_ranks=2, num_microbatches=config.num_microbatches)


def test_a_given_schedule_stays() -> None:
    config = compose(["experiment=tiny"])
    assert resolved(config) is config


def test_the_interleaved_choice_keeps_its_stages() -> None:
    """Forced by layers for six stages on two ranks."""
    config = resolved(auto("parallel.layers_per_stage=[1,1,1,1,1,1]", "parallel.overlap=off"))
    assert (config.parallel.schedule, config.parallel.stages_per_rank) == ("interleaved", 3)


def test_the_published_layout_takes_dualpipe_and_says_why() -> None:
    config = compose(["experiment=deepseek_v3_2048_h800", "parallel.schedule=auto"])
    found = choice(config)
    assert resolved(config).parallel.schedule == "dualpipe"
    assert "at the price of a second copy of the weights" in found.reason()
    assert all(len(line) <= 80 for line in found.why())
    rivals = {c.name: c for c in found.candidates}
    assert rivals["dualpipev"].uneven is not None and found.best.uneven is not None
    assert rivals["dualpipev"].uneven > 1.5 > found.best.uneven


def test_costs_add_up_to_one_forward_a_rank_whatever_the_stages() -> None:
    config = compose(["experiment=deepseek_v3_2048_h800"])
    for name in SCHEDULES:
        schedule = build(name, num_ranks=16, num_microbatches=32)
        costs = costs_of(config, schedule)
        assert isinstance(costs.forward, tuple) and isinstance(costs.forward_comm, tuple)
        assert sum(costs.forward) == pytest.approx(16)
        assert 0 < sum(costs.forward_comm) < sum(costs.forward)
        assert costs.forward_comm[0] < costs.forward_comm[schedule.num_stages // 2]  # dense layers send nothing


@pytest.mark.parametrize("name", SCHEDULES)
def test_phases_add_up_to_the_costs_of_their_stage(name: str) -> None:
    """One after the other, each stage's F takes its computation and its all-to-all, and B the same with its weights."""
    config = compose(["experiment=deepseek_v3_2048_h800"])
    schedule = build(name, num_ranks=16, num_microbatches=32)
    costs, phases = costs_of(config, schedule), phase_costs_of(config, schedule)
    for kind, whole in _alone(schedule, phases).items():
        action = Action(kind[0], int(kind[1:]), 0)
        assert whole == pytest.approx(costs.compute(action) + costs.communication(action)), kind


def _alone(schedule: Schedule, phases: PhaseCosts) -> dict[str, float]:
    """Seconds of the first F and B of every stage where nothing overlaps."""
    found: dict[str, float] = {}
    for rank in range(schedule.num_ranks):
        for work in plan(schedule, rank, num_links=phases.num_links, level="off"):
            (action,) = work.actions
            if action.kind in "FB":
                found.setdefault(f"{action.kind}{action.stage}", time_of(work.phases, phases, serial=True))
    assert {key for key in found if key[0] == "F"} == {f"F{stage}" for stage in range(schedule.num_stages)}
    return found


def test_on_a_cluster_the_choice_is_in_seconds() -> None:
    config = compose(["experiment=tiny", "parallel.schedule=auto"])
    schedule = build("1f1b", num_ranks=config.parallel.pipeline, num_microbatches=config.num_microbatches)
    phases = Phases(on_cluster(config, "h800"), level_of(config))
    assert phases.costs_of(schedule).num_links(0) > 1
    found = choice(config, phases=phases)
    assert 1e-5 < (found.best.makespan or 0) < 1  # a tiny model on GPUs
    with pytest.raises(HardwareError, match="no such GPU"):
        on_cluster(config, "h900")


def test_without_expert_parallelism_nothing_travels() -> None:
    config = auto("parallel.expert=1")
    phases = phase_costs_of(config, build("1f1b", num_ranks=2, num_microbatches=8))
    assert phases.num_links(0) == phases.num_links(1) == 1 and level_of(config) == "off"
    assert costs_of(config, build("1f1b", num_ranks=2, num_microbatches=8)).forward_comm == (0.0, 0.0)


def test_bytes_of_weights_are_those_of_the_model() -> None:
    """One process, FP32 everything: weight, gradient, master and two moments, with MTP beside the counted weights."""
    config = compose(["experiment=single", "parallel.schedule=1f1b"])
    schedule = build("1f1b", num_ranks=1, num_microbatches=1)
    memory = memory_of(config, schedule)
    weights = counts(config.model).main + counts(config.model).mtp
    moments = 8 if config.optim.moments == "fp32" else 4
    assert isinstance(memory.parameters, tuple)
    assert memory.parameters[0] == pytest.approx(weights * (4 + 4 + 4 + moments), rel=1e-3)


def test_a_cap_that_nothing_keeps_is_named() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.schedule=auto with parallel\.memory_gib=1: .*gpipe: .* GiB"):
        choice(compose(["experiment=deepseek_v3_2048_h800", "parallel.schedule=auto", "parallel.memory_gib=1"]))


def test_recompute_needs_fewer_bytes() -> None:
    config = compose(["experiment=deepseek_v3_2048_h800"])
    schedule = build("dualpipe", num_ranks=16, num_microbatches=120)
    sizes = []
    for recompute in ("none", "attend", "layer", "report"):
        changed = replace(config, parallel=replace(config.parallel, recompute=recompute))
        sizes.append(max(peak_bytes(schedule, memory_of(changed, schedule))))
    *coarse, report = sizes
    assert coarse == sorted(coarse, reverse=True) and len(set(coarse)) == 3
    assert coarse[2] < report < coarse[0]
