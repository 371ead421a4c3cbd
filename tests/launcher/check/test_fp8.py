"""FP8 that cannot be is refused in lines that name key, value and what would work; there is no quiet BF16."""

from dataclasses import replace
from typing import Any

import pytest

from launcher.check import fp8 as check_fp8
from launcher.check.run import problems
from launcher.config import RunConfig, compose
from model import backends


def run(*overrides: str) -> RunConfig:
    return compose(["experiment=tiny", "train.precision=fp8", *overrides])


def found(config: RunConfig) -> list[str]:
    return [line for line in problems(config, None, with_data=False) if "fp8" in line]


def test_the_oracle_runs_anywhere() -> None:
    assert not found(run()) and not found(run("fp8.backend=oracle_exact", "fp8.scales=fp32"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("backend", "deepgemm"), ("grouped", "deepgemm"), ("scales", "ue8m0"), ("input_cache", "e5m6"),
     ("attention_cache", "bf16"), ("gradient_amax_floor", "-1"), ("watch_every", "-1")],
)  # fmt: skip
def test_unknown_words(key: str, value: str) -> None:
    (line,) = found(run(f"fp8.{key}={value}"))
    assert line.startswith(f"fp8.{key}={value}: use ")


GOOD = {"backend": "transformer_engine", "input_cache": "wide", "attention_cache": "wide", "recompute_swiglu": False}


def engine(monkeypatch: Any, installed: str | None, **keys: Any) -> list[str]:
    def version(name: str) -> str:
        if installed is None:
            raise check_fp8.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(check_fp8, "version", version)
    base = run()
    train = replace(base.train, device=keys.pop("device", "cuda"))
    return check_fp8.check_transformer_engine(replace(base, train=train, fp8=replace(base.fp8, **GOOD | keys)))


def test_transformer_engine_in_the_right_version_is_taken(monkeypatch: Any) -> None:
    assert engine(monkeypatch, "2.20.2") == []


@pytest.mark.parametrize(
    ("installed", "keys", "words"),
    [
        (None, {}, "Transformer Engine is not installed (2.20 or newer, below 2.21 is needed)"),
        ("1.13.0", {}, "Transformer Engine 1.13.0 is installed, 2.20 or newer"),
        ("2.21.0+abc", {}, "Transformer Engine 2.21.0+abc is installed"),
        ("2.20.2", {"device": "cpu"}, "train.device=cpu"),
        ("2.20.2", {"attention_cache": "e5m6"}, "fp8.attention_cache=e5m6: use fp8.attention_cache=wide"),
        ("2.20.2", {"recompute_swiglu": True}, "fp8.recompute_swiglu=true: use fp8.recompute_swiglu=false"),
        ("2.20.2", {"gradient_amax_floor": 1e-4}, "fp8.gradient_amax_floor=0.0001: use fp8.gradient_amax_floor=0"),
        ("2.20.2", {"watch_every": 10}, " has no fp8.watch_every=10: use fp8.watch_every=0"),
        ("2.20.2", {"weights_per_step": False}, " has no fp8.weights_per_step=false: use fp8.weights_per_step=true"),
    ],
)
def test_what_transformer_engine_cannot(monkeypatch: Any, installed: str | None, keys: Any, words: str) -> None:
    (line,) = engine(monkeypatch, installed, **keys)
    assert words in line and "\n" not in line


def test_sizes_are_refused_by_name(monkeypatch: Any) -> None:
    monkeypatch.setattr(check_fp8, "version", lambda name: "2.20.2")
    base = run("model.kv_lora_rank=100", "train.device=cuda")
    lines = check_fp8.check_transformer_engine(replace(base, fp8=replace(base.fp8, **GOOD)))
    assert any("kv_a_proj_with_mqa" in line and "multiples of 16" in line for line in lines)


DEEP_GEMM = {"grouped": "deep_gemm", "recompute_swiglu": False}
WIDTHS = ("model.hidden_size=256", "model.moe_intermediate_size=128")


def grouped(monkeypatch: Any, installed: str | None, *widths: str, device: str = "cuda", **keys: Any) -> list[str]:
    monkeypatch.setattr(backends, "installed", lambda package: installed)
    base = run(*widths)
    train = replace(base.train, device=device)
    return check_fp8.check_deep_gemm(replace(base, train=train, fp8=replace(base.fp8, **DEEP_GEMM | keys)))


def test_deep_gemm_in_the_right_version_is_taken(monkeypatch: Any) -> None:
    assert grouped(monkeypatch, "2.6.1", *WIDTHS) == grouped(monkeypatch, None, *WIDTHS, grouped="same") == []


@pytest.mark.parametrize(
    ("installed", "keys", "widths", "words"),
    [
        (None, {}, WIDTHS, "DeepGEMM is not installed (2.1.1 or newer, below 2.7 is needed)"),
        ("1.0.0", {}, WIDTHS, "DeepGEMM 1.0.0 is installed, 2.1.1 or newer, below 2.7 is needed"),
        ("2.6.1", {"device": "cpu"}, WIDTHS, "train.device=cpu: use fp8.grouped=same"),
        ("2.6.1", {"recompute_swiglu": True}, WIDTHS, "use fp8.recompute_swiglu=false"),
        ("2.6.1", {"watch_every": 10}, WIDTHS, " has no fp8.watch_every=10: use fp8.watch_every=0"),
        ("2.6.1", {"weights_per_step": False}, WIDTHS, "use fp8.weights_per_step=true"),
        ("2.6.1", {}, WIDTHS[1:], "model.hidden_size=192: use 256, or use fp8.grouped=same"),
    ],
)
def test_what_deep_gemm_cannot(monkeypatch: Any, installed: str | None, keys: Any, widths: Any, words: str) -> None:
    (line,) = grouped(monkeypatch, installed, *widths, **keys)
    assert words in line and line.startswith("fp8.grouped=deep_gemm") and "\n" not in line
