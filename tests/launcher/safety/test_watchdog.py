"""Silent, dead and stuck ranks are told apart and named, by processes that share nothing but a folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.record.recorder import Recorder, read_life, recorder_path
from launcher.safety.watchdog import Suspect, report_path, silent_ranks, stacks_path

RANK = """
import os, sys, time
from launcher.record.recorder import Recorder, recorder_path
from launcher.safety.watchdog import Watchdog
folder, rank, stuck = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "stuck"
limit = 5 if rank < 2 and stuck else 60
recorder = Recorder(recorder_path(folder, rank))
with Watchdog(folder, recorder, rank=rank, world_size=3, silent_seconds=5, stuck_seconds=limit) as watchdog:
    recorder.note(7, "F stage 1 micro-batch 2")
    print("ready", flush=True)
    with watchdog.step():
        for turn in range(600):
            time.sleep(0.1)
            if stuck and turn == 10:
                time.sleep(600)
            peers = [os.path.exists(f"{folder}/go{k}") for k in range(3)]
            if all(peers):  # as in a collective: nobody moves on without the others
                recorder.note(7, "B stage 1 micro-batch 2")
            open(f"{folder}/go{rank}", "w").close()
            while stuck is False and os.path.exists(f"{folder}/halt"):
                time.sleep(0.1)
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen]]:
    found: list[subprocess.Popen] = []
    yield found
    for process in found:
        process.kill()
        process.communicate()


def start(folder: Path, rank: int, kind: str = "well") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder), str(rank), kind],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_everybody_leaves(tmp_path: Path, ranks: list[subprocess.Popen]) -> None:
    ranks += [start(tmp_path, rank) for rank in range(3)]
    (tmp_path / "halt").touch()
    ranks[2].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    said = [process.communicate(timeout=40)[1] for process in ranks]
    assert time.monotonic() - began < 35
    assert [process.returncode for process in ranks[:2]] == [75, 75]
    report = report_path(tmp_path).read_text()
    assert report.startswith(f"rank 2 (pid {ranks[2].pid} on ") and "has given no sign of life for" in report
    assert "in step 7, last action: " in report and "micro-batch 2" in report
    assert "rank 0" not in report.split("Noticed")[0] and "rank 2 (pid" in said[1]
    for rank in range(3):  # the stopped one was woken to say where it was
        assert "most recent call first" in stacks_path(tmp_path, rank).read_text(), rank


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(tmp_path: Path, ranks: list[subprocess.Popen]) -> None:
    ranks += [start(tmp_path, rank, "stuck" if rank == 1 else "well") for rank in range(3)]
    for process in ranks:
        if process is ranks[1]:
            assert process.wait(40) == 75
    report = report_path(tmp_path).read_text()
    assert report.startswith(f"rank 1 (pid {ranks[1].pid} on ") and "is alive but stands still at <string>:" in report


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    living = Recorder(recorder_path(tmp_path, 0))
    living.note(3, "waiting")
    living.beat()
    program = (
        "import sys; from launcher.record.recorder import Recorder; r = Recorder(sys.argv[1])\n"
        "r.note(3, 'W stage 2'); r.beat()"
    )
    subprocess.run([sys.executable, "-c", program, str(recorder_path(tmp_path, 1))], check=True)
    began = time.monotonic()
    (suspect,) = silent_ranks(tmp_path, 2)
    assert time.monotonic() - began < 2
    words = suspect.describe(tmp_path, 4)
    assert suspect.rank == 1 and " is dead, in step 3, last action: W stage 2 (" in words
    life = read_life(recorder_path(tmp_path, 0))
    assert life is not None and (life.pid, life.host) == (os.getpid(), os.uname().nodename)
    living.close()


def test_silence_is_judged_by_counts_and_endings_excuse_it(tmp_path: Path) -> None:
    recorders = [Recorder(recorder_path(tmp_path, rank)) for rank in range(3)]
    for rank, recorder in enumerate(recorders):
        recorder.note(1, "finished" if rank == 2 else "B stage 0")
        recorder.beat()
    # all three count no more; this process is alive, so only the counts can tell
    assert [suspect.rank for suspect in silent_ranks(tmp_path, 4, seconds=0.2)] == [0, 1]  # of rank 3 nothing is known
    assert Suspect(3, None, alive=False).describe(tmp_path, 4).endswith("before its first recorded action")
