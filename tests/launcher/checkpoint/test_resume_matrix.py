"""Resume is bitwise under every schedule, precision and dispatcher back end: real runs, new processes, real SIGKILLs.

Each case is trained straight, and again with an end after two steps or a SIGKILL in the midst, started anew. Compared
are losses, all shards' bytes and the rest of the state; that this sees what is left out is shown in test_resume.py.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.files import step_name
from launcher.config import RunConfig
from optim.config import Segment
from parallel.config import DISPATCHERS
from parallel.pipeline.schedules import SCHEDULES
from tests.launcher.checkpoint.outcome import Outcome, differences, outcome
from tests.launcher.checkpoint.states import prepared
from tests.launcher.live import SMALL, losses, run
from tests.launcher.spine import config

STEPS, BEFORE = 5, 2
MODEL = replace(SMALL, num_hidden_layers=4)  # two stages on each of two ranks
PRECISIONS = ("fp32", "bf16", "fp8")


@dataclass(frozen=True)
class Case:
    """One run. layout: pipeline, data and expert ranks. kill: a fault of the first start; None: it ends by itself.

    ema, ramp (a batch that grows in the fourth step), spike (a step after the restart that is skipped by what the guard
    remembers from before it).
    """

    schedule: str
    precision: str
    dispatcher: str
    layout: tuple[int, int, int] = (2, 1, 1)
    kill: str | None = None
    ema: bool = False
    ramp: bool = False
    spike: bool = False
    keys: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.schedule}-{self.precision}-{self.dispatcher}"


EXPERTS = (2, 2, 2)
CASES = [
    Case("1f1b", "bf16", "native_host", EXPERTS, kill="kill_before:1,4", ema=True),
    Case("gpipe", "fp32", "flat", ema=True, spike=True),
    Case("interleaved", "fp8", "flat", kill="kill_before:0,4", ema=True),
    Case("zb1p", "fp32", "native_host", EXPERTS, ramp=True),
    Case("zbv", "bf16", "flat", ramp=True, ema=True, spike=True, kill="kill_at:1,verify,3"),
    Case("dualpipev", "fp8", "collective", EXPERTS, kill="kill_before:3,4", keys={"ranks_per_node": 1}),
    Case("dualpipe", "bf16", "collective", EXPERTS, ramp=True, ema=True, keys={"ranks_per_node": 2}),
    Case("dualpipe", "fp8", "native_host", EXPERTS, kill="kill_at:0,rename,3", ema=True),
    Case("1f1b", "fp32", "collective", (1, 4, 4), kill="kill_before:2,3", keys={"ranks_per_node": 2}),
]


def test_every_value_is_in_a_case() -> None:
    assert {case.schedule for case in CASES} == set(SCHEDULES)
    assert {case.precision for case in CASES} == set(PRECISIONS)
    assert {case.dispatcher for case in CASES} == set(DISPATCHERS) - {"native", "deepep"}  # which need GPUs
    assert all(any(getattr(case, what) for case in CASES) for what in ("kill", "ema", "ramp", "spike"))


def configured(case: Case, prefix: str, run_dir: Path) -> RunConfig:
    pipeline, data, expert = case.layout
    found = config(
        prefix, pipeline=pipeline, data=data, expert=expert, schedule=case.schedule, microbatches=4, model=MODEL,
        run_dir=str(run_dir),
    )  # fmt: skip
    batch: Any = 4 * data
    if case.ramp:
        batch = (Segment("constant", batch, 2 * batch * 32), Segment("linear", 1.5 * batch, 64))
    train = replace(
        found.train, steps=STEPS, global_batch_size=batch, precision=case.precision, checkpoint_every=1,
        keep_checkpoints=9, timeout_seconds=60, spike_policy="skip", spike_window=3,
    )  # fmt: skip
    return replace(
        found,
        train=train,
        optim=replace(found.optim, ema_decay=0.5 if case.ema else 0.0, moments="bf16"),
        parallel=replace(found.parallel, dispatcher=case.dispatcher, **case.keys),
        fp8=replace(found.fp8, native=False),
    )


def ended(run_config: RunConfig) -> Outcome:
    folder = Path(run_config.run_dir)
    return outcome(folder / "checkpoints" / step_name(run_config.train.steps), losses(folder))


# small cases in CI, the rest with all faults and schedules
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=pytest.mark.exhaustive if i else pytest.mark.slow)
     for i, case in enumerate(CASES)],
)  # fmt: skip
def test_resume_is_bitwise(tmp_path: Path, case: Case) -> None:
    prefix = prepared(tmp_path / "data")
    first = configured(case, prefix, tmp_path / "straight")
    # the fourth step, whose samples begin here; the guard knows three steps then, one of them since the restart
    samples = 3 * 4 * case.layout[1]
    faults = [f"spike:{samples}"] if case.spike else []
    straight = run(first, *faults)
    assert straight.code == 0, straight.output
    assert ("spike in step 4" in straight.output) == case.spike, straight.output
    again = replace(first, run_dir=str(tmp_path / "again"))
    if case.kill is None:
        before = run(replace(again, train=replace(again.train, steps=BEFORE)), *faults)
        assert before.code == 0, before.output
    else:
        before = run(again, *faults, case.kill)
        assert before.code == 1 and "SIGKILL" in before.output, before.output
    after = run(again, *faults)
    assert after.code == 0 and "resumed after step" in after.output, after.output
    assert ("spike in step 4" in after.output) == case.spike, after.output
    assert differences(ended(again), ended(first)) == []
    assert sorted(ended(again).losses) == list(range(1, STEPS + 1))
