"""A real run of two ranks: every line obeys the schema, time adds up, a planted collapse is said, written and kept."""

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.config import RunConfig, compose
from launcher.record import run_log
from launcher.record.clock import PHASES
from launcher.record.events import RankEvent, StepEvent, rank_log_path, read, read_header, read_rank
from launcher.record.run_log import RunLog
from launcher.record.schema import header_problems, problems
from launcher.show.display import Display, duration
from launcher.step_plan import StepPlan
from tests.distributed import run_distributed
from tests.launcher.checkpoint.states import prepared
from tests.launcher.live import live_config
from tests.launcher.record.test_events import event as made_up

STEPS, LASTED = 6, 3


def test_the_time_to_go_counts_the_tokens_of_larger_steps_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """experiment=demo at a constant speed: right from the first step on, though the batch doubles."""
    config, speed, out = compose(["experiment=demo"]), 3000.0, io.StringIO()
    plan = StepPlan(config)
    monkeypatch.setattr(run_log, "step_event", lambda run, *rest: made_up(1, tokens=4096, tokens_per_second=speed))
    log: Any = RunLog(cast(Any, SimpleNamespace(config=config, plan=plan, process=SimpleNamespace(rank=0))), [])
    log._events, log._peak, log._display = SimpleNamespace(append=lambda line: None), object(), Display(out)
    log.step(None, 1.0, [])
    *_, last = plan.stretches(config.train.steps)
    assert out.getvalue().split()[-1] == duration((last.end_tokens - 4096) / speed) == "1:05:25"


def trained(config: RunConfig, planted: bool) -> tuple[int, str]:
    """One rank's run, as `expertpipe train` would; its exit code and what it printed."""
    import launcher.train as module

    plain = module.build

    def build(*args: Any, **named: Any) -> Any:
        run = plain(*args, **named)
        if planted and 1 in run.model.routers:
            # experts 2 and 3 are a group, whose score is the sum of both: neither is ever chosen
            run.model.routers[1].router.e_score_correction_bias[3] = -100.0
        return run

    module.build = build
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = module.train(config)
    return code, out.getvalue()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("planted")
    config = live_config(
        folder / "run", prepared(folder / "data"), steps=STEPS, collapse_steps=LASTED,
        checkpoint_every=4, expert_counts_every=2, norms_every=2, rank_events_every=4,
    )  # fmt: skip
    results = run_distributed(2, trained, config, True)
    assert [code for code, _ in results] == [0, 0], results
    assert results[1][1] == ""  # rank 0 alone prints
    return folder / "run", results[0][1]


def test_every_line_obeys_the_schema(run_dir: tuple[Path, str]) -> None:
    folder, _ = run_dir
    logs = [(folder / "events.jsonl", StepEvent)] + [(rank_log_path(folder, rank), RankEvent) for rank in (0, 1)]
    for path, kind in logs:
        header, *rest = lines(path)
        assert header_problems(header, kind) == []
        assert len(rest) == (STEPS if kind is StepEvent else 2)
        for record in rest:
            assert problems(record, kind) == []
    header = read_header(folder / "events.jsonl")
    assert header["peak_source"].startswith("measured: FP32 products of 384 x 384 for 0.05 s on 2 ranks at once")


BROKEN = [
    ({"news": 1}, "news: no such field"), ({"loss": "high"}, "loss='high': must be a number"),
    ({"step": 1.5}, "step=1.5: must be a whole number"), ({"lr": -1}, "lr=-1: must be 0 or more"),
    ({"dropped_tokens": True}, "must be a whole number"), ({"expert_load": [1, "x"]}, "expert_load.1='x'"),
    ({"expert_load": 2}, "must be a list"), ({"dead_experts": [[1, 2, 3]]}, "dead_experts.0: 3 items, must be 2"),
    ({"grad_norms": {"neck": 1.0}}, "grad_norms.neck: no such key"), ({"warnings": [3]}, "warnings.0=3: must be text"),
    ({"grad_norms": []}, "must be an object"), ({"fp8": [[None]]}, "must be text or a number"),
]  # fmt: skip


def test_a_line_that_breaks_the_schema_is_named(run_dir: tuple[Path, str]) -> None:
    good = lines(run_dir[0] / "events.jsonl")[1]
    for change, message in BROKEN:
        found = problems(good | change, StepEvent)
        assert len(found) == 1 and message in found[0], (change, found)
    assert problems({k: v for k, v in good.items() if k != "loss"}, StepEvent) == ["loss: missing"]
    assert problems(good | {"loss": "nan"}, StepEvent) == []
    assert header_problems({"schema": "other", "version": 9}, RankEvent) == [
        "schema=other: must be expertpipe-rank-events", "version=9: must be 2",
    ]  # fmt: skip


