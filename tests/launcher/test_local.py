"""Local processes: who is blamed when a rank dies, what is handed on, and that nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.local import Exit, first_cause, rank_environment, run_local

ROOT = Path(__file__).parents[2]
# what every rank of these tests begins with: a recorder, its pid and that of a helper it starts, and a way to wait
PRELUDE = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from launcher.record.recorder import Recorder, recorder_path
run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
recorder = Recorder(recorder_path(run_dir, rank))
def ready(step=12, action="F stage 1 micro-batch 5"):
    recorder.note(step, action)
    (run_dir / f"pid{{rank}}.part").write_text(str(os.getpid()))
    (run_dir / f"pid{{rank}}.part").rename(run_dir / f"pid{{rank}}")
def all_ready():
    while len(list(run_dir.glob("pid*[0-9]"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
"""
RUN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from launcher.local import run_local
run_dir = Path(sys.argv[1])
command = [sys.executable, "-c", (run_dir / "rank.py").read_text(), sys.argv[1]]
sys.exit(run_local([], world_size=3, run_dir=run_dir, threads=1, command=command, stop_seconds=float(sys.argv[2])))
"""


def run(tmp_path, body, *, world_size=3, **options) -> int:
    command = [sys.executable, "-c", PRELUDE + body, str(tmp_path)]
    return run_local([], world_size=world_size, run_dir=tmp_path, threads=1, command=command, **options)


def start(tmp_path, body, *, stop_seconds=10.0) -> subprocess.Popen:
    """A launcher in a process of its own, whose ranks are ready."""
    (tmp_path / "rank.py").write_text(PRELUDE + body)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), str(stop_seconds)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: len(pids(tmp_path)) == 3)
    except BaseException:
        process.kill()
        raise
    return process


def pids(tmp_path) -> list[int]:
    return [int(path.read_text()) for path in sorted(tmp_path.glob("pid*[0-9]"))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def finish(process: subprocess.Popen, seconds=15.0) -> tuple[int, str]:
    try:
        _, message = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process.returncode, message


def test_environment_and_logs(tmp_path, capfd):
    body = """
names = ("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS MKL_NUM_THREADS EXPERTPIPE_LOCAL "
         "OMP_WAIT_POLICY GLOO_SOCKET_IFNAME").split()
assert int(os.environ["MASTER_PORT"]) > 1023
print(*(os.environ[name] for name in names))
"""
    assert run(tmp_path, body, world_size=2) == 0
    assert capfd.readouterr() == ("0 0 2 2 127.0.0.1 1 1 1 PASSIVE lo\n", "")
    assert (tmp_path / "ranks" / "rank1.log").read_text() == "1 1 2 2 127.0.0.1 1 1 1 PASSIVE lo\n"


def test_a_killed_rank_is_named_and_ends_the_run(tmp_path):
    """Its peers fail because of it, one of them at once; neither may be blamed, and one that hangs is stopped."""
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen(["sleep", "60"]) if rank == 2 else None
if helper:
    (run_dir / "helper").write_text(str(helper.pid))
ready()
all_ready()
state = Path(f"/proc/{(run_dir / 'pid2').read_text()}/stat")
while rank != 1 or (state.exists() and ") Z" not in state.read_text()):
    time.sleep(0.005)
raise RuntimeError("connection closed by peer")
"""
    process = start(tmp_path, body)
    victim = pids(tmp_path)[2]
    helper = int((tmp_path / "helper").read_text())
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    code, message = finish(process)
    assert time.monotonic() - begin < 15
    assert code == 1
    first = message.splitlines()[0]
    assert first.startswith(
        f"rank 2 (pid {victim}) was killed by signal 9 (SIGKILL) in step 12, last action: F stage 1 micro-batch 5 ("
    )
    assert first.endswith(" s ago). The other 2 ranks were stopped.")
    assert not any(alive(pid) for pid in [*pids(tmp_path), helper])


