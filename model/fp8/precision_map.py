"""The precision of every tensor of a model in forward and backward, as data; no torch.

A row says in which product or store a tensor appears, in what format and tiles, and what it takes: bytes a token for
activations and gradients (routed experts times the experts of a token), bytes in all for weights. Edge tiles are
counted whole where they are smaller than 128, as they are stored. The rows `kept` of a layer are what `memory.py`
counts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.counts import Shape, block_shapes
from model.fp8.config import FP8Config

TILE = 128
BITS = {"E4M3": 8, "E5M6": 12, "BF16": 16, "FP32": 32, "INT64": 64}
ROUTED, AFTER_ATTENTION, ROUTER = "experts.gate_up_proj", "o_proj", "router"
# Inputs that stay wide in every precision.
WIDE = ("gate.proj", "embed_tokens", "lm_head")
AROUND = "around"  # what is no layer's
ENGINE, DEEP_GEMM = "transformer_engine", "deep_gemm"


@dataclass(frozen=True)
class Row:
    """One tensor in one use.

    module: the linear or norm it belongs to, or empty. tensor: which one. use: `Fprop`, `Dgrad`, `Wgrad`, `kept` (from
    forward to backward), `again` (computed once more in the backward instead of kept), `step` (weights: kept from one
    update to the next) or `state` (masters and the like). tile: rows x columns, or `-`. per: `token`, `sequence` or
    `all`. bytes: 0 for one that is the same storage as another. note: why, where it is not plain.
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
    def in_fp8(self) -> bool:
        """Whether the linears' products are in FP8."""
        return self.precision == "fp8"

    @property
    def fp8_alone(self) -> bool:
        """Whether ranks hold the linears' weights in FP8 and in no wider form but the masters."""
        return self.in_fp8 and self.fp8.primary_weights == "fp8"

    def back_end(self, module: str) -> str:
        """What computes a linear in FP8: `fp8.backend`, or `deep_gemm` the experts if `fp8.grouped` says so."""
        return DEEP_GEMM if self.fp8.grouped == DEEP_GEMM and module.startswith("experts.") else self.fp8.backend

    def by_oracle(self, module: str) -> bool:
        """Whether that is one of the two forms of the oracle."""
        return self.back_end(module) not in (ENGINE, DEEP_GEMM)

    def scale(self, module: str) -> str:
        """Format of the scales of a linear's E4M3 tiles."""
        if self.back_end(module) == ENGINE:
            return "FP32 2^n" if self.fp8.scales == "pow2" else "FP32"
        return "E8M0" if self.fp8.scales == "pow2" else "FP32"

    def cache(self, module: str) -> str:
        """In what form a linear keeps its input: one of the words of `fp8.input_cache` and `fp8.attention_cache`."""
        if self.back_end(module) == ENGINE:
            return "wide"
        return self.fp8.attention_cache if module == AFTER_ATTENTION else self.fp8.input_cache

    def swiglu_again(self, module: str, recompute: str) -> bool:
        """Whether a down projection keeps the input of its SwiGLU in FP8, and computes the output again."""
        return self.in_fp8 and (recompute == "report" or (self.by_oracle(module) and self.fp8.recompute_swiglu))


def scale_bytes(scale: str) -> int:
    """Bytes of one scale, 0 where there is none."""
    return {"-": 0, "E8M0": 1}.get(scale, 4)


def precision_map(model: ModelConfig, precision: Precision, recompute: str = "none") -> list[Row]:
    """Rows of one layer of each kind, of a module of MTP with its layer, and of what is around the layers.

    recompute: as `parallel.recompute`.
    """
    rows: list[Row] = []
    for moe, exists in ((False, model.first_k_dense_replace), (True, model.num_moe_layers)):
        if exists:
            rows += layer_rows(model, precision, moe=moe, recompute=recompute)
    if model.num_nextn_predict_layers:
        rows += _mtp(model, precision, recompute)
    return rows + list(_around(model, precision, recompute))


def layer_rows(model: ModelConfig, precision: Precision, *, moe: bool, recompute: str = "none") -> list[Row]:
    """Rows of a layer, in the order of its parameters; recompute: as `parallel.recompute`."""
    layer = _Layer(model, precision, "MoE layer" if moe else "dense layer", recompute)
    rows: list[Row] = []
    for name, shape in block_shapes(model, moe=moe):
        module = module_of(name)
        if module == ROUTER:
            rows += layer.router(shape)
        else:
            rows += layer.linear(module, shape) if len(shape) > 1 else layer.norm(module, math.prod(shape))
        if module == AFTER_ATTENTION:
            heads = model.num_attention_heads * (2 * model.qk_head_dim + model.v_head_dim)
            rows.append(layer.wide("", "attention q, k, v", "kept", heads, "of the attention core"))
    rows += layer.wires() if moe else []
    return [_recomputed(row, model, precision, recompute) for row in rows]