def test_time_and_rows_of_each_rank_add_up(run_dir: tuple[Path, str]) -> None:
    folder, _ = run_dir
    events = read(folder / "events.jsonl")
    ranks = [read_rank(rank_log_path(folder, rank)) for rank in (0, 1)]
    for found in ranks:
        assert [(event.step, event.steps) for event in found] == [(4, 4), (6, 2)]
        for event in found:
            assert set(event.phases) == set(PHASES)
            assert sum(event.phases.values()) == pytest.approx(event.seconds, rel=1e-6)
            for phase in ("data", "forward", "backward", "messages", "optimizer", "metrics"):
                assert event.phases[phase] > 0, phase
            assert event.phases["forward"] + event.phases["backward"] < event.seconds
    assert ranks[0][0].phases["all_to_all"] == 0 < ranks[1][0].phases["all_to_all"]  # rank 0 has the dense layer alone
    # the wall time of the steps that a line stands for is in it
    assert ranks[0][0].seconds >= sum(event.step_seconds for event in events[:4])
    tokens = events[-1].tokens  # 2 experts for each, in one MoE layer and the MTP module's
    assert sum(event.rows for found in ranks for event in found) == 2 * 2 * tokens


def test_a_step_says_what_it_measured(run_dir: tuple[Path, str]) -> None:
    for event in read(run_dir[0] / "events.jsonl"):
        due = event.step % 2 == 0
        assert bool(event.grad_norms) == bool(event.weight_norms) == bool(event.expert_counts) == due
        assert event.dropped_tokens == 0
        assert len(event.router_bias_ranges) == len(event.expert_load) == 2
        assert event.router_bias_range == max(event.router_bias_ranges) > 99
        assert event.mfu_causal and event.mfu_full and event.mfu_full > event.mfu_causal
        assert (event.mtp_lambda, event.bias_speed, event.batch) == (0.3, 1e-3, 2)
        assert event.dead_experts == ((1, 2), (1, 3))
        if due:
            assert event.expert_counts[0][2:] == (0, 0) and min(event.expert_counts[1]) > 0


def test_a_planted_collapse_is_said_written_and_kept(run_dir: tuple[Path, str]) -> None:
    folder, printed = run_dir
    dead = f"block 1: experts 2, 3 without a token for {LASTED} steps (train.collapse_steps={LASTED})"
    full = f"block 1: one expert takes 100% of the tokens, for {LASTED} steps now"
    assert printed.count(f"step {LASTED}: {dead}") == printed.count(f"step {LASTED}: {full}") == 1
    by_step = {event.step: event.warnings for event in read(folder / "events.jsonl")}
    assert by_step[LASTED][0] == dead and by_step[LASTED][1].startswith(full)
    assert not any("block 1" in text for step in by_step if step != LASTED for text in by_step[step])
    faults = [record for record in lines(folder / "faults.jsonl") if record.get("block") == 1]
    assert [(f["step"], f["kind"], f["block"], f["experts"]) for f in faults] == [
        (LASTED, "dead", 1, [2, 3]), (LASTED, "collapse", 1, []),
    ]  # fmt: skip
    manifest = json.loads((folder / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["collapse"]["dead"] == [[1, 2, 4], [1, 3, 4]] and [1, 4] in manifest["collapse"]["collapsed"]


def test_the_screen_ends_with_what_its_columns_do_not_show(run_dir: tuple[Path, str]) -> None:
    *_, share, split = run_dir[1].splitlines()
    assert re.fullmatch(r"MFU [\d.]+% causal, [\d.]+% full, of [\d.]+ TFLOP/s; dropped tokens 0", share)
    assert re.fullmatch(r"rank 0: (\S+ \d+%, ){3}\S+ \d+%", split)
    assert len(share) <= 80 and len(split) <= 80


def test_without_a_fault_nothing_is_said(tmp_path: Path) -> None:
    config = live_config(
        tmp_path / "run", prepared(tmp_path / "data"), steps=4, collapse_steps=LASTED,
        pipeline=1,
    )  # fmt: skip
    ((code, printed),) = run_distributed(1, trained, config, False)
    assert code == 0 and "without a token" not in printed
