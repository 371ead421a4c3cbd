"""The kernels of one layer and one micro-batch, phase by phase, priced on a machine. No torch.

Phases are those of `parallel.pipeline.phases`; `attend_weights` and so on are the weight gradients that a phase puts
off. With recompute=attend or layer the whole forward of those phases is added to their gradients; with `report` norms
and the up-projections of attention are computed again, and outputs of SwiGLU.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from math import ceil

from model.config import ModelConfig
from parallel.expert.cost import FP8_TILE, Traffic, Workload, traffic
from parallel.expert.reach import Gate
from parallel.plan.kernels import DEEPEP_SMS, LINK_SHARE, Bill, Machine

PHASES = ("attend", "shared", "experts", "attend_grad", "shared_grad", "experts_grad")


@dataclass(frozen=True)
class LayerShape:
    """What of a layer matters for its time.

    tokens: of a micro-batch on one rank, sequences of `sequence_length`. expert: ranks of the expert axis. fp8:
    products in FP8, else as wide as the rest. element: bytes of a wide number, 4 in FP32. way: how rows travel
    (`parallel.expert.cost.WAYS`). dispatch_wire, dispatch_grad_wire, combine_wire: fp8, bf16 or fp32. recompute: as
    `parallel.recompute`. scale_bytes: of an FP8 tile on the wire, 4 in DeepEP's.
    cut: ranks that share each sequence: every one gathers the latents of all of it and projects them up. imbalance: of
    the fullest rank of an expert group, rows over the mean.
    """

    model: ModelConfig
    tokens: int
    sequence_length: int
    expert: int = 1
    ranks_per_node: int = 8
    fp8: bool = True
    way: str = "node"
    dispatch_wire: str = "fp8"
    dispatch_grad_wire: str = "fp8"
    combine_wire: str = "bf16"
    recompute: str = "none"
    scale_bytes: int = 1
    cut: int = 1
    imbalance: float = 1.0
    element: int = 2

    @property
    def rows(self) -> int:
        """Rows that the experts of a rank get."""
        return round(self.imbalance * self.tokens * self.model.num_experts_per_tok)

    @property
    def local_experts(self) -> int:
        """Routed experts of a rank."""
        return self.model.n_routed_experts // self.expert

    def gate(self) -> Gate:
        """The router, balanced."""
        c = self.model
        return Gate(c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group)

    def workload(self) -> Workload:
        """The rows of an all-to-all of the layer; their bytes are `row_bytes`."""
        per_node = min(self.ranks_per_node, self.expert)
        return Workload(self.gate(), self.expert, per_node, self.tokens, self.model.hidden_size, "bf16")

    def row_bytes(self, wire: str) -> int:
        """Of one row on its way, as `parallel.expert.wire.row_bytes`; ids and weights, under 1%, are not counted."""
        hidden = self.model.hidden_size
        if wire == "fp8":
            return hidden + ceil(hidden / FP8_TILE) * self.scale_bytes
        return hidden * (4 if wire == "fp32" else 2)


def attention_flops(c: ModelConfig, tokens: int, sequence_length: int) -> float:
    """Causal FLOPs of the attention core, forward."""
    return c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * tokens * (sequence_length + 1.0)


@dataclass
class _Pen:
    """Writes kernels of a phase onto the bill."""

    machine: Machine
    shape: LayerShape
    bill: Bill

    def linear(self, phase: str, n: int, k: int, rows: int, *, back: str | None = None) -> None:
        """x[rows, k] W[n, k]: the product and the cast of its input; back: also its two gradients, in that phase."""
        m, fp8 = self.machine, self.shape.fp8
        self.bill.add(phase, "linear_gemm", m.gemm(rows, n, k, fp8=fp8))
        self.cast(phase, rows, k)
        if back is not None:
            self.bill.add(back, "linear_gemm", m.gemm(rows, k, n, fp8=fp8))
            self.cast(back, rows, n)
            weights = f"{back}_weights"
            self.bill.add(weights, "linear_gemm", m.gemm(n, k, rows, fp8=fp8, accumulate=True))
            if fp8:  # both operands again, in tiles along the tokens; the weight transposed for the input gradient
                self.bill.add(weights, "quantise", m.stream("quantise", rows * (2 * k + 3 * n)))
                self.bill.add(back, "quantise", m.stream("quantise", 2 * n * k))

    def cast(self, phase: str, rows: float, columns: int) -> None:
        """BF16 to FP8."""
        if self.shape.fp8:
            self.bill.add(phase, "quantise", self.machine.stream("quantise", 3 * rows * columns))

    def pass_over(self, phase: str, kind: str, elements: float, *, passes: float) -> None:
        """An elementwise kernel on wide numbers that reads and writes so many times its elements."""
        self.bill.add(phase, kind, self.machine.stream(kind, self.shape.element * passes * elements))


def layer_bill(shape: LayerShape, machine: Machine, *, moe: bool) -> Bill:
    """All kernels of one layer, forward and backward, transfers apart."""
    pen = _Pen(machine, shape, Bill())
    _attention(pen)
    if moe:
        _router(pen)
        if shape.model.n_shared_experts:
            _swiglu(pen, "shared", shape.model.n_shared_experts * shape.model.moe_intermediate_size)
        _experts(pen)
    else:
        _swiglu(pen, "attend", shape.model.intermediate_size)
    again = {"none": (), "report": (), "attend": ("attend",), "layer": ("attend", "shared", "experts")}[shape.recompute]
    for (phase, kind), value in list(pen.bill.seconds.items()):
        if phase in again:
            pen.bill.add(f"{phase}_grad", kind, value)
    return pen.bill


def _attention(pen: _Pen) -> None:
    c, T, m = pen.shape.model, pen.shape.tokens, pen.machine
    D, heads = c.hidden_size, c.num_attention_heads
    wide_q, wide_kv, wide_o = heads * c.qk_head_dim, heads * (c.qk_nope_head_dim + c.v_head_dim), heads * c.v_head_dim
    F, B = "attend", "attend_grad"
    latents = (c.q_lora_rank or 0) + c.kv_lora_rank
    again = (B,) if pen.shape.recompute == "report" else ()
    for phase in (F, B, *again):  # the residual's sum in the same kernel: two read, two written; gradients
        pen.pass_over(phase, "norm", 2 * T * D, passes=4)
        pen.pass_over(phase, "norm", T * latents, passes=2)
    if c.q_lora_rank is None:
        pen.linear(F, wide_q, D, T, back=B)
    else:
        pen.linear(F, c.q_lora_rank, D, T, back=B)
        pen.linear(F, wide_q, c.q_lora_rank, T, back=B)
    for phase in again:
        pen.linear(phase, wide_q, c.q_lora_rank or D, T)
    pen.linear(F, c.kv_lora_rank + c.qk_rope_head_dim, D, T, back=B)
    seen = T * pen.shape.cut
    pen.linear(F, wide_kv, c.kv_lora_rank, seen, back=B)
    for phase in again:
        pen.linear(phase, wide_kv, c.kv_lora_rank, seen)
    # heads put together with their positions, forward and for the gradients
    for phase in (F, B, *again):
        pen.pass_over(phase, "elementwise", T * wide_q + seen * (wide_q + wide_kv), passes=1.5)
    flops = attention_flops(c, T, pen.shape.sequence_length)
    pen.bill.add(F, "attention", m.attention(flops, backward=False))
    pen.bill.add(B, "attention", m.attention(2.6 * flops, backward=True))
    pen.linear(F, D, wide_o, T, back=B)
    if pen.shape.fp8:  # kept as E5M6: 12 bits an element
        pen.bill.add(F, "quantise", m.stream("quantise", 3.5 * T * wide_o))
        pen.bill.add(B, "quantise", m.stream("quantise", 3.5 * T * wide_o))
    pen.pass_over(B, "elementwise", T * D, passes=3)  # the branch's gradient joins the residual's


def _router(pen: _Pen) -> None:
    c, T = pen.shape.model, pen.shape.tokens
    for phase, count in (("attend", 1), ("attend_grad", 2)):
        for _ in range(count):
            pen.bill.add(phase, "elementwise", pen.machine.gemm(T, c.n_routed_experts, c.hidden_size, fp8=False))
            scores = pen.machine.stream("elementwise", 40 * T * c.n_routed_experts)  # and two top-k, in FP32
            pen.bill.add(phase, "elementwise", scores)


def _swiglu(pen: _Pen, phase: str, width: int) -> None:
    T, D = pen.shape.tokens, pen.shape.model.hidden_size
    pen.linear(phase, 2 * width, D, T, back=f"{phase}_grad")
    pen.linear(phase, D, width, T, back=f"{phase}_grad")
    pen.pass_over(phase, "elementwise", T * width, passes=3)
    pen.pass_over(f"{phase}_grad", "elementwise", T * width, passes=6)
    pen.cast(f"{phase}_grad", T, 2 * width)  # its input, kept in FP8, back to BF16


def _experts(pen: _Pen) -> None:
    c, shape, m = pen.shape.model, pen.shape, pen.machine
    D, width, R, E = c.hidden_size, c.moe_intermediate_size, shape.rows, shape.local_experts
    received = shape.tokens * (balanced_traffic(shape.workload(), "node").ranks if shape.expert > 1 else 1.0)
    F, B, W = "experts", "experts_grad", "experts_grad_weights"
    wide = shape.element
    size = 1 if shape.fp8 else wide
    for phase in (F, B):  # a row for every expert of a token; sums of a token's rows
        pen.bill.add(phase, "elementwise", m.stream("elementwise", size * D * (received + R)))
        pen.bill.add(phase, "elementwise", m.stream("elementwise", wide * D * (received + R)))
    pen.bill.add(F, "grouped_gemm", m.grouped(R, 2 * width, D, fp8=shape.fp8, groups=E))
    pen.bill.add(F, "grouped_gemm", m.grouped(R, D, width, fp8=shape.fp8, groups=E))
    pen.bill.add(B, "grouped_gemm", m.grouped(R, width, D, fp8=shape.fp8, groups=E))
    pen.bill.add(B, "grouped_gemm", m.grouped(R, D, 2 * width, fp8=shape.fp8, groups=E))
    pen.pass_over(F, "elementwise" if not shape.fp8 else "quantise", R * width, passes=2 + size / wide)  # with its cast
    pen.pass_over(B, "elementwise", R * width, passes=6)
    for _ in range(2):  # its input, kept in FP8, back to BF16; the gradient to FP8
        pen.cast(B, R, 2 * width)
    for n, k in ((2 * width, D), (D, width)):
        seconds = m.gemm(n, k, R // E, fp8=shape.fp8, kind="grouped_gemm", groups=E, accumulate=True)
        pen.bill.add(W, "grouped_gemm", seconds)
        if shape.fp8:
            pen.bill.add(W, "quantise", m.stream("quantise", R * (2 * k + 3 * n)))
            pen.bill.add(B, "quantise", m.stream("quantise", 2 * E * n * k))


@dataclass(frozen=True)
class Transfers:
    """Seconds of the four transfers of a layer."""

    dispatch: float
    combine: float
    combine_grad: float
    dispatch_grad: float


def transfers(shape: LayerShape, machine: Machine, *, sms: int) -> Transfers:
    """The all-to-all of a layer on `sms` SMs: links at the share that DeepEP's 24 SMs reach, fewer SMs in proportion.

    combine_grad sends gradients to the experts on the dispatch's way, dispatch_grad brings them back.
    """
    if shape.expert == 1:
        return Transfers(0.0, 0.0, 0.0, 0.0)
    share = LINK_SHARE * min(1.0, sms / DEEPEP_SMS)
    hardware = machine.hardware
    ib, nvlink = share * hardware.ib_bytes_per_second, share * hardware.nvlink_bytes_per_second
    rows, factor = balanced_traffic(shape.workload(), shape.way), machine.calibration.factor
    row_seconds = max(rows.ib_rows / ib, rows.nvlink_rows / nvlink)  # for a byte of each
    dispatch = factor("dispatch") * shape.row_bytes(shape.dispatch_wire) * row_seconds
    grads_out = factor("dispatch") * shape.row_bytes(shape.dispatch_grad_wire) * row_seconds
    combine = factor("combine") * shape.row_bytes(shape.combine_wire) * row_seconds
    latents = latent_bytes(shape) / ib
    moved = Transfers(dispatch + latents, combine, grads_out + 2 * latents, combine)
    # an expert group is as late as its fullest rank
    return Transfers(*(shape.imbalance * getattr(moved, part.name) for part in fields(moved)))


def latent_bytes(shape: LayerShape) -> float:
    """Of the other ranks' latents that attention over a cut sequence gathers; backward also sends their gradients."""
    c = shape.model
    return float(shape.element) * (c.kv_lora_rank + c.qk_rope_head_dim) * shape.tokens * (shape.cut - 1)


@lru_cache(maxsize=256)
def balanced_traffic(workload: Workload, way: str) -> Traffic:
    """`parallel.expert.cost.traffic`, whose integrals take a while, once for each question."""
    return traffic(workload, way=way)
