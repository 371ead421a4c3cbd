"""Every fault that a run must survive, injected into real runs; conftest.py prints what was expected and seen.

After each fault the run is started again without it, and must end with the same losses and the same bytes in its last
checkpoint as a run that nothing happened to.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launcher.checkpoint.files import checkpoints_in
from launcher.checkpoint.reader import verify
from launcher.config import RunConfig, to_dict
from launcher.local import free_port
from launcher.record.recorder import read, recorder_path
from tests.launcher.checkpoint.damage import crafted_pickle, edit
from tests.launcher.checkpoint.states import prepared
from tests.launcher.live import RANK, ROOT, Ended, Live, live_config, losses, run, shards
from tests.launcher.safety.conftest import Tell

pytestmark = pytest.mark.exhaustive

STEPS = 5
NUM_KILLS = int(os.environ.get("EXPERTPIPE_KILLS", "20"))
DEAD_RANK_SECONDS = 15.0


@dataclass(frozen=True)
class Straight:
    """A run that nothing happened to."""

    config: RunConfig
    losses: dict[int, float]
    last: dict[str, bytes]

    def again(self, folder: Path, **train: object) -> RunConfig:
        """The same run in another folder."""
        chosen = {"keep_checkpoints": 3, **train}
        return replace(self.config, run_dir=str(folder), train=replace(self.config.train, **chosen))  # type: ignore


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    config = live_config(folder / "run", prepared(folder / "data"), steps=STEPS, keep_checkpoints=9)
    ended = run(config)
    assert ended.code == 0, ended.output
    return Straight(config, losses(folder / "run"), shards(folder / "run" / "checkpoints" / f"step-{STEPS:08d}"))


def assert_resumes_bitwise(straight: Straight, config: RunConfig) -> Ended:
    """Start again without the fault; the end is the straight run's, to the last bit."""
    ended = run(config)
    assert ended.code == 0, ended.output
    root = Path(config.run_dir) / "checkpoints"
    assert losses(root.parent) == straight.losses
    assert shards(root / f"step-{STEPS:08d}") == straight.last
    assert not list(root.glob(".tmp-*"))
    return ended


def committed(config: RunConfig) -> list[Path]:
    """Checkpoints that are there, each of which must be whole."""
    found = [item.path for item in checkpoints_in(Path(config.run_dir) / "checkpoints")]
    for path in found:
        verify(path)
    return found


PLACES = {"write": 12, "fsync": 10, "commit": 3, "rename": 3, "latest": 3, "verify": 4, "delete": 2}


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_sigkill_anywhere(straight: Straight, tmp_path: Path, tell: Tell, seed: int) -> None:
    """At random points of step and save; what was committed stays whole, and the run goes on as if nothing had been."""
    draw = random.Random(seed)
    config = straight.again(tmp_path / "run", keep_checkpoints=2, checkpoint_async=draw.random() < 0.5)
    rank = draw.randrange(2)
    if seed % 3 == 0:
        fault = f"kill:{rank},{draw.uniform(0, 1.5):.2f}"
    else:
        where = draw.choice(sorted(PLACES))
        rank = 0 if where in ("commit", "rename", "latest", "delete") else rank
        fault = f"kill_at:{rank},{where},{draw.randint(1, PLACES[where])}"
    ended = run(config, fault)
    kept = committed(config)
    if ended.code != 0:  # else the run was over before
        assert ended.code == 1 and f"rank {rank} (pid " in ended.output and "SIGKILL" in ended.output, ended.output
        assert ended.at - float((tmp_path / "run" / "killed").read_text()) <= DEAD_RANK_SECONDS
    assert_resumes_bitwise(straight, config)
    newest = kept[0].name if kept else "none"
    tell(f"SIGKILL {fault}", "rank named, resume bitwise", f"exit {ended.code}, newest {newest}, bitwise")


