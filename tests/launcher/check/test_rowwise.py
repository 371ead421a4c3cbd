"""train.rowwise=native: not with a GPU, not without a compiler."""

from dataclasses import replace

import pytest

from launcher.check.rowwise import check_compiler, check_rowwise
from launcher.config import RunConfig, compose


def run(rowwise: str, device: str = "cpu") -> RunConfig:
    config = compose(["experiment=tiny"])
    return replace(config, train=replace(config.train, rowwise=rowwise, device=device))


def test_native_is_for_a_cpu() -> None:
    (message,) = check_rowwise(run("native", "cuda"))
    assert "train.rowwise=native" in message and "use train.rowwise=torch" in message
    assert check_rowwise(run("native")) == check_rowwise(run("torch", "cuda")) == []


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (message,) = check_compiler(run("native"))
    assert "g++" in message and "train.rowwise=torch" in message
    assert check_compiler(run("torch")) == []
