"""The demonstration from nothing, and again: it resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.demo import demo as command
from launcher.commands.demo import run_of
from launcher.config import compose

KEYS = {
    "steps", "tokens", "loss_first", "loss_last", "heldout_bits_per_byte", "unigram_bits_per_byte", "xz_bits_per_byte",
    "world_size", "schedule", "layout", "tokens_per_second", "checkpoint",
}  # fmt: skip


def demo(folder: Path, steps: int) -> tuple[str, dict[str, object]]:
    command = [sys.executable, "-m", "launcher", "demo", f"train.steps={steps}", "train.global_batch_size=16"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((folder / "runs/demo/summary.json").read_text())


def prefix_of(*arguments: str) -> str:
    return compose(list(arguments)).data.prefix


def test_no_two_vocabularies_share_a_folder() -> None:
    assert prefix_of(*run_of("stdlib", [])) == prefix_of("experiment=tiny") == "runs/data/stdlib/train"
    assert prefix_of("experiment=demo") == "runs/data/full/train"  # of 16,384 tokens
    assert prefix_of(*run_of("full", [])) == "runs/data/full-4096/train"
    assert prefix_of(*run_of("stdlib", ["model.vocab_size=8192"])) == "runs/data/stdlib-8192/train"
    assert prefix_of(*run_of("full", ["data.prefix=mine/train"])) == "mine/train"


@pytest.mark.parametrize(("corpus", "given", "size"), [("full", [], 4096), ("stdlib", ["model.vocab_size=512"], 512)])
def test_what_is_prepared_is_what_is_trained_on(
    corpus: str, given: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("data.prepare.prepare", lambda **arguments: seen.update(arguments))
    monkeypatch.setattr("launcher.start.start", lambda overrides: seen.update(run=compose(overrides)) or 7)
    assert command(["--corpus", corpus, *given]) == 7
    assert (seen["corpus"], seen["vocab_size"]) == (corpus, size)
    assert Path(seen["run"].data.prefix).parent == seen["out_dir"]
    assert seen["run"].model.vocab_size == size


@pytest.mark.slow
def test_demo_trains_reports_and_resumes(tmp_path: Path) -> None:
    """Few steps: what is held is that all of it is there and learning has begun, not how far it went."""
    _, first = demo(tmp_path, 6)
    assert first.keys() >= KEYS
    assert (first["steps"], first["world_size"], first["schedule"]) == (6, 4, "dualpipe")
    assert first["tokens"] == 6 * 16 * 256
    assert float(str(first["loss_last"])) < float(str(first["loss_first"])) < 9
    assert 0 < float(str(first["xz_bits_per_byte"])) < float(str(first["unigram_bits_per_byte"])) < 8
    for picture in ("loss.png", "schedule.png", "report.html"):
        assert (tmp_path / "runs/demo" / picture).stat().st_size > 10_000
    printed, second = demo(tmp_path, 8)
    assert "resumed after step 6" in printed
    assert (second["steps"], second["loss_first"]) == (8, first["loss_first"])
