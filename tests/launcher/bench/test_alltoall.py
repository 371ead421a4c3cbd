"""The benchmark of the all-to-all: what it counts, its table, and the claim it was built for, on a shaped network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.bench.alltoall import check, count_copies, parser, random_ids
from launcher.bench.alltoall_table import Row, closing_line, head_lines, row_line
from launcher.config import ConfigError
from launcher.network import missing

ROOT = Path(__file__).parents[3]
SMALL = ["--num-tokens", "32", "--hidden", "512", "--experts", "32", "--repetitions", "1"]


def bench(*flags: str, seconds: float = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", "bench", "alltoall", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


def test_ids_are_limited_to_groups() -> None:
    arguments = parser().parse_args(["--num-tokens", "200"])
    ids = random_ids(arguments, 3)
    assert ids.shape == (200, 8) and ids.min() >= 0 and ids.max() < 256
    assert all(len(set(row)) == 8 for row in ids.tolist())
    groups = [len(set(row)) for row in (ids // 32).tolist()]
    assert max(groups) == 4 and torch.equal(ids, random_ids(arguments, 3))


def test_copies_are_counted_once_a_node() -> None:
    arguments = parser().parse_args(["--num-tokens", "100", "--nodes", "4"])
    ids = random_ids(arguments, 5)
    counted = count_copies(arguments, 5, 8)
    nodes = [set(row) for row in (ids // 64).tolist()]
    assert counted.away == sum(len(reached - {2}) for reached in nodes)
    assert counted.arriving == sum(len(set(row)) for row in (ids // 32).tolist())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "3"], "--nodes 2 does not divide 3 ranks"),
        (["--experts", "30"], "--experts 30 is no multiple of 4 ranks"),
        (["--groups", "7"], "--groups 7 does not divide --experts 256"),
        (["--topk", "200"], "--topk 200 is more than the experts of --topk-groups 4 groups"),
        (["--num-tokens", "0"], "--num-tokens 0: use 1 or more"),
        (
            ["--backend", "native"],
            "native and deepep need GPUs, and there are none: use collective, native_host or flat",
        ),
        (["--backend", "native_host", "--namespaces"], "native_host crosses no network: leave out --namespaces"),
        (["--backend", "flat", "--dtype", "fp8"], "flat does not send fp8: add --dtype bf16"),
        (["--namespaces", "--link-mbit", "0"], "--link-mbit 0: use a rate above 0"),
    ],
)
def test_sizes_that_do_not_go_together(flags: list[str], message: str) -> None:
    arguments = parser().parse_args(["--nodes", "2", *flags])
    with pytest.raises(ConfigError) as caught:
        check(arguments, arguments.ranks)
    assert message in caught.value.errors


def test_the_table() -> None:
    row = Row(
        "collective", "fp8", 16, 2, 1_200_000, 1_000_000, 1.5, 2.5, 3.25, 43.0, 80.0, 44.0, 81.0, 3.2, 256, 7168, 5
    )
    lines = [*head_lines(), row_line(row)]
    assert len({len(line) for line in lines}) == 1
    assert closing_line([row]) == "Within a node, plain all-to-alls moved 3.2 times the bytes a second."
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "collective FP8", "16 (2 nodes)", "1500", "43", "80", "16 (2 nodes)", "2500", "44", "81", "3.25x", "1.20",
        "1.00",
    ]  # fmt: skip


ROW_KEYS = {
    "backend", "dtype", "ranks", "nodes", "link_bytes", "minimum_bytes", "dispatch_ms", "combine_ms",
    "speedup_over_flat",
}  # fmt: skip


@pytest.mark.slow
def test_rows_on_this_machine(tmp_path: Path) -> None:
    result = bench(*SMALL, "--json", "--ranks", "2", "--rows", str(tmp_path / "rows.jsonl"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == (tmp_path / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["backend"], r["dtype"]) for r in rows] == [
        ("flat", "bf16"),
        ("collective", "bf16"),
        ("collective", "fp8"),
    ]
    assert all(row.keys() >= ROW_KEYS for row in rows)
    assert rows[0]["speedup_over_flat"] == 1.0 and rows[2]["link_bytes"] is None
    assert rows[2]["minimum_bytes"] / rows[1]["minimum_bytes"] == (512 + 4 + 1024) / 2048
    assert "turn 1 of 1: collective fp8 " in result.stderr


@pytest.mark.slow
def test_the_ranks_of_a_job() -> None:
    """torchrun's four processes, then srun's variables: the same command measures over them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    flags = ["-m", "launcher", "bench", "alltoall", *SMALL, "--json", "--backend", "collective"]
    result = subprocess.run([*torchrun, *flags], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["dtype"], r["ranks"], r["nodes"]) for r in rows] == [("bf16", 4, 1), ("fp8", 4, 1)]
    assert rows[0]["minimum_bytes"] == 0 and rows[0]["speedup_over_flat"] is None


@pytest.mark.slow
def test_the_ranks_of_a_slurm_step() -> None:
    """Two nodes of one task, as srun starts them."""
    step = {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "MASTER_ADDR": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "launcher", "bench", "alltoall", *SMALL, "--json", "--backend", "collective"]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | step | {"SLURM_PROCID": rank, "SLURM_NODEID": rank},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    first, second = (rank.communicate(timeout=200)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0] and second == ""
    assert {(row["ranks"], row["nodes"]) for row in map(json.loads, first.splitlines())} == {(2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "ranks"), [(2, 4), (3, 6), (4, 8)])
def test_deduplication_pays_on_a_network(nodes: int, ranks: int) -> None:
    """Nodes of two ranks: bytes at the minimum; 1.29 times as fast as flat (DeepSpeed's figure), FP8 more."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    sizes = ["--nodes", str(nodes), "--ranks", str(ranks), "--experts", str(64 * nodes), "--groups", str(2 * nodes)]
    flags = ["--namespaces", *sizes, "--num-tokens", "128", "--repetitions", "3", "--json"]
    result = bench(*flags, seconds=500)
    assert result.returncode == 0, result.stderr
    rows: dict[Any, Any] = {(r["backend"], r["dtype"]): r for r in map(json.loads, result.stdout.splitlines())}
    fp8, bf16, flat = rows["collective", "fp8"], rows["collective", "bf16"], rows["flat", "bf16"]
    for row in (fp8, bf16):
        # Expert ids and weights, counts, barriers, TCP: about 0.6%.
        assert 1.0 <= row["link_bytes"] / row["minimum_bytes"] < 1.02, row
    assert flat["link_bytes"] > 1.8 * bf16["link_bytes"]  # a copy for every expert on another node
    assert fp8["link_bytes"] < 0.77 * bf16["link_bytes"]  # dispatch in half, combine as before
    assert bf16["speedup_over_flat"] >= 1.29, rows
    assert fp8["speedup_over_flat"] > bf16["speedup_over_flat"], rows
