"""The memory savers of FP8 training one by one: bytes they save in one MoE layer, and the error that each adds.

    python -m tests.bench.fp8_savers [experiment=bench85m]

One MoE layer, forward and backward, same weights, tokens and gradient each time. Bytes are those of all storages that
autograd keeps in between, each once, over the tokens. The error is what the saver changes in the layer's gradients,
its input's or the one weight's that it changes most, relative in norm to the same layer without the saver; 0 is bit by
bit. "Before" is the layer with the savers above it on (attention's output: BF16 before, the error against 128x1 tiles).
Moments: bytes of a weight, and what 20 steps of AdamW change in weights, against FP32 moments.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from launcher.config import compose
from model.block import Block, MoE
from model.config import ModelConfig
from model.dispatch import LocalDispatcher
from model.fp8.apply import apply_fp8
from model.fp8.config import FP8Config
from model.fp8.memory import bytes_kept
from model.fp8.precision_map import Precision
from model.recompute import keep_less
from model.rope import rotations
from model.weight_grad import main_grad
from optim.adamw import AdamW
from optim.config import OptimConfig

SEQUENCES, LENGTH = 4, 256
TOKENS = SEQUENCES * LENGTH
BF16: FP8Config | None = None
WIDE = FP8Config(input_cache="wide", attention_cache="wide", recompute_swiglu=False)


@dataclass(frozen=True)
class Measured:
    """Bytes kept a token, and every gradient of a layer."""

    bytes: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Saver:
    """One row: bytes before and after (a token, or a weight), and the error it adds."""

    name: str
    switch: str
    before: float
    after: float
    error: float


def layer(model: ModelConfig, fp8: FP8Config | None) -> Block:
    """A MoE layer in BF16 with its linears in FP8 if asked for; the same weights each time."""
    experts = model.n_routed_experts
    block = Block(model, moe=True, expert_ids=range(experts), dispatcher=LocalDispatcher(experts))
    draw = torch.Generator().manual_seed(0)
    for weight in block.parameters():
        scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1.0
        weight.data = torch.randn(weight.shape, generator=draw) * scale if weight.dim() > 1 else weight.data
    block.to(torch.bfloat16)
    assert isinstance(block.mlp, MoE)
    block.mlp.gate.e_score_correction_bias = torch.zeros(experts)
    if fp8 is not None:
        apply_fp8(block, fp8)
    return block


def measure(
    model: ModelConfig, fp8: FP8Config | None, prepare: Callable[[Block], None] = lambda block: None
) -> Measured:
    """Forward and backward of the layer; prepare: what else is done to it before."""
    block, spin = layer(model, fp8), rotations(model, LENGTH)
    prepare(block)
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(SEQUENCES, LENGTH, model.hidden_size, generator=draw).bfloat16() for _ in range(2))
    x.requires_grad_()
    kept = bytes_saved(lambda: block(x, spin, 1.0), {*block.parameters(), spin})
    # Once more: a weight that autograd gets back from a hook is another object, without the accumulator.
    block(x, spin, 1.0).backward(grad)
    assert x.grad is not None
    gradients = {name: main_grad(weight) for name, weight in block.named_parameters()}
    return Measured(kept / TOKENS, {"input": x.grad.float(), **gradients})


def bytes_saved(forward: Callable[[], Tensor], there: set[Tensor]) -> int:
    """Of all storages that autograd saves in a forward, each once, but those that are there anyway."""
    counted = {tensor.untyped_storage().data_ptr() for tensor in there}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in counted:
            counted.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)  # so that no other storage comes to lie at the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def error(found: Measured, wanted: Measured) -> float:
    """The largest relative difference of a gradient, in norm."""
    return max(
        float((found.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in wanted.gradients.items()
    )


def moments(kind: str) -> Tensor:
    """What 20 steps change in 65,536 weights."""
    draw = torch.Generator().manual_seed(2)
    master, grad = torch.randn(1 << 16, generator=draw), torch.empty(1 << 16)
    before = master.clone()
    optimizer = AdamW([master], [grad], [True], replace(OPTIM, moments=kind))
    for _ in range(20):
        grad.copy_(torch.randn(grad.shape, generator=draw))
        optimizer.step(lr=1e-3)
    return master - before


OPTIM = OptimConfig(weight_decay=0.1)


def wide_after_attention(block: Block) -> None:
    """The linear after attention in BF16, which keeps its input so."""
    block.self_attn.o_proj.fp8 = None


def savers(model: ModelConfig) -> Iterator[Saver]:
    """Every saver, on top of those before it."""
    cached = replace(WIDE, input_cache="fp8")
    hidden = replace(cached, recompute_swiglu=True)
    narrow = replace(hidden, attention_cache="e5m6")
    wide, rounded, again, twelve = (measure(model, fp8) for fp8 in (WIDE, cached, hidden, narrow))
    plain, in_bf16 = measure(model, BF16), measure(model, hidden, wide_after_attention).bytes
    for name, switch, before, after, of, to in (
        ("linears in FP8, inputs kept 128x1", "train.precision=fp8", plain.bytes, wide.bytes, wide, plain),
        ("inputs kept 1x128, requantised", "fp8.input_cache=fp8", wide.bytes, rounded.bytes, rounded, wide),
        (
            "SwiGLU's input in FP8, output again",
            "fp8.recompute_swiglu=true",
            rounded.bytes,
            again.bytes,
            again,
            rounded,
        ),
        ("attention's output in E5M6, not BF16", "fp8.attention_cache=e5m6", in_bf16, twelve.bytes, twelve, again),
    ):
        yield Saver(name, switch, before, after, error(of, to))
    # Inside model.dropping the hooks that count are not called: what the formula says (tests hold it to the allocator).
    none, report = (
        bytes_kept(model, Precision("fp8", narrow), moe=True, tokens=TOKENS, sequences=SEQUENCES, recompute=level)
        / TOKENS
        for level in ("none", "report")
    )
    less = measure(model, narrow, keep_less)
    yield Saver("norms, up-projections, SwiGLUs again", "parallel.recompute=report", none, report, error(less, twelve))
    full, half = moments("fp32"), moments("bf16")
    yield Saver("AdamW's moments in BF16", "optim.moments=bf16", 8, 4, float((half - full).norm() / full.norm()))


def main() -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m tests.bench.fp8_savers")
    parser.add_argument("overrides", nargs="*", default=["experiment=bench85m"])
    torch.set_num_threads(1)
    print("| saver | switch | bytes before | after | error it adds |\n|---|---|---|---|---|")
    for row in savers(compose(parser.parse_args().overrides).model):
        print(f"| {row.name} | `{row.switch}` | {row.before:,.0f} | {row.after:,.0f} | {row.error:.1e} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
