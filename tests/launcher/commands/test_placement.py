"""`expertpipe placement` over a real run's log and over a file; one line for every mistake."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.__main__ import main
from launcher.record.events import EventLog, StepEvent
from tests.distributed import run_distributed
from tests.launcher.spine import STEPS, config, parallel_trace, write_tokens

WHERE = ["--replicas", "12", "--ranks", "4", "--nodes", "2"]


@pytest.fixture
def load_file(tmp_path: Path) -> Path:
    path = tmp_path / "load.npy"
    np.save(path, np.array([[40, 1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1, 1]]))
    return path


def test_a_file_of_loads(load_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["placement", "--load", str(load_file), *WHERE, "--groups", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hierarchical"] and plan["groups"] == 4
    assert plan["before"] == [pytest.approx(41 / 17), 1.0]
    assert plan["after"][0] < plan["before"][0] and plan["after"][1] == 1.0
    assert [len(row) for row in plan["experts"]] == [12, 12]
    assert all(set(row) == set(range(8)) for row in plan["experts"])
    assert main(["placement", "--load", str(load_file), *WHERE]) == 0
    table = capsys.readouterr().out
    assert "12 slots on 4 ranks, 3 each; global: the gate has no groups" in table
    assert f"   worst  {41 / 17:8.3f}" in table


def event(step: int, **changes: Any) -> StepEvent:
    plain = StepEvent(
        step=step, tokens=step, loss=1.0, mtp_loss=None, lr=1e-3, grad_norm=1.0, tokens_per_second=1.0,
        step_seconds=1.0, expert_load_max_over_mean=1.0,
    )  # fmt: skip
    return replace(plain, **changes)


def test_every_rank_logs_all_blocks_counts(tmp_path: Path) -> None:
    run_config = config(
        write_tokens(str(tmp_path / "tokens")), pipeline=2, expert=2, data=2, schedule="1f1b", microbatches=4
    )
    run_config = replace(run_config, train=replace(run_config.train, expert_counts_every=2))
    ranks = run_distributed(4, parallel_trace, run_config)
    for step in range(STEPS):
        first = ranks[0][step]["result"]
        assert (first.expert_counts is not None) == (step == 1)
        assert all(rank[step]["result"].expert_counts == first.expert_counts for rank in ranks)
    logged = ranks[0][1]["result"]
    assert logged.expert_counts.keys() == logged.expert_load.keys()
    held = {block: counts.tolist() for rank in ranks for block, counts in rank[1]["counts"].items()}
    assert logged.expert_counts == held
    for block, counts in logged.expert_counts.items():
        assert max(counts) / np.mean(counts) == pytest.approx(logged.expert_load[block])


def test_a_run_that_logged_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("model: {n_group: 4}\n")
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append(event(1))
        arguments = ["placement", "--run", str(tmp_path), *WHERE, "--json"]
        assert main(arguments) == 2
        assert "no expert counts were logged; train with train.expert_counts_every=N" in capsys.readouterr().err
        log.append(event(2, expert_counts=((900, 1, 1, 1, 1, 1, 1, 1),)))
        log.append(event(4, expert_counts=((10, 1, 2, 3, 4, 5, 6, 7),)))
        log.append(event(6, expert_counts=((30, 0, 0, 0, 0, 0, 0, 0),)))
    assert main([*arguments, "--last", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["source"].endswith("events.jsonl, 2 counts of steps 4 to 6")
    assert plan["groups"] == 4 and plan["hierarchical"]
    assert plan["before"] == [pytest.approx(41 / 17)]  # 40, 1, 2, ... as in the file above
    assert plan["after"][0] < plan["before"][0]


def test_mistakes_are_one_line(load_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npy").write_text("no array")
    for arguments, words in [
        (["--load", str(tmp_path / "none.npy"), *WHERE], "none.npy: no such file"),
        (["--load", str(tmp_path / "text.npy"), *WHERE], "text.npy: not an .npy file of loads"),
        (["--load", str(load_file), "--replicas", "9", "--ranks", "4", "--nodes", "2"], "replicas=9"),
        (["--load", str(load_file), *WHERE, "--groups", "3"], "groups=3 does not divide the 8 experts"),
        (["--run", str(tmp_path), *WHERE], "events.jsonl: no such file"),
        (["--run", str(tmp_path), *WHERE, "--last", "0"], "--last 0 must be at least 1"),
    ]:
        assert main(["placement", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
