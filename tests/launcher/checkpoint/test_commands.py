"""list, show, verify, prune: the whole stays, the damaged is named, nothing goes before its successor is read."""

import shutil
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.checkpoint.commands import human_bytes
from launcher.safety.run_lock import RunLock
from tests.launcher.checkpoint.damage import edit
from tests.launcher.checkpoint.states import write_checkpoint
from tests.model.reference import TINY, build


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(build(TINY), tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Steps 1 to 6 of a run, a save that was cut off, and one set aside."""
    root = tmp_path / "checkpoints"
    for step in range(1, 7):
        folder = root / f"step-{step:08d}"
        shutil.copytree(made, folder)
        edit(folder, lambda manifest, step=step: manifest["progress"].update(step=step))
    shutil.copytree(made, root / ".tmp-step-00000007")
    shutil.copytree(made, root / "aside-step-00000003-1")
    (root / "latest").write_text("step-00000006\n")
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def damage(run: Path, step: int) -> None:
    file = run / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def test_list_tells_what_lies_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{")
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("step-00000006") and lines[0].endswith("pipeline 1 x data 1, expert 1  <- latest")
    assert "step-00000002  damaged: " in lines[4]
    assert lines[6].startswith(".tmp-step-00000007") and "never loaded" in lines[6] and "aside-" in lines[7]


def test_show_says_what_the_manifest_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "optimizer steps   none" in shown and "torch 2." in shown
    assert "rank-00000.safetensors" in shown and "config.json" in shown


def test_verify_reads_every_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole, ") == 6
    damage(run, 4)
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "step-00000004: DAMAGED, " in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(run / "checkpoints" / "step-00000005")]) == 0


def test_prune_keeps_the_newest_and_every_nth(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    assert main(["checkpoint", "prune", str(run), "--keep-every", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would delete") == 3 and names(run) == before
    assert main(["checkpoint", "prune", str(run), "--keep-every", "2"]) == 0
    assert names(run) == [
        "aside-step-00000003-1", "latest", "step-00000002", "step-00000004", "step-00000005", "step-00000006",
    ]  # fmt: skip
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints"]  # the lock is gone


def test_prune_deletes_nothing_while_a_newer_one_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    damage(run, 5)
    assert main(["checkpoint", "prune", str(run)]) == 2
    assert "step-00000005" in capsys.readouterr().err and names(run) == before


def test_prune_leaves_a_running_job_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    lock = RunLock(run, beat_seconds=0.1)
    lock.acquire()
    assert main(["checkpoint", "prune", str(run)]) == 2
    lock.release()
    assert "is working in this folder" in capsys.readouterr().err and names(run) == before


def test_mistakes_are_one_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(tmp_path / "nowhere")]) == 2
    assert "no checkpoints here" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 2
    assert "--keep=1: keep 2 or more" in capsys.readouterr().err


def test_sizes_in_words() -> None:
    words = [human_bytes(x) for x in (12, 3_400, 5e6, 688_574_839_360, 9.4e12, 2e15)]
    assert words == ["12 B", "3.4 kB", "5.0 MB", "688.6 GB", "9.4 TB", "2000.0 TB"]
