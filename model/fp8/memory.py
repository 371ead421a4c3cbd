"""Bytes that one layer keeps from its forward to its backward, item by item, from the configuration alone; no torch.

Exactly what autograd saves on a CPU (a test compares), one storage counted once. Not in it: the dispatcher's index
lists, and what attention kernels of a GPU keep beside q, k and v.
"""

from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.fp8.precision_map import BITS, Precision, Row, precision_map

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Kept:
    """One thing that is kept: bytes a token, and bytes a sequence beside it."""

    what: str
    per_token: float
    per_sequence: float = 0.0


def kept_by_layer(model: ModelConfig, precision: Precision, *, moe: bool) -> list[Kept]:
    """What a layer keeps, in the order of its forward; routed experts with all the experts of a token."""
    rows = [r for r in precision_map(model, precision) if r.layer == ("MoE layer" if moe else "dense layer")]
    wide = BITS[precision.wide] / 8
    found = [Kept("norm before attention", model.hidden_size * wide + FP32)]
    if model.q_lora_rank is not None:
        found.append(Kept("norm of the query latent", model.q_lora_rank * wide + FP32))
    # the key-value latent and the rotary key are one tensor, of which the norm reads a part
    found.append(Kept("norm of the key-value latent", (model.kv_lora_rank + model.qk_rope_head_dim) * wide + FP32))
    found.append(Kept("norm before the experts" if moe else "norm before the MLP", model.hidden_size * wide + FP32))
    found += [Kept(row.tensor, row.bytes) for row in rows if row.use == "kept" and not row.module]
    if moe:
        found += _router(model, precision)
    inputs = [row for row in rows if row.use == "kept" and row.module]
    return found + [Kept(f"{row.module} {row.tensor}", row.bytes) for row in _distinct(model, precision, inputs)]


def bytes_kept(model: ModelConfig, precision: Precision, *, moe: bool, tokens: int, sequences: int) -> float:
    """Bytes of a layer for a micro-batch of so many tokens in so many sequences."""
    kept = kept_by_layer(model, precision, moe=moe)
    return sum(item.per_token * tokens + item.per_sequence * sequences for item in kept)


def _router(model: ModelConfig, precision: Precision) -> list[Kept]:
    chosen = model.num_experts_per_tok
    found = [
        Kept("router: scores, choice", FP32 * model.n_routed_experts + INT64 * chosen),
        Kept("router: weights", FP32 * chosen),  # of each row, which the SwiGLU multiplies
    ]
    if precision.precision == "fp8" or not model.n_shared_experts:  # else the shared experts keep the same tensor
        found.append(Kept("router: input", model.hidden_size * BITS[precision.wide] / 8))
    if model.norm_topk_prob:
        found.append(Kept("router: normalisation", FP32 * chosen + FP32))
    if model.aux_loss_alpha:
        found.append(Kept("router: balance loss", FP32, FP32 * model.n_routed_experts))
    return found


def _distinct(model: ModelConfig, precision: Precision, rows: list[Row]) -> list[Row]:
    """Each storage once: in FP8 every linear rounds its own copy of an input, otherwise two linears share it."""
    if precision.precision == "fp8":
        return rows
    # the map has no row for the wide SwiGLU's input, which is kept beside its output
    found = []
    for row in rows:
        if row.module.endswith("down_proj"):
            found.append(replace(row, tensor="SwiGLU input", bytes=2 * row.bytes))
        if row.module != "kv_a_proj_with_mqa":
            found.append(row)
    return found
