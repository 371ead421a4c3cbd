"""The flight recorder: cheap, whole after any death of the writer, and silent about what is not a recorder."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from launcher.record.recorder import FILE_BYTES, SLOT_BYTES, Recorder, read, recorder_path

ROOT = Path(__file__).parents[3]


def test_the_last_note_is_read_back(tmp_path):
    path = recorder_path(tmp_path, 3)
    recorder = Recorder(path)
    assert read(path) is None
    for micro_batch in range(5):
        recorder.note(12, f"F stage 1 micro-batch {micro_batch}")
    entry = read(path)
    assert entry is not None
    assert (entry.pid, entry.step, entry.action) == (os.getpid(), 12, "F stage 1 micro-batch 4")
    assert 0 <= entry.seconds_since < 5
    assert path.stat().st_size == FILE_BYTES
    recorder.close()


def test_a_new_recorder_forgets_the_old_run(tmp_path):
    first = Recorder(tmp_path / "a")
    first.note(1, "old")
    second = Recorder(tmp_path / "a")
    assert read(tmp_path / "a") is None
    first.close()
    second.close()


def test_long_and_wide_actions_are_cut_not_refused(tmp_path):
    recorder = Recorder(tmp_path / "a")
    for text in ("x" * 1000, "é" * 200, "", "\udcff"):
        recorder.note(-1, text)
        entry = read(tmp_path / "a")
        assert entry is not None
        assert entry.action[:10] == ("?" if text == "\udcff" else text[:10])
        assert entry.step == -1
    recorder.close()


def test_a_torn_write_shows_the_note_before(tmp_path):
    path = tmp_path / "a"
    recorder = Recorder(path)
    recorder.note(1, "first")
    recorder.note(2, "second")
    recorder.close()
    whole = bytearray(path.read_bytes())
    newest = next(start for start in (0, SLOT_BYTES) if b"second" in whole[start : start + SLOT_BYTES])
    for offset in range(newest, newest + 40, 3):
        torn = bytearray(whole)
        torn[offset] ^= 0x41
        path.write_bytes(torn)
        entry = read(path)
        assert entry is not None
        assert entry.action == "first"


def test_what_is_not_a_recorder_reads_as_nothing(tmp_path):
    assert read(tmp_path / "missing") is None
    assert read(tmp_path) is None
    rng = random.Random(0)
    for size in (0, 1, 100, FILE_BYTES, 3 * FILE_BYTES):
        (tmp_path / "garbage").write_bytes(rng.randbytes(size))
        assert read(tmp_path / "garbage") is None


def test_the_note_outlives_sigkill(tmp_path):
    program = (
        "import sys, time; from launcher.record.recorder import Recorder; r = Recorder(sys.argv[1])\n"
        "r.note(7, 'W stage 2'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a")], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    entry = read(tmp_path / "a")
    assert entry is not None
    assert (entry.pid, entry.step, entry.action) == (process.pid, 7, "W stage 2")


def test_a_note_costs_microseconds(tmp_path):
    recorder = Recorder(tmp_path / "a")
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(1000):
            recorder.note(3, "F stage 1 micro-batch 5")
        best = min(best, (time.perf_counter() - begin) / 1000)
    recorder.close()
    assert best < 30e-6