def test_a_dead_rank_under_torchrun(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    """Nobody of ours watches the processes there: the survivor itself must say who is gone, and leave."""
    config = straight.again(tmp_path / "run", steps=100_000, checkpoint_every=0)
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "run.json").write_text(json.dumps(to_dict(config)))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
         str(tmp_path / "rank.py"), str(tmp_path / "run.json")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        entry = None
        while (entry is None or entry.step < 2) and time.monotonic() < deadline:
            time.sleep(0.1)
            entry = read(recorder_path(tmp_path / "run", 1))
        assert process.poll() is None and entry is not None and entry.step >= 2
        os.kill(entry.pid, signal.SIGKILL)
        began = time.monotonic()
        output, _ = process.communicate(timeout=90)
        seconds = time.monotonic() - began
    finally:
        process.kill()
        process.communicate()
    assert f"rank 1 (pid {entry.pid} on {os.uname().nodename}) is dead, in step " in output, output[-3000:]
    assert seconds <= DEAD_RANK_SECONDS and process.returncode != 0
    tell("SIGKILL under torchrun", "survivor names rank and action, <= 15 s", f"{seconds:.1f} s")


def at(name: str, change: Callable[[bytearray], None]) -> Callable[[Path], str]:
    """Damage of one shard's bytes; gives what must be named."""

    def damage(folder: Path) -> str:
        file = folder / name
        data = bytearray(file.read_bytes())
        change(data)
        file.write_bytes(data)
        return name

    return damage


def truncate(data: bytearray) -> None:
    del data[-100:]


