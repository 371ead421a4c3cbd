"""slurm/agent.py: torchrun that ends as its ranks do, and says no more than they."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.local import free_port
from slurm.test_cluster.cluster import ROOT

RANK = """
import os, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
{}
"""
ENDS = {  # of a rank, and what the agent answers
    "sys.exit(75)": 75,
    "sys.exit(2)": 2,
    "os.kill(os.getpid(), 9)": 137,
    "pass": 0,
}


def agent(tmp_path: Path, how: str) -> "subprocess.Popen[str]":
    (tmp_path / "rank.py").write_text(RANK.format(how))
    command = [sys.executable, str(ROOT / "slurm" / "agent.py"), "--nnodes=1", "--node-rank=0", "--nproc-per-node=1"]
    command += ["--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--max-restarts=0"]
    return subprocess.Popen(
        [*command, str(tmp_path / "rank.py")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_it_ends_with_the_code_of_its_rank_and_without_a_traceback(tmp_path: Path, how: str) -> None:
    process = agent(tmp_path, how)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == ENDS[how], said
    assert "rank 0 of 1" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_signal_to_the_agent_is_no_traceback_either(tmp_path: Path) -> None:
    process = agent(tmp_path, "time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "rank 0 of 1\n"
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said, said
