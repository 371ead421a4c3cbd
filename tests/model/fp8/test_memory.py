"""Bytes from forward to backward of one layer: counted at autograd's own hooks, equal to the formula."""

from dataclasses import fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import pytest
import torch

from model.block import Block, MoE
from model.config import ModelConfig
from model.dispatch import LocalDispatcher
from model.fp8.apply import apply_fp8
from model.fp8.config import FP8Config
from model.fp8.linear import FP8Layer
from model.fp8.memory import bytes_kept, bytes_of, put_off_by_layer
from model.fp8.precision_map import Precision
from model.linear import GroupedProductGrad
from model.recompute import keep_less
from model.rope import rotations
from model.weight_grad import ProductGrad, set_sink
from parallel.pipeline.weight_grad import Contributions, DeferredSink
from tests.launcher.spine import MODEL
from tests.model.fp8.test_deep_gemm import COUNTS, data, pair

WIDER = ModelConfig(
    vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=128, q_lora_rank=128,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1, max_position_embeddings=256,
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
SEQUENCES, LENGTH = 2, 128


def block_of(model: ModelConfig, precision: str, fp8: FP8Config, *, moe: bool) -> Block:
    experts = model.n_routed_experts
    block = Block(model, moe=moe, expert_ids=range(experts), dispatcher=LocalDispatcher(experts) if moe else None)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    block.to(DTYPES[precision])
    if isinstance(block.mlp, MoE):
        block.mlp.gate.e_score_correction_bias = torch.zeros(experts)
    if precision == "fp8":
        apply_fp8(block, fp8)
    return block


def measured(model: ModelConfig, precision: str, fp8: FP8Config, *, moe: bool) -> int:
    block, spin = block_of(model, precision, fp8, moe=moe), rotations(model, LENGTH)
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


def held_by(value: Any, counted: set[int]) -> int:
    """Bytes of the storages that a contribution reaches, each once; a layer's own things left out."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in counted:
            return 0
        counted.add(storage.data_ptr())
        return storage.nbytes()
    parts: list[Any] = []
    if isinstance(value, FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
    elif isinstance(value, ProductGrad | GroupedProductGrad):
        parts = list(vars(value).values())
    elif is_dataclass(value) and not isinstance(value, FP8Layer):
        parts = [getattr(value, field.name) for field in fields(value)]
    return sum(held_by(part, counted) for part in parts)


WAITING = [("bf16", {}, "none"), ("fp32", {}, "none"), ("bf16", {}, "report"), ("fp8", {}, "none"),
           ("fp8", {"recompute_swiglu": False}, "none"), ("fp8", {"scales": "fp32"}, "none"),
           ("fp8", {}, "report"), ("fp8", {"scales": "fp32", "recompute_swiglu": False}, "report")]  # fmt: skip
# 128x1 tiles again
WAITING_BY_LAYER = [(m, *case) for m in (True, False) for case in WAITING if not (m and case[::2] == ("fp8", "report"))]


@pytest.mark.parametrize(("moe", "precision", "keys", "level"), WAITING_BY_LAYER)
def test_what_weight_gradients_hold_while_they_wait_is_the_formula(
    moe: bool, precision: str, keys: dict[str, Any], level: str
) -> None:
    fp8 = FP8Config(native=False, **keys)
    block, sink, waiting = block_of(WIDER, precision, fp8, moe=moe), DeferredSink(), Contributions()
    if level == "report":
        keep_less(block)
    set_sink(block, sink)
    x = torch.randn(SEQUENCES, LENGTH, WIDER.hidden_size, dtype=DTYPES[precision], requires_grad=True)
    out = block(x, rotations(WIDER, LENGTH), 1.0)
    with sink.collecting(waiting):
        out.backward(torch.randn_like(out))
    del x, out
    counted = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
    found = sum(held_by(add, counted) for weight, add in waiting if weight.dim() > 1)
    items = put_off_by_layer(WIDER, Precision(precision, fp8), moe=moe, recompute=level)
    assert found == bytes_of(items, SEQUENCES * LENGTH, SEQUENCES)


@pytest.mark.parametrize("level", ["none", "report"])
@pytest.mark.parametrize("scales", ["pow2", "fp32"])
def test_a_gradient_that_waits_for_deep_gemm_stays_wide(scales: str, level: str) -> None:
    _, ours = pair(scales, "fp8")  # 1x128: whole tiles whatever the routing
    product: Any = ours.fp8
    sink, waiting, x = DeferredSink(), Contributions(), data(sum(COUNTS), 384, 1).requires_grad_()
    arguments = (x, ours.weight, sink, COUNTS)
    y = product(*arguments) if level == "none" else product.call_again(*arguments, x.detach)
    with sink.collecting(waiting):
        y.backward(data(sum(COUNTS), 256, 2))
    ((_, add),) = waiting
    model = replace(WIDER, hidden_size=384, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=1)
    kind = Precision("fp8", FP8Config(scales=scales, grouped="deep_gemm", recompute_swiglu=False))
    items = put_off_by_layer(model, kind, moe=True, recompute=level)
    mine = [item for item in items if item.what.startswith("experts.gate_up_proj ")]
    assert held_by(add, set()) == bytes_of(mine, sum(COUNTS), 1)
