"""FP8 that cannot be is refused in lines that name key, value and what would work; there is no quiet BF16."""

from dataclasses import replace
from typing import Any

import pytest

from launcher.check import fp8 as check_fp8
from launcher.check.run import checked, problems
from launcher.config import ConfigError, RunConfig, compose
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
     ("attention_cache", "bf16"), ("gradient_amax_floor", "-1"), ("watch_every", "-1"), ("primary_weights", "fp32")],
)  # fmt: skip
def test_unknown_words(key: str, value: str) -> None:
    (line,) = found(run(f"fp8.{key}={value}"))
    assert line.startswith(f"fp8.{key}={value}: use ")


def test_weights_that_deepspeed_gathers_are_in_bf16(monkeypatch: Any) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: "0.19.8")
    (line,) = found(run("optim.zero1=deepspeed"))
    assert line == (
        "optim.zero1=deepspeed gathers weights in BF16 alone: use fp8.primary_weights=bf16, or optim.zero1=plain"
    )
    assert not found(run("optim.zero1=deepspeed", "fp8.primary_weights=bf16"))
    assert not found(run("optim.zero1=deepspeed", "train.precision=bf16"))


@pytest.fixture(autouse=True)
def hopper(monkeypatch: Any) -> Any:
    """What this machine is taken for: GPUs and CUDA as needed, unless other ones are asked for."""

    def is_there(*gpus: str, cuda: str | None) -> None:
        monkeypatch.setattr(check_fp8, "gpu_capabilities", lambda: gpus)
        monkeypatch.setattr(check_fp8, "torch_cuda", lambda: cuda)

    is_there("9.0", "9.0", cuda="12.9")
    return is_there


GOOD = {"backend": "transformer_engine", "input_cache": "wide", "attention_cache": "wide", "recompute_swiglu": False}


def judged(config: RunConfig, *, device: str, **keys: Any) -> list[str]:
    """What is wrong with FP8 of that kind, from the run and from this machine."""
    config = replace(config, train=replace(config.train, device=device), fp8=replace(config.fp8, **keys))
    here, anywhere = (
        [line for line in problems(config, None, with_data=False, here=h) if "fp8" in line] for h in (True, False)
    )
    from_config = check_fp8.check_transformer_engine(config) + check_fp8.check_deep_gemm(config)
    from_machine = check_fp8.check_fp8_packages(config) + check_fp8.check_fp8_gpu(config)
    assert anywhere == from_config and here == from_config + from_machine
    return here


def engine(monkeypatch: Any, installed: str | None, *, device: str = "cuda", **keys: Any) -> list[str]:
    monkeypatch.setattr(backends, "installed", lambda package: installed)
    return judged(run(), device=device, **GOOD | keys)


def test_transformer_engine_in_the_right_version_is_taken(monkeypatch: Any) -> None:
    assert engine(monkeypatch, "2.20.2") == []


@pytest.mark.parametrize(
    ("installed", "keys", "words"),
    [
        (None, {}, "Transformer Engine is not installed (2.20 or newer, below 2.21 is needed)"),
        ("1.13.0", {}, "Transformer Engine 1.13.0 is installed, 2.20 or newer"),
        ("2.21.0+abc", {}, "Transformer Engine 2.21.0+abc is installed"),
        ("2.20.2", {"device": "cpu"}, "a GPU of compute capability 9.0 and CUDA 12.9 or newer, but train.device=cpu"),
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
    monkeypatch.setattr(backends, "installed", lambda package: "2.20.2")
    lines = judged(run("model.kv_lora_rank=100"), device="cuda", **GOOD)
    assert any("kv_a_proj_with_mqa" in line and "multiples of 16" in line for line in lines)


@pytest.mark.parametrize(
    ("gpus", "cuda", "device", "words"),
    [
        (("8.0", "8.0"), "12.9", "cuda", "here: compute capability 8.0, torch for CUDA 12.9: use fp8.backend"),
        (("10.0",), "13.0", "cuda", "here: compute capability 10.0, torch for CUDA 13.0: use fp8.backend"),
        (("9.0",), "12.8", "cuda", "here: compute capability 9.0, torch for CUDA 12.8: use fp8.backend"),
        ((), "12.4", "auto", "here: torch for CUDA 12.4: use fp8.backend"),
        ((), None, "auto", "here: torch without CUDA: use fp8.backend"),
        ((), "12.9", "cuda", None),  # not known: said when it starts
        (("7.5", "9.0"), "13.0", "auto", None),
    ],
)
def test_gpu_and_cuda_found_and_needed(
    monkeypatch: Any, hopper: Any, gpus: tuple[str, ...], cuda: str | None, device: str, words: str | None
) -> None:
    hopper(*gpus, cuda=cuda)
    lines = engine(monkeypatch, "2.20.2", device=device)
    assert len(lines) == (words is not None)
    needed = "fp8.backend=transformer_engine needs a GPU of compute capability 9.0 and CUDA 12.9 or newer, "
    assert all(line.startswith(needed + str(words)) for line in lines)


DEEP_GEMM = {"grouped": "deep_gemm", "recompute_swiglu": False}
WIDTHS = ("model.hidden_size=256", "model.moe_intermediate_size=128")


def grouped(monkeypatch: Any, installed: str | None, *widths: str, device: str = "cuda", **keys: Any) -> list[str]:
    monkeypatch.setattr(backends, "installed", lambda package: installed)
    return judged(run(*widths), device=device, **DEEP_GEMM | keys)


def test_deep_gemm_needs_its_gpu(monkeypatch: Any, hopper: Any) -> None:
    hopper("10.0", cuda="12.8")
    (line,) = grouped(monkeypatch, "2.6.1", *WIDTHS)
    assert "of compute capability 9.0, here: compute capability 10.0, torch for CUDA 12.8: use fp8.grouped=same" in line


def test_what_depends_on_the_run_alone_is_refused_where_it_is_only_sent_off(monkeypatch: Any) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: None)
    lacks = {"train.device": "cuda", "train.precision": "fp8", "fp8.backend": "transformer_engine",
             "fp8.grouped": "deep_gemm", "fp8.watch_every": "10"}  # fmt: skip
    overrides = ["experiment=tiny", *(f"{key}={value}" for key, value in lacks.items())]
    with pytest.raises(ConfigError) as caught:
        checked([*overrides, "model.kv_lora_rank=100"], with_data=False, here=False)
    text = "\n".join(caught.value.errors)
    for part in (
        "has no fp8.attention_cache=e5m6",
        "multiples of 16",
        "takes multiples of 128",
        "use fp8.watch_every=0",
    ):
        assert part in text
    assert "not installed" not in text


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