def module_of(parameter: str) -> str:
    """The name in the map of the module of a layer's parameter."""
    name = parameter.removesuffix(".weight").removeprefix("mlp.").removeprefix("self_attn.")
    return ROUTER if name == "gate.proj" else name


def _recomputed(row: Row, model: ModelConfig, precision: Precision, recompute: str) -> Row:
    """A layer's row under that level: `attend` and `layer` run phases once more, `report` single operations."""
    if row.use != "kept" or recompute == "none":
        return row
    if recompute == "report":
        linear = row.tensor == "input" and not row.module.endswith("layernorm")
        stays = row.tensor != "attention q, k, v" and (not linear or row.module in (ROUTED, AFTER_ATTENTION))
        shares = precision.in_fp8 and precision.back_end(row.module) == ENGINE and row.module == AFTER_ATTENTION
        if shares:
            size = model.num_attention_heads * model.v_head_dim * BITS[precision.wide] / 8
            return replace(row, format=precision.wide, tile="-", scale="-", bytes=size, note="the attention kernel's")
    else:  # what the phases start from, and those that are not run again
        expert = row.module.startswith(("experts.", "shared_experts."))
        arrived = row.tensor == "rows that arrived" or (row.module == ROUTED and not precision.in_fp8)
        start = arrived or (row.module, row.tensor) in (("input_layernorm", "input"), (ROUTER, "weights"))
        stays = start or (recompute == "attend" and expert)
    return row if stays else replace(row, use="again")


