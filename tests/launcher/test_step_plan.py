"""Steps in closed form equal the loop that takes them one by one; the report's run to the token and the step."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataPhase
from data.cursor import Cursor
from launcher.config import RunConfig, compose
from launcher.step_plan import StepPlan, length_problems
from optim.config import Segment
from optim.schedule import value_at

TRILLION = 10**12


@pytest.fixture(scope="module")
def report() -> RunConfig:
    return compose(["experiment=deepseek_v3"])


def test_the_report_ends_with_the_step_that_reaches_its_tokens(report: RunConfig) -> None:
    last = list(StepPlan(report).stretches(report.train.steps))[-1]
    assert last.first_step + last.num_steps - 1 == report.train.steps
    assert last.end_tokens - last.step.tokens < 14_800 * 10**9 <= last.end_tokens
    assert StepPlan(report).steps_to(14_800 * 10**9) == report.train.steps


def test_the_warm_up_of_the_report_is_2000_steps(report: RunConfig) -> None:
    first, *_ = StepPlan(report).stretches(report.train.steps)
    assert first.num_steps >= 2000 and (first.step.batch, first.step.num_microbatches) == (3072, 24)
    end = 2000 * first.step.tokens
    assert value_at(report.optim.lr, end) == 2.2e-4 > value_at(report.optim.lr, end - 1)


def test_the_steps_of_the_report_hold_120_micro_batches_from_469_billion_on(report: RunConfig) -> None:
    plan = StepPlan(report)
    assert plan.at(469 * 10**9 - 1).batch == 15360 - 512
    assert (plan.at(469 * 10**9).batch, plan.at(469 * 10**9).num_microbatches) == (15360, 120)
    assert set(range(24, 121, 4)) == {stretch.step.num_microbatches for stretch in plan.stretches(report.train.steps)}


def test_half_the_gpus_take_the_same_steps(report: RunConfig) -> None:
    other = compose(["experiment=deepseek_v3_1024_h100"])
    ours, theirs = (list(StepPlan(c).stretches(c.train.steps)) for c in (report, other))
    assert [(s.first_step, s.first_tokens, s.step.batch) for s in ours] == [
        (s.first_step, s.first_tokens, s.step.batch) for s in theirs
    ]
    assert [2 * s.step.num_microbatches for s in ours] == [s.step.num_microbatches for s in theirs]


def test_the_extensions_follow_the_report() -> None:
    first, second = (compose([f"experiment=deepseek_v3_{length}k"]) for length in (32, 128))
    for config, length, batch in ((first, 32768, 1920), (second, 131072, 480)):
        (stretch,) = StepPlan(config).stretches(config.train.steps)
        assert (stretch.num_steps, stretch.step.batch, stretch.step.sequence_length) == (1000, batch, length)
        assert value_at(config.optim.lr, stretch.end_tokens) == value_at(config.optim.lr, 0) == 7.3e-6
        scaling = config.model.rope_scaling
        assert scaling is not None and (scaling.factor, scaling.beta_fast, scaling.beta_slow) == (40, 32, 1)
        assert scaling.original_max_position_embeddings == 4096
    assert (first.train.init_from, second.train.init_from) == ("runs/deepseek_v3", "runs/deepseek_v3_32k")
    assert compose(["experiment=deepseek_v3"]).run_dir == first.train.init_from
    assert first.run_dir == second.train.init_from
    seeds = [compose([f"experiment=deepseek_v3{name}"]).data.seed for name in ("", "_32k", "_128k")]
    assert len(set(seeds)) == 3  # no phase begins with windows of another, see tests/data/test_sampler.py


def small(steps: int, ramp: tuple[Segment, ...] | int, phases: tuple[DataPhase, ...] = ()) -> RunConfig:
    config = compose(["experiment=tiny", "model.max_position_embeddings=4096"])
    train = replace(config.train, steps=steps, global_batch_size=ramp, micro_batch_size=1)
    return replace(config, train=train, data=replace(config.data, sequence_length=16, phases=phases))


@settings(max_examples=60, deadline=None)
@given(
    ramp=st.tuples(st.integers(1, 6), st.integers(1, 4000), st.integers(1, 6), st.integers(1, 4000)),
    phases=st.lists(st.tuples(st.integers(1, 200), st.sampled_from([0, 8, 16, 64])), max_size=3),
)
def test_stretches_are_the_steps_one_by_one(ramp: tuple[int, ...], phases: list[tuple[int, int]]) -> None:
    low, first, rise, tokens = ramp
    segments = (Segment("constant", 2 * low, first), Segment("linear", 2 * (low + rise), tokens))
    begins, at = [], 0
    for gap, length in phases:
        at += 64 * gap
        begins.append(DataPhase(at, length))
    config = small(50, segments, tuple(begins))
    plan = StepPlan(config)
    expected, seen = [], 0
    for _ in range(50):
        expected.append((seen, plan.at(seen)))
        seen += plan.at(seen).tokens
    found = [
        (stretch.first_tokens + i * stretch.step.tokens, stretch.step)
        for stretch in plan.stretches(50) for i in range(stretch.num_steps)
    ]  # fmt: skip
    assert found == expected
    for number in (1, 7, 50):
        assert plan.steps_to(expected[number - 1][0] + 1) == number


def test_tokens_to_come_are_those_of_a_batch_that_grows() -> None:
    config = compose(["experiment=demo"])
    plan, steps = StepPlan(config), config.train.steps
    seen, found = 0, []
    for step in range(steps):
        found.append((steps - step, seen))
        seen += plan.at(seen).tokens
    for left, after in found[:: steps // 9]:
        assert plan.tokens_of(left, after=after) == seen - after
    assert seen > 1.8 * steps * plan.at(0).tokens  # so the first steps say nothing of the rest
    assert plan.tokens_of(0, after=seen) == 0


def test_tokens_seen_are_the_cursors_where_phases_begin_with_steps() -> None:
    ramp = (Segment("constant", 4, 16 * 4 * 3), Segment("linear", 8, 16 * 30))
    config = small(40, ramp, (DataPhase(16 * 4 * 3, 32), DataPhase(16 * 4 * 3 + 32 * 4 * 2, 8)))
    assert length_problems(config) == []
    plan, cursor = StepPlan(config), Cursor(config.data)
    samples = tokens = 0
    for _ in range(40):
        assert cursor.tokens_seen(samples) == tokens
        step = plan.at(tokens)
        assert cursor.stretch(samples).sequence_length == step.sequence_length
        assert cursor.stretch(samples + step.batch - 1) is cursor.stretch(samples)
        samples, tokens = samples + step.batch, tokens + step.tokens


def test_a_phase_within_a_step_is_named_with_places_that_work() -> None:
    phase = DataPhase(16 * 10, 32)
    (message,) = length_problems(small(9, 4, (phase,)))
    assert message == (
        "data.phases.0.from_tokens=160: falls within a step, whose sequences are of one length: use 128 or 192"
    )
    for tokens in (128, 192):
        assert length_problems(small(9, 4, (DataPhase(tokens, 32),))) == []
    assert length_problems(small(9, 4, (DataPhase(160, weights=(1.0,)),))) == []  # a blend may change anywhere
    assert length_problems(small(2, 4, (phase,))) == []  # the run ends before
