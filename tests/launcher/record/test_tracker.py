"""wandb: the real package, offline; what it wrote is read back. No key is written, no failure ends a run."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.check.record import check_wandb
from launcher.config import RunConfig
from launcher.record.events import StepEvent
from launcher.record.tracker import Tracker, step_metrics
from tests.launcher.record.test_events import event
from tests.launcher.spine import config

KEY = "0123456789abcdef" * 2 + "deadbeef"
MODEL_BLOCKS = [1, 2, 3, 4, 5, 6]  # of the spine's model: MoE layers and the MTP module


def run_config(folder: Path, mode: str = "offline") -> RunConfig:
    found = config("unused", pipeline=1, expert=1, data=1, schedule="1f1b", run_dir=str(folder))
    return replace(found, train=replace(found.train, wandb=mode))


def full_event(step: int) -> StepEvent:
    rows = (("layers.1.mlp", "weight", 3.0, 0.0, 0.1, 0.02), ("layers.2.mlp", "weight", 5.0, 0.5, 0.0, 0.04))
    return event(
        step, expert_load=(1.31, 1.2, 1.0, 1.1, 1.2, 1.3), grad_norms={"head": 0.25}, fp8=rows, mfu_causal=0.4,
        mfu_full=0.5, dead_experts=((1, 3),),
    )  # fmt: skip


def transactions(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def written(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History rows and configuration that wandb has on disk, through its own protobuf."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows, configured = [], {}
    for data in transactions(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
        if record.WhichOneof("record_type") == "run":
            configured |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return rows, configured


# In a process of its own: wandb keeps a service and threads behind it.
SCRIPT = """
import pickle, sys
from launcher.record.tracker import Tracker
config, events = pickle.load(open(sys.argv[1], "rb"))
tracker = Tracker(config, {"device": "CPU"}, say=lambda text: print("SAID", text))
exec(sys.argv[2])
for event in events:
    tracker.step(event)
tracker.close(0)
print("THE RUN GOES ON")
"""


def run_script(folder: Path, meanwhile: str = "", mode: str = "offline") -> str:
    import pickle

    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / "arguments.pickle"
    path.write_bytes(pickle.dumps((run_config(folder, mode), [full_event(step) for step in (1, 2, 3)])))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), meanwhile], capture_output=True, text=True, timeout=150,
        env=os.environ | {"WANDB_API_KEY": KEY, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert done.returncode == 0 and "THE RUN GOES ON" in done.stdout, done.stdout + done.stderr
    return done.stdout


def test_offline_writes_every_step_and_no_key(tmp_path: Path) -> None:
    said = run_script(tmp_path / "run")
    assert "SAID" not in said
    rows, configured = written(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    expected = step_metrics(full_event(2), MODEL_BLOCKS)
    assert {name: rows[1][name] for name in expected} == expected
    assert rows[1]["fp8/weight/relative_error"] == 0.04  # the worst layer
    assert rows[1]["expert_load/block6"] == 1.3
    assert configured["run"]["optim"]["clip_norm"] == 0.5
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), f"the API key is in {path}"


def test_a_broken_wandb_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    broken = "def fail(*a, **k): raise OSError('no space')\ntracker._run.log = fail"
    said = run_script(tmp_path / "run", broken)
    assert said.count("SAID") == 1
    assert "wandb is off from here on, it could not log: OSError: no space" in said


@pytest.mark.slow
def test_a_killed_service_does_not_end_the_run(tmp_path: Path) -> None:
    kill = (
        "import os, signal, time\n"
        "mine = str(os.getpid())\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try:\n"
        "        fields = open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()\n"
        "        if fields[1] == mine: os.kill(int(pid), signal.SIGKILL)\n"
        "    except OSError: pass\n"
        "time.sleep(1)\n"
    )
    assert "wandb is off from here on" in run_script(tmp_path / "run", kill)


def test_off_touches_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(run_config(tmp_path / "run", "off"), {}, say=said.append)
    tracker.step(full_event(1))
    tracker.close(0)
    assert not said and not (tmp_path / "run").exists()


def test_the_check_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert check_wandb(run_config(tmp_path, "off")) == check_wandb(run_config(tmp_path, "offline")) == []
    (message,) = check_wandb(run_config(tmp_path, "online"))
    assert message.startswith("train.wandb=online: no API key; set WANDB_API_KEY")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert check_wandb(run_config(tmp_path, "online")) == []
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert check_wandb(run_config(tmp_path, "online")) == []