def flip(data: bytearray) -> None:
    data[len(data) * 2 // 3] ^= 16


def zeros(data: bytearray) -> None:
    data[4096:12288] = bytes(8192)


def delete(folder: Path) -> str:
    (folder / "rank-00001.safetensors").unlink()
    return "rank-00001.safetensors"


def older_shards(folder: Path) -> str:
    older = folder.with_name(f"step-{STEPS - 2:08d}")
    shutil.copyfile(older / "rank-00000.safetensors", folder / "rank-00000.safetensors")
    return "it says that it is of step"


def older_manifest(folder: Path) -> str:
    """Whole in itself, beside shards of the newer step."""
    shutil.copyfile(folder.with_name(f"step-{STEPS - 2:08d}") / "manifest.json", folder / "manifest.json")
    return f"is of step {STEPS - 2}, its name of step {STEPS - 1}"


def another_step_under_its_name(folder: Path) -> str:
    """Every file whole, and of the step before."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(f"step-{STEPS - 2:08d}"), folder)
    return f"is of step {STEPS - 2}, its name of step {STEPS - 1}"


def pickle_inside(folder: Path) -> str:
    (folder / "extra.pt").write_bytes(crafted_pickle(folder.parent.parent / "canary"))
    edit(folder, lambda manifest: manifest["files"].update({"extra.pt": {"bytes": 1, "xxh3_128": ""}}))
    return "looks like a pickle"


def parent_name(folder: Path) -> str:
    edit(folder, lambda manifest: manifest["files"].update({"../latest": {"bytes": 1, "xxh3_128": ""}}))
    return "not a file in its own folder"


def link_out(folder: Path) -> str:
    file = folder / "rank-00001.safetensors"
    shutil.move(file, folder.parent.parent / "outside")
    file.symlink_to(folder.parent.parent / "outside")
    return "not a file in its own folder"


DAMAGES = {
    "truncated shard": at("rank-00000.safetensors", truncate),
    "bit flipped in a shard": at("rank-00001.safetensors", flip),
    "zeros inside a shard": at("rank-00000.safetensors", zeros),
    "bit flipped in the manifest": at("manifest.json", flip),
    "deleted shard": delete,
    "shard of another step": older_shards,
    "manifest of another step": older_manifest,
    "older checkpoint under a newer name": another_step_under_its_name,
    "crafted pickle": pickle_inside,
    "'..' in a name": parent_name,
    "symlink out of the folder": link_out,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_passed_over_aloud(straight: Straight, tmp_path: Path, tell: Tell, name: str) -> None:
    config = straight.again(tmp_path / "run")
    shutil.copytree(straight.config.run_dir, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    broken = root / f"step-{STEPS - 1:08d}"  # the newest: the run had one more step to do
    shutil.rmtree(root / f"step-{STEPS:08d}")
    said = DAMAGES[name](broken)
    ended = assert_resumes_bitwise(straight, config)
    assert f"{broken.name} is passed over: " in ended.output and said in ended.output, ended.output
    assert "now aside-" in ended.output and (root / f"aside-{broken.name}-1").is_dir()  # never deleted
    assert not (tmp_path / "run" / "canary").exists()
    tell(name, "named, passed over, not deleted", "as expected, bitwise")


def test_nan_gradient_on_one_rank(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    config = straight.again(tmp_path / "run")
    name = "layers.1.self_attn.o_proj.weight"
    ended = run(config, f"nan_gradient:1,3,{name}")
    assert ended.code == 1
    assert f"step 3: loss {straight.losses[3]}, gradient norm nan; nothing was updated. rank 1: first" in ended.output
    assert f"non-finite gradient {name}" in ended.output and "rank 0: first" not in ended.output
    assert committed(config)[0].name == "step-00000002"
    assert_resumes_bitwise(straight, config)
    tell("NaN gradient on one rank", "rank, step, parameter; no update", "as expected, bitwise")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite(straight: Straight, tmp_path: Path, tell: Tell, value: str) -> None:
    config = straight.again(tmp_path / "run")
    ended = run(config, f"bad_loss:3,{value}")
    assert ended.code == 1
    assert f"step 3: loss {value}, gradient norm " in ended.output and "nothing was updated" in ended.output
    assert committed(config)[0].name == "step-00000002"
    assert_resumes_bitwise(straight, config)
    tell(f"loss {value}", "step, exit 1, no update", "as expected, bitwise")


def test_configurations_that_differ(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    ended = run(straight.again(tmp_path / "run"), "other_seed:1")
    assert ended.code == 2
    assert "rank 1 was started differently: train.seed=1 (rank 0: 0)" in ended.output
    tell("another seed on one rank", "rank and key, exit 2, before building", "as expected")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_asks_for_a_restart(
    straight: Straight, tmp_path: Path, tell: Tell, signum: signal.Signals
) -> None:
    config = straight.again(tmp_path / "run")
    live = Live(config)
    live.until(lambda: (tmp_path / "run" / "checkpoints" / "step-00000001").exists())
    os.kill(live.process.pid, signum)
    ended = live.wait()
    assert ended.code in (75, 0), ended.output
    if ended.code == 75:
        assert f"by {signum.name}; start again to go on" in ended.output
    newest = committed(config)[0].name
    assert_resumes_bitwise(straight, config)
    tell(f"{signum.name} to the launcher", "agreed step saved, exit 75", f"exit {ended.code}, {newest}")


@pytest.mark.parametrize("fault", ["stop:1,3", "stuck:0,3"])
def test_a_rank_that_hangs_is_named(straight: Straight, tmp_path: Path, tell: Tell, fault: str) -> None:
    config = straight.again(tmp_path / "run", silent_rank_seconds=8, stuck_seconds=10)
    ended = run(config, fault, seconds=100)
    assert ended.code == 75, ended.output
    rank = int(fault[fault.index(":") + 1])
    what = "has given no sign of life" if fault.startswith("stop") else "is alive but stands still at faults.py:"
    assert f"rank {rank} (pid" in ended.output and what in ended.output, ended.output
    assert "micro-batch" in ended.output or "checkpoint" in ended.output or "action" in ended.output
    stacks = [(tmp_path / "run" / "ranks" / f"rank{k}.stacks").read_text() for k in range(2)]
    assert all("most recent call first" in text for text in stacks)
    assert_resumes_bitwise(straight, config)
    tell(f"hung rank ({fault})", "named, stacks of all, exit 75", f"in {ended.seconds:.0f} s, bitwise")


def test_a_save_that_fails_on_one_rank_ends_all(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    config = straight.again(tmp_path / "run")
    ended = run(config, "no_space:1,3")
    assert ended.code == 1
    assert "rank 1: " in ended.output and "rank-00001.safetensors: No space left on device (" in ended.output
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    assert committed(config)[0].name == "step-00000002"
    assert_resumes_bitwise(straight, config)
    tell("write error on one rank", "rank and file on all ranks, nothing left", "as expected, bitwise")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which needs root")
def test_a_full_disk(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    """A file system of twice and a half the size of a checkpoint: the third does not fit."""
    size = sum(map(len, straight.last.values()))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size) + 200_000}", "tmpfs", str(disk)], check=True)
    try:
        config = straight.again(disk / "run", keep_checkpoints=9)
        ended = run(config)
        assert ended.code == 1 and "No space left on device" in ended.output, ended.output
        kept = committed(config)
        assert kept and not list((disk / "run" / "checkpoints").glob(".tmp-*"))
        larger = f"remount,size={20 * size}"
        subprocess.run(["mount", "-o", larger, str(disk)], check=True)
        assert_resumes_bitwise(straight, config)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    tell("disk full in mid-save", "told, half a save removed", f"newest {kept[0].name}, bitwise")


def test_a_second_job_in_the_folder(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    config = straight.again(tmp_path / "run")
    live = Live(config, "stop:1,3")  # holds on to the lock for long enough
    live.until((tmp_path / "run" / "lock.json").exists)
    second = run(straight.again(tmp_path / "run"))
    assert second.code == 1 and "is working in this folder" in second.output, second.output
    live.process.kill()
    live.process.communicate()
    assert_resumes_bitwise(straight, config)
    tell("second job in one folder", "refused, first one named", "as expected, bitwise")


def test_a_run_whose_folder_is_taken_over_ends(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    """As after its node was silent for a while, and its job was started elsewhere."""
    config = straight.again(tmp_path / "run", steps=100_000, checkpoint_every=0)
    lock, events = tmp_path / "run" / "lock.json", tmp_path / "run" / "events.jsonl"
    live = Live(config)
    live.until(lambda: events.exists() and len(losses(tmp_path / "run")) >= 2)
    (tmp_path / "new").write_text(json.dumps({"token": "other", "host": "elsewhere", "pid": 12}))
    (tmp_path / "new").replace(lock)
    ended = live.wait(60)
    assert ended.code == 1 and "now belongs to process 12 on elsewhere" in ended.output, ended.output
    assert json.loads(lock.read_text())["token"] == "other"
    assert "now belongs to process 12" in (tmp_path / "run" / "faults.jsonl").read_text()
    tell("folder taken over by another job", "told, kept, the run ends", f"after step {max(losses(lock.parent))}")


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback"])
def test_spikes(tmp_path: Path, straight: Straight, tell: Tell, policy: str) -> None:
    config = straight.again(
        tmp_path / "run", steps=13, spike_policy=policy, spike_window=8, checkpoint_every=5, keep_checkpoints=9
    )
    ended = run(config, "spike:20")  # the eleventh step
    assert ended.code == 0, ended.output
    assert "spike in step 11: gradient norm" in ended.output
    done = losses(tmp_path / "run")
    assert sorted(done) == list(range(1, 14))
    if policy == "rollback":
        assert "went back to step-00000010; 2 samples are left out" in ended.output
    tell(f"gradient spike, policy {policy}", "told, the policy followed", "as expected")


def test_a_loss_spike_is_skipped(tmp_path: Path, straight: Straight, tell: Tell) -> None:
    config = straight.again(tmp_path / "run", steps=10, spike_policy="skip", spike_window=8, checkpoint_every=0)
    ended = run(config, "loss_spike:10")
    assert ended.code == 0 and "spike in step 10: loss " in ended.output and "batch skipped" in ended.output
    assert losses(tmp_path / "run")[10] > losses(tmp_path / "run")[9] + 3
    tell("loss spike, policy skip", "told, the policy followed", "as expected")


def test_the_data_are_used_up(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    config = straight.again(tmp_path / "run", steps=10_000, max_epochs=1, checkpoint_every=0)
    ended = run(config)
    assert ended.code == 0 and "the data is used up after step" in ended.output, ended.output
    (newest,) = committed(config)
    assert int(newest.name[5:]) == max(losses(tmp_path / "run"))
    tell("data exhausted", "saved, exit 0", f"{newest.name}, exit 0")


def test_secrets_stay_out_of_every_file(straight: Straight, tmp_path: Path, tell: Tell) -> None:
    secret = "k3y-that-nobody-may-see"
    config = straight.again(tmp_path / "run", silent_rank_seconds=8)
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    ended = run(config, "stop:1,4", env=dict.fromkeys(names, secret))
    assert ended.code == 75 and secret not in ended.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if secret.encode() in path.read_bytes()]
    tell("secrets in the environment", "in no log, config, checkpoint, stack", f"{len(files)} files")
