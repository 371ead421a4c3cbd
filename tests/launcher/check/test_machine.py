"""What is looked up without torch is what torch would say."""

from pathlib import Path

import pytest
import torch

from launcher.check.machine import can_compile, torch_cuda


def test_the_cuda_of_torch_is_read_without_it() -> None:
    assert torch_cuda() == torch.version.cuda


def test_the_compiler_or_what_it_built_earlier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not can_compile("fp8")
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    assert can_compile("fp8")
    compiler.unlink()
    kept = tmp_path / ".cache" / "expertpipe"
    kept.mkdir(parents=True)
    (kept / "fp8-0123.so").touch()
    assert can_compile("fp8") and not can_compile("rowwise")
