"""Bytes that one layer keeps from its forward to its backward, item by item, from the configuration alone; no torch.

`kept_by_layer` has the rows `kept` of the precision map, which are exactly what autograd keeps on a CPU (a test
compares), one storage counted once; `put_off_by_layer` is what a weight gradient that waits holds (zero bubble). Both
know the level `report` of `parallel.recompute`, which is `model.recompute`; the other levels drop whole phases of these
lists. The planner walks schedules with these and has no table of its own. `kept_by_attention_kernel`: what a GPU adds.
Not in it: the dispatcher's index lists.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.counts import block_shapes
from model.fp8.precision_map import (
    AFTER_ATTENTION,
    BITS,
    DEEP_GEMM,
    ENGINE,
    ROUTER,
    TILE,
    Precision,
    layer_rows,
    module_of,
    scale_bytes,
)

FP32 = 4
# Of a weight as products read it, which is kept for the step; scales left out. Made of BF16, or beside the E4M3 values
# that ZeRO-1 gathers, which are the products' own where they can be.
ROUNDED_BYTES = {"oracle_exact": 1, "oracle_fast": 2, ENGINE: 2, DEEP_GEMM: 1}
BESIDE_FP8_BYTES = {"oracle_exact": 0, "oracle_fast": 2, ENGINE: 1, DEEP_GEMM: 0}


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
        return {"experts": "experts", "shared_experts": "shared"}.get(self.what.partition(".")[0], "attend")


def kept_by_layer(model: ModelConfig, precision: Precision, *, moe: bool, recompute: str = "none") -> list[Kept]:
    """What a layer keeps; routed experts with all the experts of a token.

    recompute: of the levels only `report` changes these lists.
    """
    found = []
    for row in layer_rows(model, precision, moe=moe, recompute="report" if recompute == "report" else "none"):
        if row.use == "kept" and row.bytes:
            each = {f"per_{row.per}": row.bytes}
            found.append(Kept(f"{row.module} {row.tensor}".strip(), **{"per_token": 0.0, **each}))
    return found


def kept_by_attention_kernel(model: ModelConfig, precision: Precision, *, recompute: str = "none") -> Kept:
    """What a GPU's flash attention keeps beside q, k and v: its output, wide, and a number a row."""
    shared = recompute == "report" and precision.back_end(AFTER_ATTENTION) == ENGINE  # as `model.recompute` has it
    same = not precision.in_fp8 or shared
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
    """What a layer's weight gradients hold while they wait: each linear's input as kept, its output's gradient.

    The gradient is wide; of Transformer Engine rounded both ways. With `report`, and in FP8, the input of a down
    projection and the gradients are in the tiles that the product reads; but DeepGEMM's gradients stay wide.
    """
    report = recompute == "report" and precision.in_fp8
    if report:  # the weight gradient of a down projection holds the SwiGLU's output by then, not its input
        precision = replace(precision, fp8=replace(precision.fp8, recompute_swiglu=False))
    shapes = {module_of(name): shape for name, shape in block_shapes(model, moe=moe) if len(shape) > 1}
    found = [
        Kept(f"{row.module} {row.tensor}", row.bytes)
        for row in layer_rows(model, precision, moe=moe)
        if row.use == "kept" and row.bytes and row.module in shapes
        if row.tensor == "input" or (row.tensor == "SwiGLU input" and row.format == "E4M3")
    ]
    if "experts.down_proj SwiGLU input" in {item.what for item in found}:  # from which its output is computed again
        found.append(Kept("experts.down_proj weights of the rows", FP32 * model.num_experts_per_tok))
    for module, shape in shapes.items():
        copies = model.num_experts_per_tok if module.startswith("experts.") else 1
        size = FP32 if module == ROUTER else _waiting_gradient(precision, module, rounded=report)
        found.append(Kept(f"{module} gradient", copies * shape[-2] * size))
    return found


def rounded_weight_bytes(precision: Precision, module: str) -> int:
    """Of each weight of a linear, for the form that products read beside what is gathered; 0 where none is kept."""
    per_step = precision.fp8.weights_per_step or not precision.by_oracle(module)
    if not precision.in_fp8 or not per_step:
        return 0
    return (BESIDE_FP8_BYTES if precision.fp8_alone else ROUNDED_BYTES)[precision.back_end(module)]


def _waiting_gradient(precision: Precision, module: str, *, rounded: bool) -> float:
    """Bytes of a number of the output's gradient of a linear whose weight gradient waits."""
    wide, back_end = BITS[precision.wide] / 8, precision.back_end(module)
    if not precision.in_fp8 or back_end == DEEP_GEMM:
        return wide
    one_way = 1 + scale_bytes(precision.scale(module)) / TILE
    if rounded:
        return one_way
    return 2 * one_way if back_end == ENGINE else wide
