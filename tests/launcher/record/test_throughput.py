"""MFU: the planner's conventions, the peak of a cluster file, and a peak measured where there is none."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.config import compose
from launcher.record.throughput import Peak, clusters, mfu, peak_of
from launcher.runtime import Process
from tests.distributed import run_distributed
from tests.launcher.spine import config

H800 = 989.4e12


def test_the_published_run_has_its_published_mfu() -> None:
    # arXiv 2505.09343, table 4: 2,048 H800, 272.80B tokens a day, 43.73% full (non-causal), 38.94% causal
    run = compose(["experiment=deepseek_v3"])
    found = mfu(run, Peak(2048 * H800, ""), tokens_per_second=272.80e9 / 86400, sequence_length=4096)
    assert found.full == pytest.approx(0.4373, rel=0.01)
    assert found.causal == pytest.approx(0.3894, rel=0.01)


def test_longer_sequences_count_their_attention() -> None:
    run = compose(["experiment=deepseek_v3"])
    short, long = (mfu(run, Peak(H800, ""), tokens_per_second=1e3, sequence_length=n) for n in (4096, 32768))
    assert long.causal > short.causal and long.full / short.full > long.causal / short.causal


def test_a_cluster_file_is_the_peak(tmp_path: Path) -> None:
    plain = config("unused", pipeline=1, expert=1, data=1, schedule="1f1b")
    process = Process(0, 16, torch.device("cpu"))
    assert {"h100", "h200", "h800"} <= clusters().keys()
    own = tmp_path / "own.yaml"
    own.write_text(clusters()["h800"].read_text().replace("989.4e12", "5e12"))
    for against, each in (("h800", H800), (str(own), 5e12)):
        run = replace(plain, train=replace(plain.train, mfu_against=against))
        found = peak_of(run, process, None)  # type: ignore[arg-type]  # nothing is measured, nobody is asked
        assert found.flops == 16 * each
        assert found.source.startswith("H800, BF16 dense: NVIDIA")


def measured() -> tuple[float, str, float, float]:
    from launcher.runtime import process_group

    run = config("unused", pipeline=1, expert=1, data=1, schedule="1f1b")
    with process_group(run.train) as process:
        began = time.process_time()
        found = peak_of(run, process, dist.group.WORLD)  # type: ignore[arg-type]
        spent = time.process_time() - began
        a = torch.randn(384, 384)
        began, products = time.process_time(), 60
        for _ in range(products):
            torch.mm(a, a)
        return found.flops, found.source, spent, 2 * 384**3 * products / (time.process_time() - began)


def test_a_measured_peak_is_the_sum_of_the_ranks() -> None:
    found = run_distributed(2, measured)
    assert found[0][:2] == found[1][:2]
    total, source = found[0][:2]
    assert source == "measured: FP32 products of 384 x 384 for 0.05 s on 2 ranks at once, 1 thread a rank"
    # by the processes' own CPU time no rank can be slower than it was by the clock, but for noise
    assert 0 < total < 2 * sum(rate for *_, rate in found)
    assert all(spent < 2 for _, _, spent, _ in found)
