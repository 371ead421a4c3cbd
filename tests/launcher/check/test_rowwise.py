"""train.rowwise and what else is compiled: each kind where it can be, refused in a line elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.check import rowwise
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


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither g++ nor anything built earlier; the folder where builds are kept."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "expertpipe"


def test_a_missing_compiler_is_named(no_compiler: Path) -> None:
    (message,) = check_compiler(run("native"))
    assert "g++" in message and "train.rowwise=torch" in message
    assert check_compiler(run("torch")) == []


@pytest.mark.parametrize(
    "overrides",
    ["train.precision=fp8", "train.precision=fp8 fp8.backend=oracle_exact", "parallel.dispatch_wire=fp8",
     "parallel.dispatch_grad_wire=fp8 train.precision=bf16"],
)  # fmt: skip
def test_quantisers_need_the_compiler_on_a_cpu(overrides: str, no_compiler: Path) -> None:
    def found(*more: str) -> list[str]:
        return check_compiler(compose(["experiment=tiny", "train.device=cpu", *overrides.split(), *more]))

    assert found() == ["fp8.native=true needs g++, which is not on PATH: install it, or use fp8.native=false"]
    assert found("fp8.native=false") == found("train.device=cuda") == []
    no_compiler.mkdir(parents=True)
    (no_compiler / "rowwise-0123.so").touch()
    assert found()
    (no_compiler / "fp8-0123.so").touch()
    assert found() == []  # kept from a machine with a compiler


def test_quantisers_on_whatever_device_there_is(no_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["experiment=tiny", "train.device=auto", "train.precision=fp8"])
    monkeypatch.setattr(rowwise, "torch_cuda", lambda: None)
    assert len(check_compiler(config)) == 1
    monkeypatch.setattr(rowwise, "torch_cuda", lambda: "12.9")  # a GPU, as far as can be told
    assert check_compiler(config) == []


def test_nothing_is_compiled_for_bf16_or_transformer_engine(no_compiler: Path) -> None:
    engine = ["train.precision=fp8", "fp8.backend=transformer_engine"]
    for overrides in (["train.precision=bf16"], engine):
        assert not [line for line in check_compiler(compose(["experiment=tiny", *overrides])) if "fp8.native" in line]


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
