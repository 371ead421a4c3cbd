import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data.loader import DataConfig, Loader
from launcher.__main__ import main
from launcher.bench import data as bench_data
from launcher.bench.data import BenchError, Child, Task, generate, sparse_manifest
from launcher.bench.readers import READERS, memmap, ours

KEYS = {"reader", "tokens_per_second", "ratio_to_memmap", "startup_seconds", "rss_bytes"}


def test_rows_of_a_short_bench(capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "_ROUND_SECONDS", 0.02)
    argv = ["bench", "data", "--json", "--rounds", "3", "--tokens", "400000", "--sequence-length", "512"]
    assert main([*argv, "--batch-size", "4"]) == 0
    rows = {row["reader"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {*READERS, "ours, 14.8T tokens"}
    for name in ("ours", "memmap"):
        assert rows[name].keys() >= KEYS and rows[name]["tokens_per_second"] > 1e5
        assert 1e6 < rows[name]["rss_bytes"] < 2e8 and 0 < rows[name]["startup_seconds"] < 5
    assert rows["memmap"]["ratio_to_memmap"] == 1
    at_scale = rows["ours, 14.8T tokens"]
    assert at_scale["startup_seconds"] < 5 and at_scale["rss_bytes"] < 2e8 and at_scale["tokens_per_second"] is None
    for row in rows.values():
        assert row["startup_seconds"] is not None or "not installed: pip install" in row["note"]


def test_readers_give_windows_of_the_file(tmp_path):
    task = Task(generate(tmp_path, 50_000), 64, 4, "")
    tokens = np.fromfile(f"{task.prefix}.bin", dtype="<i4")
    windows = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int64), 65)}
    for reader in (ours, memmap):
        batches = reader(task)
        for _ in range(5):
            batch = next(batches)
            assert batch.shape == (4, 65) and batch.dtype == np.int64
            assert all(row.tobytes() in windows for row in batch)


def test_sparse_files_are_of_the_report_s_size(tmp_path):
    prefix = sparse_manifest(tmp_path, bench_data.REPORT_TOKENS)
    files = list(Path(tmp_path).glob("report-*.bin"))
    assert sum(path.stat().st_size for path in files) == 4 * bench_data.REPORT_TOKENS
    assert sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512 < 10e6
    loader = Loader(DataConfig(prefix))
    last = loader.sampler.windows_per_epoch - 1
    assert loader.windows(np.array([0, last, 10 * last])).shape == (3, 4097)


def test_a_reader_that_stops_is_named(tmp_path):
    with pytest.raises(BenchError, match="reader ours stopped"):
        Child("ours", tmp_path / "none.json", sys.executable)


def test_impossible_sizes(capsys):
    assert main(["bench", "data", "--tokens", "100"]) == 2
    assert "--tokens at least 65552" in capsys.readouterr().err
