"""What is looked up without torch is what torch would say."""

from pathlib import Path

import pytest
import torch

from launcher.check.machine import can_compile, gpu_capabilities, torch_cuda


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


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("echo 9.0; echo 9.0", ("9.0", "9.0")),
        ("echo 'No devices were found'; exit 6", ()),
        ("echo '[N/A]'", ()),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", ()),
    ],
)
def test_capabilities_by_the_drivers_tool(
    said: str, found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{said}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_capabilities() == found


def test_no_tool_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_capabilities() == ()
