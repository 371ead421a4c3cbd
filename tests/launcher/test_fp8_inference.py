"""A run in FP8 is scored in FP8, unless another type is asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.inference import load_model
from model.fp8.apply import apply_fp8, give_weights, weight_blocks
from model.fp8.config import FP8Config
from model.fp8.linear import FP8Layer
from model.init import initialise
from model.transformer import Transformer
from tests.launcher.checkpoint import states
from tests.launcher.checkpoint.states import write_checkpoint
from tests.launcher.spine import MODEL


def test_scored_as_trained(tmp_path: Path) -> None:
    model = Transformer(replace(MODEL))
    initialise(model, std=0.05, seed=0)
    folder = write_checkpoint(model, tmp_path, precision="fp8")
    tokens = torch.randint(MODEL.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    blocks = weight_blocks(model, FP8Config(), device=torch.device("cpu"))
    rounded = {name: blocks[name].quantise(weight) for name, weight in model.named_parameters() if name in blocks}
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    model.eval()
    wide = model.logits(tokens)
    apply_fp8(model, FP8Config())
    from_bf16 = model.logits(tokens)
    give_weights(model, rounded)  # from FP32 at once
    expected = model.logits(tokens)
    assert not torch.equal(expected, from_bf16)
    found = load_model(folder)
    assert isinstance(found.layers["0"].self_attn.o_proj.fp8, FP8Layer)  # type: ignore[union-attr]
    assert torch.equal(found.logits(tokens), expected) and not torch.equal(wide, expected)
    assert torch.equal(load_model(folder, dtype=torch.bfloat16).logits(tokens), wide)


@pytest.mark.parametrize(
    ("trained", "backend"),
    [
        (FP8Config(backend="transformer_engine", recompute_swiglu=False, input_cache="wide"), "oracle_fast"),
        (FP8Config(grouped="deep_gemm", recompute_swiglu=False), "oracle_fast"),
        (FP8Config(backend="oracle_exact", grouped="deep_gemm", recompute_swiglu=False), "oracle_exact"),
        (FP8Config(primary_weights="bf16"), "oracle_fast"),
    ],
)
def test_scored_where_the_back_end_is_not(trained: FP8Config, backend: str, tmp_path: Path, monkeypatch: Any) -> None:
    here = replace(trained, backend=backend, grouped="same")
    assert torch.equal(*logits(trained, here, tmp_path, monkeypatch))


def test_scored_without_a_compiler(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where nothing built is kept
    monkeypatch.setenv("PATH", "/nowhere")
    assert torch.equal(*logits(FP8Config(), FP8Config(native=False), tmp_path, monkeypatch))


def logits(trained: FP8Config, scored: FP8Config, folder: Path, monkeypatch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a model loaded from a run trained one way, and of the same weights computed the other way."""
    model = Transformer(MODEL)
    initialise(model, std=0.05, seed=0)
    whole = states.whole_config
    with monkeypatch.context() as patched:
        patched.setattr(states, "whole_config", lambda *args: replace(whole(*args), fp8=trained))
        found = load_model(write_checkpoint(model, folder, precision="fp8"))
    blocks = weight_blocks(model, scored, device=torch.device("cpu"))
    rounded = {name: blocks[name].quantise(weight) for name, weight in model.named_parameters() if name in blocks}
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    apply_fp8(model.eval(), scored)
    give_weights(model, rounded)
    tokens = torch.randint(MODEL.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    return found.logits(tokens), model.logits(tokens)
