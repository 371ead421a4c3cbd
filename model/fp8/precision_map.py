"""The precision of every tensor of a model in forward and backward, as data; no torch.

A row says in which product or store a tensor appears, in what format and tiles, and what it takes: bytes a token for
activations and gradients (routed experts times the experts of a token), bytes in all for weights. Edge tiles are
counted whole where they are smaller than 128, as they are stored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.counts import Shape, block_shapes
from model.fp8.config import FP8Config

TILE = 128
BITS = {"E4M3": 8, "E5M6": 12, "BF16": 16, "FP32": 32}
ROUTED, AFTER_ATTENTION = "experts.gate_up_proj", "o_proj"
# Inputs that stay wide in every precision.
WIDE = ("gate.proj", "embed_tokens", "lm_head")


@dataclass(frozen=True)
class Row:
    """One tensor in one use.

    module: the linear it belongs to, or empty. tensor: which one. use: `Fprop`, `Dgrad`, `Wgrad`, `kept` (from forward
    to backward), `again` (computed once more in the backward instead of kept), `step` (weights: kept from one update to
    the next) or `state` (masters and the like). tile: rows x columns, or `-`. per: `token` or `all`. note: why, where
    it is not plain.
    """

    layer: str
    module: str
    tensor: str
    use: str
    format: str
    tile: str
    scale: str
    per: str
    bytes: float
    note: str = ""


def stored_bytes(num_rows: float, num_columns: int, *, format: str, tile: str, scale_bytes: int) -> float:
    """Bytes of a matrix with its scales; in tiles of 128x1 the rows are counted as if they filled their tiles."""
    values = num_rows * num_columns * BITS[format] / 8
    strips = -(-num_columns // TILE)
    if tile == "1x128":
        return values + num_rows * strips * scale_bytes
    if tile == "128x1":
        return values + num_rows / TILE * num_columns * scale_bytes
    if tile == "128x128":
        return values + -(-num_rows // TILE) * strips * scale_bytes
    return values


@dataclass(frozen=True)
class Precision:
    """What decides the map. precision: as `train.precision`. wires: of dispatch, its gradient, and combine."""

    precision: str
    fp8: FP8Config
    moments: str = "bf16"
    dispatch_wire: str = "model"
    dispatch_grad_wire: str = "model"
    combine_wire: str = "model"

    @property
    def wide(self) -> str:
        """Format of activations and weights outside FP8."""
        return "FP32" if self.precision == "fp32" else "BF16"

    @property
    def scale(self) -> str:
        """Format of the scales of E4M3 tiles."""
        if self.fp8.backend == "transformer_engine":
            return "FP32 2^n" if self.fp8.scales == "pow2" else "FP32"
        return "E8M0" if self.fp8.scales == "pow2" else "FP32"

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return 1 if self.scale == "E8M0" else 4


    @property
    def elsewhere(self) -> bool:
        """Whether products are in FP8 and computed by Transformer Engine, which keeps inputs in its own way."""
        return self.precision == "fp8" and self.fp8.backend == "transformer_engine"

    def with_swiglu(self, *, again: bool) -> "Precision":
        """The same with `fp8.recompute_swiglu` as `again` says."""
        return replace(self, fp8=replace(self.fp8, recompute_swiglu=again))


def precision_map(model: ModelConfig, precision: Precision, recompute: str = "none") -> list[Row]:
    """Rows of one layer of each kind and of what is around the layers; recompute: as `parallel.recompute`."""
    rows: list[Row] = []
    if recompute == "report":
        precision = precision.with_swiglu(again=True)
    for name, moe in (("dense layer", False), ("MoE layer", True)):
        exists = model.num_moe_layers if moe else model.first_k_dense_replace
        if exists:
            whole = _layer(model, precision, layer=name, moe=moe)
            rows += [_recomputed(row, model, precision, recompute) for row in whole]
    if model.num_nextn_predict_layers:
        rows += _linear(model, precision, "MTP", "eh_proj", (model.hidden_size, 2 * model.hidden_size))
    return rows + list(_around(model, precision))


def _recomputed(row: Row, model: ModelConfig, precision: Precision, recompute: str) -> Row:
    """A layer's row under that level: `attend` and `layer` run phases once more, `report` single operations."""
    expert = row.module.startswith(("experts.", "shared_experts."))
    if row.use != "kept" or recompute == "none" or (recompute == "attend" and expert):
        return row
    stays = row.tensor == "SwiGLU input" or row.module in (ROUTED, AFTER_ATTENTION)
    if recompute == "report" and stays:
        if precision.elsewhere and row.module == AFTER_ATTENTION:
            size = model.num_attention_heads * model.v_head_dim * BITS[precision.wide] / 8
            return replace(row, format=precision.wide, tile="-", scale="-", bytes=size, note="the attention kernel's")
        return row
    return replace(row, use="again")


def _layer(model: ModelConfig, precision: Precision, *, layer: str, moe: bool) -> list[Row]:
    rows: list[Row] = []
    for full_name, shape in block_shapes(model, moe=moe):
        name = full_name.removesuffix(".weight").removeprefix("mlp.").removeprefix("self_attn.")
        if len(shape) == 1:
            size = shape[0] * BITS[precision.wide] / 8
            rows.append(Row(layer, "", name, "Fprop", precision.wide, "-", "-", "all", size, "norm, computed in FP32"))
        elif name.endswith("gate.proj"):
            size = shape[0] * shape[1] * BITS[precision.wide] / 8
            rows.append(Row(layer, "", "router", "Fprop", "FP32", "-", "-", "all", size, "stored; products FP32"))
        else:
            rows += _linear(model, precision, layer, name, shape)
    heads = model.num_attention_heads * (2 * model.qk_head_dim + model.v_head_dim)
    size = heads * BITS[precision.wide] / 8
    rows.append(Row(layer, "", "attention q, k, v", "kept", precision.wide, "-", "-", "token", size, "attention core"))
    return rows + (list(_wires(model, precision, layer)) if moe else [])