def test_the_first_to_fail_is_named_with_the_end_of_its_log(tmp_path, capfd):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "rank1.log").write_text("a line of an earlier run\n")
    body = """
ready(3, "B stage 0 micro-batch 1")
all_ready()
if rank == 1:
    print("the true reason"); sys.exit(7)
os.system(f"while kill -0 {(run_dir / 'pid1').read_text()} 2>/dev/null; do sleep 0.01; done")
sys.exit("connection closed by peer")
"""
    assert run(tmp_path, body) == 1
    message = capfd.readouterr().err
    assert "ended with exit code 7 in step 3, last action: B stage 0 micro-batch 1 (" in message
    assert message.count("rank 1 (pid") == 1
    assert "  the true reason" in message
    assert "earlier run" not in message


def test_a_stale_record_is_not_taken_for_this_run(tmp_path, capfd):
    assert run(tmp_path, "recorder.note(99, 'an old action')", world_size=1) == 0
    assert run_local([], world_size=1, run_dir=tmp_path, threads=1, command=["/nonexistent"]) == 1
    message = capfd.readouterr().err
    assert "cannot start /nonexistent" in message
    assert "before its first recorded action." in message
    assert "an old action" not in message


@pytest.mark.parametrize(("code", "spoken"), [(2, True), (75, False), (130, False)])
def test_special_exit_codes_are_handed_on(tmp_path, capfd, code, spoken):
    assert run(tmp_path, f"sys.exit({code} if rank == 1 else 0)", world_size=2) == code
    assert ("rank 1" in capfd.readouterr().err) is spoken


def test_a_user_error_that_rank_0_has_shown_is_not_repeated(tmp_path, capfd):
    assert run(tmp_path, "sys.exit(2)", world_size=2) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_are_handed_on_and_an_orderly_end_awaited(tmp_path, name):
    body = f"""
def stop(number, frame):
    time.sleep(0.3); (run_dir / f"saved{{rank}}").touch(); sys.exit(75)
signal.signal(signal.{name}, stop)
ready()
time.sleep(60)
"""
    process = start(tmp_path, body)
    process.send_signal(getattr(signal, name))
    assert finish(process) == (75, "")
    assert len(list(tmp_path.glob("saved*"))) == 3


def test_a_signal_nobody_handles_ends_the_run(tmp_path):
    process = start(tmp_path, "ready(); time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (128 + signal.SIGTERM, "stopped by SIGTERM.\n")


def test_the_wait_for_an_orderly_end_is_bounded(tmp_path):
    body = "signal.signal(signal.SIGUSR1, signal.SIG_IGN); ready(); time.sleep(60)"
    process = start(tmp_path, body, stop_seconds=0.2)
    process.send_signal(signal.SIGUSR1)
    code, message = finish(process)
    assert code == 1
    assert "3 of 3 ranks had not ended 0.2 s after" in message
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_second_interrupt_does_not_wait(tmp_path):
    process = start(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); time.sleep(60)", stop_seconds=60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two pending signals of one kind are one
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    process = start(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)")
    ranks = pids(tmp_path)
    assert all(alive(pid) for pid in ranks)
    process.kill()
    wait_until(lambda: not any(alive(pid) for pid in ranks), seconds=5)
    finish(process)


def test_a_death_by_signal_outranks_an_exit_but_an_abort_does_not():
    failed, killed, aborted = (Exit(rank, 100 + rank, code) for rank, code in enumerate((1, -9, -6)))
    assert first_cause([failed, killed]) is killed
    assert first_cause([failed, aborted]) is failed
    assert first_cause([aborted, failed]) is aborted
    assert first_cause([aborted, failed, killed]) is killed


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="world_size=0"):
        run_local([], world_size=0, run_dir=tmp_path, threads=1)
    env = rank_environment(2, world_size=4, port=1234, threads=3)
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_PORT"], env["OMP_NUM_THREADS"]) == ("2", "4", "1234", "3")