@dataclass(frozen=True)
class _Layer:
    """Makes the rows of a kind of layer."""

    model: ModelConfig
    precision: Precision
    layer: str
    recompute: str

    def wide(self, module: str, tensor: str, use: str, columns: int, note: str = "", format: str = "") -> Row:
        """Columns of a token, without scales: in the format of activations unless told otherwise."""
        format = format or self.precision.wide
        return Row(self.layer, module, tensor, use, format, "-", "-", "token", columns * BITS[format] / 8, note)

    def weight(self, module: str, use: str, shape: Shape, format: str = "", note: str = "", *, scale: str = "-") -> Row:
        """A weight, or a stack of them; scale: of its 128x128 tiles."""
        format, tile = format or self.precision.wide, "-" if scale == "-" else "128x128"
        outputs, inputs = (1, *shape)[-2:]
        size = stored_bytes(outputs, inputs, format=format, tile=tile, scale_bytes=scale_bytes(scale))
        return Row(self.layer, module, "weight", use, format, tile, scale, "all", size, note)

    def norm(self, module: str, size: int) -> list[Row]:
        """Of an RMSNorm over `size` numbers of a token."""
        columns, note = size, ""
        if module == "kv_a_layernorm":
            columns, note = size + self.model.qk_rope_head_dim, "latent and rotary key, one tensor"
        return [
            self.weight(module, "Fprop", (size,), note="norms are computed in FP32"),
            self.wide(module, "input", "kept", columns, note),
            self.wide(module, "1 / rms", "kept", 1, format="FP32"),
        ]

    def router(self, shape: Shape) -> list[Row]:
        """Of scores and choice."""
        c, wide, own = self.model, self.precision.wide, "products of the router are in FP32"
        experts, chosen = c.n_routed_experts, c.num_experts_per_tok
        shared = not self.precision.in_fp8 and c.n_shared_experts
        same = "the input of shared_experts.gate_up_proj, one tensor" if shared else ""
        rows = [self.weight(ROUTER, "step", shape, note="rounded from the FP32 master")] if wide != "FP32" else []
        rows += [
            self.weight(ROUTER, "Fprop, Dgrad", shape, "FP32", own),
            self.wide(ROUTER, "input", "Fprop, Wgrad", c.hidden_size, own, "FP32"),
            self.wide(ROUTER, "output", "Fprop", experts, format="FP32"),
            self.wide(ROUTER, "gradient", "Dgrad, Wgrad", experts, format="FP32"),
            self.wide(ROUTER, "input", "kept", 0 if shared else c.hidden_size, same),
            self.wide(ROUTER, "scores", "kept", experts, format="FP32"),
            self.wide(ROUTER, "choice", "kept", chosen, format="INT64"),
            self.wide(ROUTER, "weights", "kept", chosen, "of each row, which the SwiGLU multiplies", "FP32"),
        ]
        if c.norm_topk_prob:
            rows.append(self.wide(ROUTER, "normalisation", "kept", chosen + 1, format="FP32"))
        if c.aux_loss_alpha:
            loss = self.wide(ROUTER, "balance loss", "kept", 1, format="FP32")
            rows += [loss, replace(loss, per="sequence", bytes=loss.bytes * experts)]
        return rows

    def linear(self, module: str, shape: Shape) -> list[Row]:
        """Of one linear, or of all the routed experts'."""
        (outputs, inputs), p = shape[-2:], self.precision
        wide, down = p.wide, module.endswith("down_proj")
        if not p.in_fp8:
            shares = module == "kv_a_proj_with_mqa"
            first = "q_a_proj" if self.model.q_lora_rank is not None else "q_proj"
            kept = self.activation(module, "input", "kept", inputs, wide, "-", "-")
            if shares:
                kept = replace(kept, bytes=0.0, note=f"the input of {first}, one tensor")
            return [
                self.weight(module, "Fprop, Dgrad", _flat(shape)),
                self.activation(module, "input", "Fprop", inputs, wide, "-", "-"),
                *([self.activation(module, "SwiGLU input", "kept", 2 * inputs, wide, "-", "-")] if down else []),
                kept,
                self.activation(module, "output", "Fprop", outputs, wide, "-", "-"),
                self.activation(module, "gradient", "Dgrad, Wgrad", outputs, wide, "-", "-"),
            ]
        scale = p.scale(module)
        return [
            *self.weights(module, shape),
            self.activation(module, "input", "Fprop", inputs, "E4M3", "1x128", scale),
            self.activation(module, "output", "Fprop", outputs, wide, "-", "-"),
            *self.kept(module, inputs),
            self.activation(module, "gradient", "Dgrad", outputs, "E4M3", "1x128", scale),
            self.activation(module, "gradient", "Wgrad", outputs, "E4M3", "128x1", scale, f"from the {wide} gradient"),
        ]

    def weights(self, module: str, shape: Shape) -> Iterator[Row]:
        """A linear's weight in FP8: as stored, as the products read it, and as it is held for the step."""
        p, back_end, flat = self.precision, self.precision.back_end(module), _flat(shape)
        scale = p.scale(module) if back_end != DEEP_GEMM else "FP32 2^n" if p.fp8.scales == "pow2" else "FP32"
        one = self.weight(module, "Fprop, Dgrad", shape[-2:], "E4M3", scale=scale)
        tiled = replace(one, bytes=flat[0] // shape[-2] * one.bytes)  # blocks start anew at every expert
        held = not p.by_oracle(module) or p.fp8.weights_per_step
        once = "rounded once a step"
        if p.fp8_alone:
            once = "rounded once a step, from the FP32 master"
        else:
            yield self.weight(module, "step", flat, note="rounded from the FP32 master")
        if back_end == ENGINE:
            yield replace(tiled, use="Fprop", note=once)
            yield replace(tiled, use="Dgrad", note="the same numbers, transposed")
            return
        yield replace(tiled, note=once if held or p.fp8_alone else "rounded at every use")
        if back_end == "oracle_fast" and held:
            copy = self.weight(module, "step", flat, "BF16", "the rounded numbers, as the fast product reads them")
            yield replace(copy, tensor="weight, rounded")

    def activation(
        self, module: str, tensor: str, use: str, columns: int, format: str, tile: str, scale: str, note: str = ""
    ) -> Row:
        """Columns of the rows that a linear has for a token."""
        copies = self.model.num_experts_per_tok if module.startswith("experts.") else 1
        size = stored_bytes(copies, columns, format=format, tile=tile, scale_bytes=scale_bytes(scale))
        return Row(self.layer, module, tensor, use, format, tile, scale, "token", size, note)

    def kept(self, module: str, inputs: int) -> Iterator[Row]:
        """What a linear in FP8 keeps of its input, and what its weight gradient reads of it."""
        p, scale, down = self.precision, self.precision.scale(module), module.endswith("down_proj")
        if down and p.swiglu_again(module, self.recompute):
            own = scale if p.by_oracle(module) else "E8M0"  # `CachedSwiGLU`
            again = "the output is computed again"
            yield self.activation(module, "SwiGLU input", "kept", 2 * inputs, "E4M3", "1x128", own, again)
            yield self.activation(module, "input", "Wgrad", inputs, "E4M3", "128x1", scale, "of the output")
            return
        if down:
            yield self.activation(module, "SwiGLU input", "kept", 2 * inputs, p.wide, "-", "-")
        if module == ROUTED and self.recompute == "layer":
            yield self.activation(module, "rows that arrived", "kept", inputs, p.wide, "-", "-")
        cache = p.cache(module)
        format, tile = {"fp8": ("E4M3", "1x128"), "wide": ("E4M3", "128x1"), "e5m6": ("E5M6", "1x128")}[cache]
        yield self.activation(module, "input", "kept", inputs, format, tile, "E8M0" if format == "E5M6" else scale)
        source = {"fp8": "requantised from 1x128", "wide": "from the wide input", "e5m6": "from E5M6"}[cache]
        yield self.activation(module, "input", "Wgrad", inputs, "E4M3", "128x1", scale, source)

    def wires(self) -> Iterator[Row]:
        """Of the experts' rows under way."""
        p, hidden, copies = self.precision, self.model.hidden_size, self.model.num_experts_per_tok
        tensors = (
            ("dispatch of tokens", p.dispatch_wire, "Fprop"),
            ("dispatch of gradients", p.dispatch_grad_wire, "Dgrad"),
            ("combine, both ways", p.combine_wire, "Fprop, Dgrad"),
        )
        for tensor, wire, use in tensors:
            format = p.wide if wire == "model" else {"fp8": "E4M3"}.get(wire, wire.upper())
            tile, scale = ("1x128", "E8M0") if format == "E4M3" else ("-", "-")
            size = stored_bytes(copies, hidden, format=format, tile=tile, scale_bytes=scale_bytes(scale))
            yield Row(self.layer, "", tensor, use, format, tile, scale, "token", size, "on the wire, at most")


def _flat(shape: Shape) -> tuple[int, int]:
    """A stack of weights as one matrix."""
    *stack, outputs, inputs = shape
    return (stack[0] if stack else 1) * outputs, inputs


def _mtp(model: ModelConfig, precision: Precision, recompute: str) -> list[Row]:
    """A module of multi-token prediction: its entry, its layer, and the norm before the head it shares."""
    layer, size = _Layer(model, precision, "MTP", recompute), model.hidden_size
    entry = [*layer.norm("enorm", size), *layer.norm("hnorm", size), *layer.linear("eh_proj", (size, 2 * size))]
    if recompute in ("attend", "layer"):  # runs with the phases of the layer after it
        entry = [replace(row, use="again") if row.use == "kept" else row for row in entry]
    block = [replace(row, layer="MTP") for row in layer_rows(model, precision, moe=True, recompute=recompute)]
    return [*entry, *block, *layer.norm("norm", size)]


def _around(model: ModelConfig, precision: Precision, recompute: str) -> Iterator[Row]:
    layer, size, vocab = _Layer(model, precision, AROUND, recompute), model.hidden_size, model.vocab_size
    yield layer.weight("embed_tokens", "Fprop", (vocab, size))
    # with MTP the main model's loss is computed with the entry of the first module
    use = "again" if model.num_nextn_predict_layers and recompute in ("attend", "layer") else "kept"
    yield from (replace(row, use=use) if row.use == "kept" else row for row in layer.norm("norm", size))
    yield layer.weight("lm_head", "Fprop, Dgrad", (vocab, size))
    yield layer.wide("lm_head", "input", use, size)
    yield layer.wide("lm_head", "logits", "Fprop", vocab, "cross entropy in FP32, in chunks")
    yield layer.wide("lm_head", "logits", use, vocab, "softmax minus one-hot, in the same memory")
    yield layer.wide("", "residual stream", "Fprop, Dgrad", size)
    for tensor, use, format, each, note in (
        ("weight gradients", "Wgrad", "FP32", 1, "a weight; summed over a step"),
        ("master weights", "state", "FP32", 1, "a weight; shared out by ZeRO-1"),
        ("AdamW moments", "state", precision.moments.upper(), 2, "both, a weight; shared out by ZeRO-1"),
    ):
        yield Row(AROUND, "", tensor, use, format, "-", "-", "all", each * BITS[format] / 8, note)
