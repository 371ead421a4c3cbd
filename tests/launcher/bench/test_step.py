"""The benchmark's line has every key that is promised, and figures that belong together."""

import json

import pytest

from launcher.__main__ import main


def test_bench_step_prints_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    overrides = ["experiment=tiny", "parallel=single", "train.global_batch_size=4", "train.threads=1"]
    assert main(["bench", "step", "--json", "--repetitions", "2", "--warmup", "1", *overrides]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    keys = {
        "tokens_per_second", "tokens_per_cpu_second", "spread", "gflops", "fraction_of_matmul_peak", "dtype", "params",
    }  # fmt: skip
    assert keys <= row.keys()
    assert row["tokens_per_step"] == 4 * 256 and row["dtype"] == "bf16"
    assert row["fraction_of_matmul_peak"] == pytest.approx(row["gflops"] / row["matmul_peak_gflops"])


def test_bench_step_measures_one_process_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert main(["bench", "step", "experiment=tiny"]) == 2
    assert "use parallel=single" in capsys.readouterr().err
