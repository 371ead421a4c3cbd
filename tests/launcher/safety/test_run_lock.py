"""One job per folder: the living are refused, the dead are followed, and a lock that was lost is not believed in."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.safety.run_lock import LOCK, RunLock, RunLockError

HOLD = """
import sys, time
from pathlib import Path
from launcher.safety.run_lock import RunLock
RunLock(Path(sys.argv[1]), beat_seconds=0.1).acquire()
print("held", flush=True)
time.sleep(60)
"""


def quick(folder: Path, stale_seconds: float = 1.0) -> RunLock:
    return RunLock(folder, beat_seconds=0.1, stale_seconds=stale_seconds)


def test_a_second_job_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    first = quick(tmp_path / "run")
    first.acquire()
    with pytest.raises(
        RunLockError, match=rf"process {os.getpid()} on {os.uname().nodename} is working in this"
    ) as error:
        quick(tmp_path / "run", 30).acquire()
    assert error.value.user_error
    first.require()
    first.release()
    assert list((tmp_path / "run").iterdir()) == []
    second = quick(tmp_path / "run")
    second.acquire()
    second.release()


def test_a_killed_owner_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    with pytest.raises(RunLockError, match=f"process {owner.pid}"):
        quick(tmp_path, 30).acquire()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    began = time.monotonic()
    lock = quick(tmp_path, 30)
    lock.acquire()
    assert time.monotonic() - began < 10
    lock.release()


def foreign(folder: Path, **values: object) -> Path:
    """A lock as another machine would have left it."""
    owner = {"token": "t", "job": None, "restart": "0", "host": "elsewhere", "pid": 1, "process_start": "1", "beats": 5}
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(owner | values))
    return folder / LOCK


def test_another_machine_is_watched_until_it_is_silent(tmp_path: Path) -> None:
    foreign(tmp_path)
    began = time.monotonic()
    lock = quick(tmp_path, 0.8)
    lock.acquire()
    assert 0.8 <= time.monotonic() - began < 10
    lock.release()


def test_an_earlier_start_of_the_same_slurm_job_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    foreign(tmp_path, job="77")
    began = time.monotonic()
    lock = quick(tmp_path, 30)
    lock.acquire()
    assert time.monotonic() - began < 10
    lock.release()


def test_a_lock_that_was_taken_over_is_known_to_be_lost(tmp_path: Path) -> None:
    lock = quick(tmp_path)
    lock.acquire()
    draft = tmp_path / "draft"
    draft.write_text(json.dumps({"token": "other", "host": "elsewhere", "pid": 12}))
    draft.replace(tmp_path / LOCK)
    with pytest.raises(RunLockError, match="now belongs to process 12 on elsewhere"):
        lock.require()
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "other"


def test_an_owner_that_wakes_up_late_leaves_its_successor_alone(tmp_path: Path) -> None:
    lock = quick(tmp_path)
    lock.acquire()
    assert not lock.lost
    foreign(tmp_path, token="other")
    deadline = time.monotonic() + 10
    while not lock.lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lock.lost
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "other"


def test_an_earlier_start_that_is_still_alive_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm has lost the node that it is on, and has started the job again: its last step must not come after that."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first, second = quick(tmp_path, 30), quick(tmp_path, 30)
    first.acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    waiter = threading.Thread(target=second.acquire)
    waiter.start()
    deadline = time.monotonic() + 10
    while not first.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert first.lost
    time.sleep(0.6)  # the last step of the first start
    assert waiter.is_alive()
    first.release()
    waiter.join(10)
    assert not waiter.is_alive()
    second.require()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_wait_for_a_silent_owner_one_wins(tmp_path: Path) -> None:
    """The slower one has seen the silence too, and goes for the lock when it is the faster one's already."""
    foreign(tmp_path)
    slow, fast = quick(tmp_path, 0.3), quick(tmp_path, 0.3)
    silent = slow._wait_for_owner()
    fast.acquire()
    slow._take_away(silent)
    fast.require()
    with pytest.raises(RunLockError, match="is working in this folder"):
        slow.acquire()
    fast.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_deleted_is_lost(tmp_path: Path) -> None:
    lock = quick(tmp_path)
    lock.acquire()
    (tmp_path / LOCK).unlink()
    with pytest.raises(RunLockError, match="now belongs to nobody"):
        lock.require()
    lock.release()


def test_half_a_lock_does_not_keep_anybody_out(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"token": "t')
    lock = quick(tmp_path, 30)
    lock.acquire()
    lock.release()
