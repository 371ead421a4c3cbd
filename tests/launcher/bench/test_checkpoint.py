"""The benchmark of checkpoints runs, checks what it reads back, and its rows say what they should."""

import json

import pytest

from launcher.__main__ import main
from launcher.bench.checkpoint import rows_of


def test_rows_are_medians_and_ratios_turn_by_turn() -> None:
    figures = {
        "raw": {"save": [1.0, 2.0, 4.0]},
        "expertpipe": {
            "save": [1.1, 2.4, 4.0],
            "stall": [0.1, 0.3, 0.2],
            "stall_without_step": [0.4, 0.4, 0.4],
            "load": [1, 2, 3],
            "reshard": [3, 2, 1],
        },
        "torch DCP": {"save": [2.0, 2.0, 2.0], "stall": [1, 1, 1], "load": [1, 1, 1], "reshard": [1, 1, 1]},
    }
    raw, ours, dcp = rows_of(figures, 2**30)
    assert raw["ratio_to_raw"] == 1 and raw["stall_seconds"] is None and raw["bytes"] == 2**30
    assert ours["stall_without_step_seconds"] == 0.4
    assert ours["stall_without_step_of_save"] == pytest.approx(0.4 / 2.4)  # of its own turn's save
    assert ours["stall_of_save"] == pytest.approx(0.1 / 1.1) and raw["stall_of_save"] is None
    assert ours["ratio_to_raw"] == pytest.approx(1.1) and ours["ratio_highest"] == pytest.approx(1.2)
    assert (ours["save_seconds"], ours["stall_seconds"], ours["reshard_seconds"]) == (2.4, 0.2, 2)
    assert dcp["ratio_to_raw"] == 1.0 and dcp["ratio_lowest"] == 0.5


@pytest.mark.slow
def test_a_small_one_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "checkpoint", "--processes", "2", "--bytes", "4194304", "--turns", "1", "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["engine"] for row in rows] == ["raw", "expertpipe", "torch DCP"]
    for row in rows[1:]:
        assert all(row[f"{what}_seconds"] > 0 for what in ("save", "stall", "load", "reshard"))
