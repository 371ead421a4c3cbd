"""A run in FP8 is scored in FP8, unless another type is asked for."""

from dataclasses import replace
from pathlib import Path

import torch

from launcher.inference import load_model
from model.fp8.apply import apply_fp8
from model.fp8.config import FP8Config
from model.fp8.linear import FP8Layer
from model.init import initialise
from model.transformer import Transformer
from tests.launcher.checkpoint.states import write_checkpoint
from tests.launcher.spine import MODEL


def test_scored_as_trained(tmp_path: Path) -> None:
    model = Transformer(replace(MODEL))
    initialise(model, std=0.05, seed=0)
    folder = write_checkpoint(model, tmp_path, precision="fp8")
    tokens = torch.randint(MODEL.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    model.eval()
    wide = model.logits(tokens)
    apply_fp8(model, FP8Config())
    expected = model.logits(tokens)
    found = load_model(folder)
    assert isinstance(found.layers["0"].self_attn.o_proj.fp8, FP8Layer)  # type: ignore[union-attr]
    assert torch.equal(found.logits(tokens), expected) and not torch.equal(wide, expected)
    assert torch.equal(load_model(folder, dtype=torch.bfloat16).logits(tokens), wide)
