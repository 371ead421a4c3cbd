"""Bytes that one layer keeps from its forward to its backward, item by item, from the configuration alone; no torch.

`kept_by_layer` is exactly what autograd saves on a CPU (a test compares), one storage counted once; `put_off_by_layer`
is what a weight gradient that waits holds (zero bubble); `kept_in_report` is what DeepSeek's engine keeps. The planner
walks schedules with these and has no table of its own. Not in it: the dispatcher's index lists, and what attention
kernels of a GPU keep beside q, k and v.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.counts import block_shapes
from model.fp8.precision_map import BITS, Precision, Row, precision_map

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Kept:
    """One thing that is kept: bytes a token, and bytes a sequence beside it.

    part: of the layer, as `parallel.pipeline.phases` cuts it: attend (router and dense MLP too), shared, experts.
    """

    what: str
    per_token: float
    per_sequence: float = 0.0

    @property
    def part(self) -> str:
        """See the class."""
        return _part(self.what)


def _part(module: str) -> str:
    return {"experts": "experts", "shared_experts": "shared"}.get(module.partition(".")[0], "attend")


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
    return bytes_of(kept_by_layer(model, precision, moe=moe), tokens, sequences)


def bytes_of(items: Iterable[Kept], tokens: int, sequences: int) -> float:
    """Of items for a micro-batch of so many tokens in so many sequences."""
    return sum(item.per_token * tokens + item.per_sequence * sequences for item in items)


def put_off_by_layer(model: ModelConfig, precision: Precision, *, moe: bool) -> list[Kept]:
    """What a layer's weight gradients hold while they wait: each linear's input as kept, its output's gradient wide."""
    wide = BITS[precision.wide] / 8
    again = precision.precision == "fp8" and precision.fp8.recompute_swiglu
    found = [
        Kept(item.what, item.per_token)
        for item in kept_by_layer(model, precision, moe=moe)
        if item.what.endswith(" input") and (again or not item.what.endswith("SwiGLU input"))
    ]
    for name, shape in block_shapes(model, moe=moe):
        module = name.removesuffix(".weight").removeprefix("mlp.").removeprefix("self_attn.")
        if len(shape) < 2:
            continue
        copies = model.num_experts_per_tok if module.startswith("experts.") else 1
        size = FP32 if module == "gate.proj" else wide
        found.append(Kept(f"{module} gradient", copies * shape[-2] * size))
    return found


def kept_in_report(model: ModelConfig, *, moe: bool) -> list[Kept]:
    """What the report's engine keeps (sections 3.2.3 and 3.3.3); norms, up-projections and SwiGLU are computed again.

    Residuals and latents in BF16, the output of attention in 12 bits, rows of the experts and SwiGLU inputs in FP8.
    """
    D, heads = model.hidden_size, model.num_attention_heads
    latent = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    width = model.moe_intermediate_size if moe else model.intermediate_size
    wide = (model.n_shared_experts if moe else 1) * width
    found = [
        Kept("residual before attention", 2 * D),
        Kept("latents", 4 * latent),
        Kept("o_proj input", 1.5 * heads * model.v_head_dim),
        Kept("attention statistics", FP32 * heads),
        Kept("residual before the experts", 2 * D),
        Kept("shared_experts.down_proj SwiGLU input" if moe else "down_proj SwiGLU input", 2 * wide),
    ]
    if moe:
        chosen = model.num_experts_per_tok
        found += [
            Kept("experts.gate_up_proj input", chosen * D),
            Kept("experts.down_proj SwiGLU input", chosen * 2 * width),
            Kept("router: scores, choice, weights", FP32 * model.n_routed_experts + 2 * INT64 * chosen),
        ]
    return found


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
