"""A layer that keeps less: gradients to the bit, in every precision, and the bytes that the formula says."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.block import Block, MoE
from model.config import ModelConfig
from model.dispatch import LocalDispatcher
from model.fp8.apply import apply_fp8
from model.fp8.config import FP8Config
from model.fp8.formats import Tile
from model.fp8.linear import FP8Layer
from model.fp8.memory import bytes_kept
from model.fp8.precision_map import Precision
from model.fp8.quantise import Quantiser
from model.fp8.swiglu import CachedSwiGLU
from model.linear import GroupedLinear, Linear
from model.mlp import swiglu
from model.recompute import keep_less
from model.rope import rotations
from model.weight_grad import main_grad, set_sink
from parallel.pipeline.weight_grad import Contributions, DeferredSink
from tests.model.fp8.data import wild
from tests.model.fp8.test_memory import DTYPES, LENGTH, SEQUENCES, WIDER

MODELS = {
    "v3": WIDER,
    "no_query_latent": replace(WIDER, q_lora_rank=None),
    "no_shared_no_loss": replace(WIDER, n_shared_experts=0, aux_loss_alpha=0.0),
}
FP8_KEYS: list[dict[str, Any]] = [{}, {"scales": "fp32"}, {"attention_cache": "fp8", "backend": "oracle_exact"}]
CASES: list[tuple[str, dict[str, Any]]] = [("fp32", {}), ("bf16", {}), *(("fp8", keys) for keys in FP8_KEYS)]


def block_of(model: ModelConfig, precision: str, fp8: FP8Config, *, moe: bool) -> Block:
    experts = model.n_routed_experts
    block = Block(model, moe=moe, expert_ids=range(experts), dispatcher=LocalDispatcher(experts) if moe else None)
    generator = torch.Generator().manual_seed(1)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    block.to(DTYPES[precision])
    if isinstance(block.mlp, MoE):
        block.mlp.gate.e_score_correction_bias = torch.zeros(experts)
    if precision == "fp8":
        apply_fp8(block, fp8)
    return block


def inputs(model: ModelConfig, precision: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SEQUENCES, LENGTH, model.hidden_size, generator=generator)
    return x.to(DTYPES[precision]).requires_grad_()


def results(block: Block, model: ModelConfig, precision: str) -> dict[str, Tensor]:
    """Output and every gradient, the weights' put off until the rest is done."""
    sink, put_off, x = DeferredSink(), Contributions(), inputs(model, precision)
    set_sink(block, sink)
    out = block(x, rotations(model, LENGTH), 1.0)
    with sink.collecting(put_off):
        out.backward(torch.cos(out.detach().float()).to(out.dtype))
    sink.run(put_off)
    assert x.grad is not None
    return {"output": out.detach(), "input": x.grad} | {n: main_grad(w) for n, w in block.named_parameters()}


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize(("precision", "keys"), CASES)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_the_same_to_the_bit(model: str, precision: str, keys: dict[str, Any], moe: bool) -> None:
    fp8 = FP8Config(native=False, **keys)
    blocks = [block_of(MODELS[model], precision, fp8, moe=moe) for _ in range(2)]
    keep_less(blocks[1])
    plain, less = (results(block, MODELS[model], precision) for block in blocks)
    assert plain.keys() == less.keys() and all(grad.any() for grad in plain.values())
    assert not [name for name, value in plain.items() if not torch.equal(less[name], value)]


@pytest.mark.parametrize(
    ("module", "right", "seen"),
    [
        ("input_layernorm", 1, "self_attn.q_a_proj.weight"),
        ("post_attention_layernorm", 1, "mlp.gate.proj.weight"),
        ("self_attn.kv_a_layernorm", 1, "self_attn.kv_b_proj.weight"),
        ("self_attn.q_b_proj", 0, "self_attn.q_a_proj.weight"),  # called in the backward alone
    ],
)
def test_a_wrong_recomputation_is_seen(module: str, right: int, seen: str) -> None:
    """After some right times a module gives a little more than it gave in the forward."""
    blocks = [block_of(WIDER, "fp32", FP8Config(), moe=True) for _ in range(2)]
    keep_less(blocks[1])
    times = iter(range(100))

    def more(_module: Any, _given: Any, out: Any) -> Any:
        return out * (1 if next(times) < right else 1.01)

    blocks[1].get_submodule(module).register_forward_hook(more)
    plain, less = (results(block, WIDER, "fp32") for block in blocks)
    assert torch.equal(plain["output"], less["output"])
    assert not torch.equal(plain[seen], less[seen])


