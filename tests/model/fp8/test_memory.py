"""Bytes from forward to backward of one layer: counted at autograd's own hooks, equal to the formula."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.block import Block, MoE
from model.config import ModelConfig
from model.dispatch import LocalDispatcher
from model.fp8.apply import apply_fp8
from model.fp8.config import FP8Config
from model.fp8.memory import bytes_kept
from model.fp8.precision_map import Precision
from model.rope import rotations
from tests.launcher.spine import MODEL

WIDER = ModelConfig(
    vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=128, q_lora_rank=128,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1, max_position_embeddings=256,
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
SEQUENCES, LENGTH = 2, 128


def measured(model: ModelConfig, precision: str, fp8: FP8Config, *, moe: bool) -> int:
    experts = model.n_routed_experts
    block = Block(model, moe=moe, expert_ids=range(experts), dispatcher=LocalDispatcher(experts) if moe else None)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    block.to(DTYPES[precision])
    if isinstance(block.mlp, MoE):
        block.mlp.gate.e_score_correction_bias = torch.zeros(experts)
    if precision == "fp8":
        apply_fp8(block, fp8)
    spin = rotations(model, LENGTH)
    counted = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), spin)}
    kept: list[torch.Tensor] = []
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            kept.append(tensor)  # so that no other storage comes to lie at the same address
            total += storage.nbytes()
        return tensor

    x = torch.randn(SEQUENCES, LENGTH, model.hidden_size, dtype=DTYPES[precision], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, spin, 1.0)
    return total


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bf16", {}),
    ("fp32", {}),
    ("fp8", {"recompute_swiglu": False}),
    ("fp8", {}),
    ("fp8", {"scales": "fp32", "attention_cache": "fp8"}),
    ("fp8", {"input_cache": "wide", "attention_cache": "wide", "recompute_swiglu": False}),
]


# 128x1 tiles start anew at every expert, so that their number depends on the routing: dense layers only.
BY_LAYER = [(moe, *case) for moe in (True, False) for case in CASES if not (moe and "input_cache" in case[1])]


@pytest.mark.parametrize("model", [WIDER, replace(MODEL, n_shared_experts=0), replace(WIDER, aux_loss_alpha=0.0)])
@pytest.mark.parametrize(("moe", "precision", "keys"), BY_LAYER)
def test_measured_bytes_are_the_formula(moe: bool, precision: str, keys: dict[str, Any], model: ModelConfig) -> None:
    fp8 = FP8Config(native=False, **keys)
    formula = bytes_kept(model, Precision(precision, fp8), moe=moe, tokens=SEQUENCES * LENGTH, sequences=SEQUENCES)
    assert measured(model, precision, fp8, moe=moe) == formula