def _copies(model: ModelConfig, name: str) -> int:
    """Rows of a linear for each token."""
    return model.num_experts_per_tok if name.startswith("experts.") else 1


def _linear(model: ModelConfig, precision: Precision, layer: str, name: str, shape: Shape) -> list[Row]:
    outputs, inputs = shape[-2:]
    stack, copies, wide = (shape[0] if len(shape) == 3 else 1), _copies(model, name), precision.wide

    def row(tensor: str, use: str, columns: int, format: str, tile: str, note: str = "") -> Row:
        scaled = format == "E4M3"
        per_tile = precision.scale_bytes if scaled else 1  # E5M6 has one-byte exponents
        size = stored_bytes(copies, columns, format=format, tile=tile, scale_bytes=per_tile)
        scale = precision.scale if scaled else "E8M0" if format == "E5M6" else "-"
        return Row(layer, name, tensor, use, format, tile, scale, "token", size, note)

    def weight(use: str, format: str, tile: str, note: str) -> Row:
        each = stored_bytes(outputs, inputs, format=format, tile=tile, scale_bytes=precision.scale_bytes)
        scale = precision.scale if format == "E4M3" else "-"
        return Row(layer, name, "weight", use, format, tile, scale, "all", stack * each, note)

    if precision.precision != "fp8":
        swiglu = [row("SwiGLU input", "kept", 2 * inputs, wide, "-")] if name.endswith("down_proj") else []
        return [
            weight("Fprop, Dgrad", wide, "-", ""),
            row("input", "Fprop", inputs, wide, "-"),
            *swiglu,
            row("input", "kept", inputs, wide, "-"),
            row("output", "Fprop", outputs, wide, "-"),
            row("gradient", "Dgrad, Wgrad", outputs, wide, "-"),
        ]
    rows = [
        weight("step", wide, "-", "rounded from the FP32 master"),
        weight("Fprop, Dgrad", "E4M3", "128x128", "once a step" if precision.fp8.weights_per_step else "at every use"),
        row("input", "Fprop", inputs, "E4M3", "1x128"),
        row("output", "Fprop", outputs, wide, "-"),
        *_kept(precision, name, row, inputs),
        row("gradient", "Dgrad", outputs, "E4M3", "1x128"),
        row("gradient", "Wgrad", outputs, "E4M3", "128x1", f"from the {wide} gradient"),
    ]
    return rows


def _kept(precision: Precision, name: str, row: Callable[..., Row], inputs: int) -> Iterator[Row]:
    fp8 = precision.fp8
    if name.endswith("down_proj") and fp8.recompute_swiglu:
        yield row("SwiGLU input", "kept", 2 * inputs, "E4M3", "1x128", "the output is computed again")
        yield row("input", "Wgrad", inputs, "E4M3", "128x1", "from the recomputed output")
        return
    cache = fp8.attention_cache if name == AFTER_ATTENTION else fp8.input_cache
    if name.endswith("down_proj"):
        yield row("SwiGLU input", "kept", 2 * inputs, precision.wide, "-")
    kept = {"fp8": ("E4M3", "1x128"), "wide": ("E4M3", "128x1"), "e5m6": ("E5M6", "1x128")}[cache]
    yield row("input", "kept", inputs, *kept)
    source = {"fp8": "requantised from 1x128", "wide": "as kept", "e5m6": "from E5M6"}[cache]
    yield row("input", "Wgrad", inputs, "E4M3", "128x1", source)


def _wires(model: ModelConfig, precision: Precision, layer: str) -> Iterator[Row]:
    tensors = (
        ("dispatch of tokens", precision.dispatch_wire, "Fprop"),
        ("dispatch of gradients", precision.dispatch_grad_wire, "Dgrad"),
        ("combine, both ways", precision.combine_wire, "Fprop, Dgrad"),
    )
    for tensor, wire, use in tensors:
        format = precision.wide if wire == "model" else {"fp8": "E4M3"}.get(wire, wire.upper())
        tile, scale = ("1x128", "E8M0") if format == "E4M3" else ("-", "-")
        copies, hidden = model.num_experts_per_tok, model.hidden_size
        size = stored_bytes(copies, hidden, format=format, tile=tile, scale_bytes=1)
        yield Row(layer, "", tensor, use, format, tile, scale, "token", size, "on the wire, at most")


def _around(model: ModelConfig, precision: Precision) -> Iterator[Row]:
    layer, wide, size = "around", precision.wide, model.vocab_size * model.hidden_size
    for name in ("embed_tokens", "lm_head"):
        yield Row(layer, "", f"{name}.weight", "Fprop, Dgrad", wide, "-", "-", "all", size * BITS[wide] / 8)
    yield Row(layer, "", "residual stream", "Fprop, Dgrad", wide, "-", "-", "token", model.hidden_size * BITS[wide] / 8)
    yield Row(layer, "", "weight gradients", "Wgrad", "FP32", "-", "-", "all", 4, "a weight, summed over a step")
    yield Row(layer, "", "master weights", "state", "FP32", "-", "-", "all", 4, "a weight, shared out by ZeRO-1")
    moments = precision.moments.upper()
    yield Row(layer, "", "AdamW moments", "state", moments, "-", "-", "all", 2 * BITS[moments] / 8, "both, a weight")
