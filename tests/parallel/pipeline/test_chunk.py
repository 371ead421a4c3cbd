"""A chunk run phase by phase equals the stage run at once, bitwise; in halves, within rounding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.fp8.apply import apply_fp8
from model.fp8.config import FP8Config
from model.transformer import Microbatch, StageLoss, Transformer
from parallel.pipeline.chunk import ModelChunk, ModelStages
from parallel.pipeline.phases import Phase, backward_program, forward_program
from tests.model.reference import TINY, build

CONFIG = replace(TINY, aux_loss_alpha=0.01)
CONFIGS = {
    "v3": CONFIG,
    "two_depths": replace(CONFIG, num_nextn_predict_layers=2, mtp_hidden="before_norm"),
    "no_shared_no_mtp": replace(CONFIG, n_shared_experts=0, num_nextn_predict_layers=0),
}
STAGES = {"whole": range(4), "first": range(2), "middle": range(2, 3), "last": range(3, 4), "dense": range(1)}


def batch(seed: int = 1) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    return Microbatch(torch.randint(0, TINY.vocab_size, (2, 12), generator=generator), share=0.5)


def stage_of(config: ModelConfig, layers: range) -> Transformer:
    whole = build(config)
    stage = Transformer(config, layers=layers)
    stage.load_state_dict({name: whole.state_dict()[name] for name in stage.state_dict()})
    return stage


def hidden_for(stage: Transformer) -> Tensor | None:
    generator = torch.Generator().manual_seed(5)
    return None if stage.is_first else torch.randn(2, 11, TINY.hidden_size, generator=generator)


def results(stage: Transformer, outputs: list[Tensor], input_grad: Tensor | None) -> dict[str, Tensor]:
    found = {f"output {i}": output.detach().clone() for i, output in enumerate(outputs)}
    found |= {name: weight.main_grad for name, weight in stage.named_parameters()}  # type: ignore[attr-defined]
    found |= {f"counts {i}": router.counts_E for i, router in stage.routers().items()}
    found |= {f"balance {i}": router.balance_loss_sum for i, router in stage.routers().items()}
    return found if input_grad is None else found | {"input": input_grad}


def at_once(config: ModelConfig, layers: range) -> dict[str, Tensor]:
    stage = stage_of(config, layers)
    hidden = hidden_for(stage)
    leaf = None if hidden is None else hidden.requires_grad_()
    out = stage(leaf, batch())
    if isinstance(out, StageLoss):
        out.loss.backward()
        return results(stage, [out.loss, out.main, *out.mtp], None if leaf is None else leaf.grad)
    out.backward(torch.cos(out.detach()))
    return results(stage, [out], None if leaf is None else leaf.grad)


def by_phases(
    config: ModelConfig,
    layers: range,
    *,
    halves: int,
    recompute: str,
    split: bool,
    change: Callable[[Transformer], Any] = lambda stage: None,
) -> dict[str, Tensor]:
    """split: all weight gradients after everything else; change: of the stage, before anything runs."""
    stage = stage_of(config, layers)
    change(stage)
    stages = ModelStages({0: stage}, cut=True, recompute=recompute)
    chunk = stages.new_chunk(0, batch(), halves)
    assert isinstance(chunk, ModelChunk)
    chunk.begin(hidden_for(stage))
    for phase in forward_program(stages.num_links(0), halves=halves):
        chunk.run(phase)
    grad = None if chunk.output is None else torch.cos(chunk.output)
    chunk.begin_backward(grad)
    for phase in backward_program(stages.num_links(0), halves=halves, weights=not split):
        chunk.run(phase)
    if split:
        assert not any(getattr(w, "main_grad", torch.zeros(1)).any() for w in stage.parameters())
        chunk.run(Phase("weights", 0))
    outputs = [chunk.output] if chunk.loss is None else [chunk.loss.loss, chunk.loss.main, *chunk.loss.mtp]
    assert all(output is not None and not output.requires_grad for output in outputs)
    return results(stage, outputs, chunk.input_grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["none", "report", "attend", "layer"])
@pytest.mark.parametrize("split", [False, True], ids=["B", "I_W"])
@pytest.mark.parametrize("part", STAGES)
@pytest.mark.parametrize("name", CONFIGS)
def test_phases_equal_the_stage_bitwise(name: str, part: str, split: bool, recompute: str) -> None:
    """Outputs, losses, gradients, and the routers' sums, which recomputation must not count twice."""
    expected = at_once(CONFIGS[name], STAGES[part])
    found = by_phases(CONFIGS[name], STAGES[part], halves=1, recompute=recompute, split=split)
    assert found.keys() == expected.keys()
    different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not different


@pytest.mark.parametrize("recompute", ["none", "report", "layer"])
@pytest.mark.parametrize("part", STAGES)
def test_halves_equal_the_stage_within_rounding(part: str, recompute: str) -> None:
    expected = at_once(CONFIG, STAGES[part])
    found = by_phases(CONFIG, STAGES[part], halves=2, recompute=recompute, split=False)
    for key, value in expected.items():
        error, size = (found[key] - value).double().norm(), value.double().norm()
        assert error <= 2e-6 * size, key


@pytest.mark.parametrize("keys", [{}, {"scales": "fp32", "attention_cache": "fp8"}], ids=["pow2", "fp32"])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("split", [False, True], ids=["B", "I_W"])
def test_in_fp8_every_level_is_bitwise_the_same(split: bool, halves: int, keys: dict[str, Any]) -> None:
    """What is rounded later or earlier, computed again or held, is the same number."""
    fp8 = FP8Config(native=False, **keys)

    def found(recompute: str) -> dict[str, Tensor]:
        return by_phases(
            CONFIG, STAGES["whole"], halves=halves, recompute=recompute, split=split, change=lambda s: apply_fp8(s, fp8)
        )  # fmt: skip

    plain = found("none")
    for level in ("report", "attend", "layer"):
        less = found(level)
        assert not [key for key, value in plain.items() if not torch.equal(less[key], value)], level


def test_recomputation_saves_less_for_the_backward() -> None:
    saved: dict[str, int] = {}
    for recompute in ("none", "attend", "layer"):
        stages = ModelStages({0: stage_of(CONFIG, STAGES["middle"])}, cut=True, recompute=recompute)
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        chunk = stages.new_chunk(0, batch(), 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chunk.begin(torch.randn(2, 11, TINY.hidden_size))
            for phase in forward_program(stages.num_links(0)):
                chunk.run(phase)
        saved[recompute] = sum(storages.values())
    assert saved["layer"] == 0 < saved["attend"] < saved["none"]
