"""The harness of the long comparison: it goes on where it was stopped, and compares what it says it compares."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.tokens import TokenWriter
from launcher.config import RunConfig
from tests.bench.peer_report import Row, Side, draw, report
from tests.bench.peer_run import PeerRun, marks_of, other_tokens
from tests.launcher.spine import config, write_tokens


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    write_tokens(str(tmp_path / "train"))
    with TokenWriter(tmp_path / "heldout", "uint16") as writer:
        writer.add(np.random.default_rng(1).integers(0, 256, 150).astype(np.uint16))
    made = config(str(tmp_path / "train"), pipeline=1, expert=1, data=1, schedule="1f1b", microbatches=4)
    return replace(made, data=DataConfig(str(tmp_path / "train"), sequence_length=32), name="small")


def test_marks_end_with_the_run() -> None:
    assert marks_of(1536, 8) == [192 * i for i in range(1, 9)]
    assert marks_of(10, 3) == [4, 8, 10] and marks_of(2, 8) == [1, 2]


def test_a_stopped_run_goes_on_bitwise(run_config: RunConfig, tmp_path: Path) -> None:
    def run(folder: str) -> PeerRun:
        return PeerRun(run_config, tmp_path / folder, experts="eager", micro_batch=2)

    straight = run("a")
    straight.train([2, 3])
    run("b").train([2])
    with open(tmp_path / "b" / "steps.jsonl", "a") as file:  # a step that was done after the last save
        file.write('{"step": 3, "tokens": 0, "loss": 0.0, "mtp_loss": null, "seconds": 0.0, "load": []}\n')
    again = run("b")
    assert again.step == 2
    again.train([2, 3])
    for name in ("loss", "mtp_loss", "tokens", "load"):
        assert [getattr(row, name) for row in again.rows()] == [getattr(row, name) for row in straight.rows()]
    assert again.heldout == straight.heldout and len(again.heldout) == 2
    assert straight.rows()[2].tokens == 3 * 4 * 32 and straight.side([2, 3]).cpu_seconds > 0


def side(losses: list[float], *, load: float = 1.2, tokens: int = 100) -> Side:
    rows = [Row(i + 1, tokens * (i + 1), 5.0 - i, None, 2.0, (load, 1.0)) for i in range(4)]
    return Side(rows, [2, 4], losses, 3.0)


def test_what_is_reported(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Text:
        text_bytes = 149

    monkeypatch.setattr("data.tokens.Manifest.read", lambda prefix: Text)
    found = report(run_config, [side([4.0, 3.0])], [side([4.0, 3.02])])
    assert found["tokens_at_marks"] == [200, 400] and found["equal_at_end"] and found["balanced_at_end"]
    assert found["relative_gap_at_marks"] == [0.0, pytest.approx(-0.02 / 3.02)]
    assert found["ours"]["heldout_bits_per_byte"][1] == pytest.approx(3 / np.log(2))
    assert found["time_ratio"] == 1.0 and found["ours"]["expert_load_max_over_mean_at_end"] == [1.2, 1.0]
    assert not report(run_config, [side([4.0, 3.0])], [side([4.0, 3.04])])["equal_at_end"]
    assert not report(run_config, [side([4.0, 3.0], load=1.6)], [side([4.0, 3.0])])["balanced_at_end"]
    with pytest.raises(AssertionError, match="not seen the same tokens"):
        report(run_config, [side([4.0, 3.0])], [side([4.0, 3.0], tokens=99)])
    ours = [side([4.0, 3.0]), side([4.0, 3.06]), side([4.04, 3.03])]
    several = report(run_config, ours, [side([4.0, 3.03])])
    assert several["relative_gap_at_marks"][1] == pytest.approx(0.0) and several["equal_at_end"]
    assert several["ours_apart_at_marks"] == [pytest.approx(0.01), pytest.approx(0.02)]
    theirs = [side([4.0, 3.0]), side([4.0, 2.88])]
    both = report(run_config, ours, theirs)
    assert both["relative_gap_at_marks"][1] == pytest.approx(3.03 / 2.94 - 1) and not both["equal_at_end"]
    assert both["transformers_apart_at_marks"][1] == pytest.approx(3 / 2.88 - 1)
    assert len(both["transformers_again"]) == 1
    with pytest.raises(AssertionError, match="not seen the same tokens"):
        report(run_config, [side([4.0, 3.0]), side([4.0, 3.0], tokens=99)], [side([4.0, 3.0])])
    draw(tmp_path / "a.png", "small", ours, theirs)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_overrides_that_change_the_tokens_are_found(run_config: RunConfig, tmp_path: Path) -> None:
    steps = run_config.train.steps
    assert other_tokens(run_config, replace(run_config, optim=replace(run_config.optim, moments="fp32"))) is None
    longer = replace(run_config, train=replace(run_config.train, steps=steps + 1))
    assert other_tokens(run_config, longer) == f"{steps + 1} steps, not {steps}"
    batch = replace(run_config, train=replace(run_config.train, micro_batch_size=4, global_batch_size=8))
    assert str(other_tokens(run_config, batch)).startswith("step 1 has 8 sequences of 32 tokens, not 4 of 32")
