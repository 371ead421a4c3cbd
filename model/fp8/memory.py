"""Bytes that one layer keeps from its forward to its backward, item by item, from the configuration alone; no torch.

`kept_by_layer` is exactly what autograd keeps on a CPU (a test compares), one storage counted once; `put_off_by_layer`
is what a weight gradient that waits holds (zero bubble). Both know the level `report` of `parallel.recompute`, which is
`model.recompute`; the other levels drop whole phases of these lists. The planner walks schedules with these and has no
table of its own. `kept_by_attention_kernel`: what a GPU's adds. Not in it: the dispatcher's index lists.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from model.config import ModelConfig
from model.counts import block_shapes
from model.fp8.precision_map import BITS, TILE, Precision, Row, precision_map

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


def kept_by_layer(model: ModelConfig, precision: Precision, *, moe: bool, recompute: str = "none") -> list[Kept]:
    """What a layer keeps, in the order of its forward; routed experts with all the experts of a token.

    recompute: of the levels only `report` changes these lists.
    """
    level = "report" if recompute == "report" else "none"
    layer = "MoE layer" if moe else "dense layer"
    rows = [r for r in precision_map(model, precision, level) if r.layer == layer and r.use == "kept"]
    wide = BITS[precision.wide] / 8
    found = [Kept("norm before attention", model.hidden_size * wide + FP32)]
    if model.q_lora_rank is not None:
        found.append(Kept("norm of the query latent", model.q_lora_rank * wide + FP32))
    # the key-value latent and the rotary key are one tensor, of which the norm reads a part
    found.append(Kept("norm of the key-value latent", (model.kv_lora_rank + model.qk_rope_head_dim) * wide + FP32))
    found.append(Kept("norm before the experts" if moe else "norm before the MLP", model.hidden_size * wide + FP32))
    found += [Kept(row.tensor, row.bytes) for row in rows if not row.module]
    if moe:
        found += _router(model, precision, keeps_input=level == "none")
    inputs = [row for row in rows if row.module]
    return found + [Kept(f"{row.module} {row.tensor}", row.bytes) for row in _distinct(precision, inputs)]


def kept_by_attention_kernel(model: ModelConfig, precision: Precision, *, recompute: str = "none") -> Kept:
    """What a GPU's flash attention keeps beside q, k and v: its output, wide, and a number a row."""
    same = precision.precision != "fp8" or (recompute == "report" and precision.elsewhere)
    output = 0.0 if same else model.v_head_dim * BITS[precision.wide] / 8  # else the linear after it keeps that tensor
    return Kept("attention kernel", model.num_attention_heads * (output + FP32))


def bytes_kept(
    model: ModelConfig, precision: Precision, *, moe: bool, tokens: int, sequences: int, recompute: str = "none"
) -> float:
    """Bytes of a layer for a micro-batch of so many tokens in so many sequences."""
    return bytes_of(kept_by_layer(model, precision, moe=moe, recompute=recompute), tokens, sequences)


def bytes_of(items: Iterable[Kept], tokens: int, sequences: int) -> float:
    """Of items for a micro-batch of so many tokens in so many sequences."""
    return sum(item.per_token * tokens + item.per_sequence * sequences for item in items)


def put_off_by_layer(model: ModelConfig, precision: Precision, *, moe: bool, recompute: str = "none") -> list[Kept]:
    """What a layer's weight gradients hold while they wait: each linear's input as kept, its output's gradient wide.

    With `report`, and in FP8, the input of a down projection and the gradients in the tiles that the product reads.
    """
    wide = BITS[precision.wide] / 8
    rounded = recompute == "report" and precision.precision == "fp8"
    if rounded:
        precision = precision.with_swiglu(again=False)
        each = 1 + precision.scale_bytes / TILE
    else:
        each = wide
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
        size = FP32 if module == "gate.proj" else each
        found.append(Kept(f"{module} gradient", copies * shape[-2] * size))
    return found


def _router(model: ModelConfig, precision: Precision, *, keeps_input: bool) -> list[Kept]:
    chosen = model.num_experts_per_tok
    found = [
        Kept("router: scores, choice", FP32 * model.n_routed_experts + INT64 * chosen),
        Kept("router: weights", FP32 * chosen),  # of each row, which the SwiGLU multiplies
    ]
    # in BF16 and FP32 the shared experts keep the same tensor
    if keeps_input and (precision.precision == "fp8" or not model.n_shared_experts):
        found.append(Kept("router: input", model.hidden_size * BITS[precision.wide] / 8))
    if model.norm_topk_prob:
        found.append(Kept("router: normalisation", FP32 * chosen + FP32))
    if model.aux_loss_alpha:
        found.append(Kept("router: balance loss", FP32, FP32 * model.n_routed_experts))
    return found


def _distinct(precision: Precision, rows: list[Row]) -> list[Row]:
    """Each storage once: in FP8 every linear rounds its own copy of an input, otherwise two linears share it."""
    return [row for row in rows if precision.precision == "fp8" or row.module != "kv_a_proj_with_mqa"]
