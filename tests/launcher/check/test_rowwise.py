"""train.rowwise: each kind where it can be, refused in a line elsewhere."""

from dataclasses import replace

import pytest

from launcher.check.rowwise import WEIGHT_GRAD, check_compiler, check_rowwise
from launcher.config import RunConfig, compose
from model import backends


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


def with_package(key: str, name: str, device: str) -> RunConfig:
    config = run("torch", device)
    return replace(config, train=replace(config.train, **{key: name}))


@pytest.mark.parametrize("key", ["rowwise", "weight_grad"])
@pytest.mark.parametrize("name", WEIGHT_GRAD[1:])
def test_the_packages_are_for_a_gpu(key: str, name: str) -> None:
    (message,) = check_rowwise(with_package(key, name, "cpu"))
    assert message == f"train.{key}={name} needs a GPU, but train.device=cpu: use train.{key}=torch"
    assert check_rowwise(with_package(key, name, "cuda")) == check_rowwise(with_package(key, name, "auto")) == []


@pytest.mark.parametrize("key", ["rowwise", "weight_grad"])
@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        ("transformer_engine", None, "Transformer Engine is not installed (2.20 or newer, below 2.21 is needed)"),
        ("transformer_engine", "1.13", "Transformer Engine 1.13 is installed, 2.20 or newer, below 2.21 is needed"),
        ("transformer_engine", "2.20.2", None),
        ("apex", None, "needs NVIDIA's apex, built from source, and it is not installed"),
        ("apex", "0.9.10", "the apex 0.9.10 installed here is another project"),
    ],
)
def test_missing_packages(
    monkeypatch: pytest.MonkeyPatch, key: str, name: str, found: str | None, words: str | None
) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: found)
    lines = check_compiler(with_package(key, name, "cuda"))
    assert len(lines) == (words is not None)
    assert all(str(words) in line and line.endswith(f": use train.{key}=torch") for line in lines)