def kept_after_forward(block: Block, model: ModelConfig, precision: str) -> int:
    """Bytes of the allocator that only the graph still holds."""
    x, spin = inputs(model, precision), rotations(model, LENGTH)
    block(x, spin, 1.0)  # what is rounded or made once is there
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out = block(x, spin, 1.0)
    results: Any = recorded.profiler
    level = sum(e.nbytes() for e in results.kineto_results.events() if e.name() == "[memory]")
    return level - out.nbytes + x.nbytes  # the input is on the layer's list


@pytest.mark.parametrize(("precision", "keys"), [("fp32", {}), ("bf16", {}), ("fp8", {}), ("fp8", {"scales": "fp32"})])
@pytest.mark.parametrize("level", ["none", "report"])
def test_bytes_kept_are_the_formula(level: str, precision: str, keys: dict[str, Any]) -> None:
    fp8 = FP8Config(native=False, **keys)
    block = block_of(WIDER, precision, fp8, moe=True)
    if level == "report":
        keep_less(block)
    tokens, kind = SEQUENCES * LENGTH, Precision(precision, fp8)
    formula = bytes_kept(WIDER, kind, moe=True, tokens=tokens, sequences=SEQUENCES, recompute=level)
    index = LocalDispatcherBytes(WIDER)
    measured = kept_after_forward(block, WIDER, precision)
    assert formula <= measured <= formula + index.most, (measured - formula, index.most)
    everything = bytes_kept(WIDER, kind, moe=True, tokens=tokens, sequences=SEQUENCES)
    assert level == "none" or formula < 0.8 * everything


class LocalDispatcherBytes:
    """Lists of the dispatcher in one process, and allocations rounded up, which are on no layer's list."""

    def __init__(self, model: ModelConfig) -> None:
        copies = SEQUENCES * LENGTH * model.num_experts_per_tok
        self.most = copies * 32 + 64 * 100


def grouped(counts: tuple[int, ...]) -> GroupedLinear:
    down = GroupedLinear(len(counts), 160, 96)
    down.weight.data = wild((len(counts), 96, 160), seed=1, octaves=0) * 0.05
    return down


@pytest.mark.parametrize("counts", [None, (70, 0, 58)])
def test_a_projection_of_elsewhere_reads_the_rounded_swiglu(counts: tuple[int, ...] | None) -> None:
    """Forward as it is; gradients are those at the rounded input, bit for bit."""
    rows, weights = Quantiser(Tile.ROW), torch.rand(128) if counts else None
    gate_up, grad = wild((128, 320), seed=2, octaves=0), wild((128, 96), seed=3, octaves=0)
    found = []
    for cached in (True, False):
        down = grouped(counts) if counts else Linear(160, 96)
        down.weight.data = grouped(counts or (128,)).weight.data if counts else grouped((128,)).weight.data[0]
        leaf = (gate_up if cached else rows.quantise(gate_up, counts).dequantise()).clone().requires_grad_()
        factors = None if weights is None else weights.clone().requires_grad_()
        if cached:
            y = CachedSwiGLU(rows)(leaf, down, factors, counts)
            exact = swiglu(gate_up, weights)
            assert torch.equal(y, down(exact, counts) if counts else down(exact))  # type: ignore[call-arg]
        else:
            hidden = swiglu(leaf, factors)
            y = down(hidden, counts) if counts else down(hidden)  # type: ignore[call-arg]
        y.backward(grad)
        found.append([leaf.grad, main_grad(down.weight), None if factors is None else factors.grad])
    for ours, plain in zip(*found, strict=True):
        assert (ours is None) is (plain is None)
        assert ours is None or plain is None or torch.equal(ours, plain)


def test_a_weight_gradient_that_waits_holds_one_byte_a_number() -> None:
    block = block_of(WIDER, "fp8", FP8Config(native=False), moe=True)
    keep_less(block)
    layers = [m.fp8 for m in block.modules() if isinstance(m, Linear | GroupedLinear) and m.fp8 is not None]
    assert len(layers) == 9 and all(isinstance(layer, FP8Layer) and layer.hold_rounded for layer in layers)
    held = layers[0].held_gradient(wild((256, 128), seed=1, octaves=0), (256,))  # type: ignore[union-attr]
    assert held.num_bytes == 256 * 128 + 2 * 128
