"""Which layers compute in FP8, that a whole model trains so, and that forgetting a weight's update is noticed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.fp8.apply import apply_fp8, fp8_linears
from model.fp8.config import FP8Config
from model.fp8.linear import FP8Layer, InputCache, StaleWeight, weights_changed
from model.init import initialise
from model.transformer import Microbatch, StageLoss, Transformer
from tests.launcher.spine import MODEL

# Without a choice of experts, which turns a rounding into another expert.
DENSE = replace(MODEL, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)


def built(config: ModelConfig = MODEL, *, fp8: bool = True, **keys: Any) -> Transformer:
    model = Transformer(config)
    initialise(model, std=0.05, seed=0)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    if fp8:
        apply_fp8(model, FP8Config(native=False, **keys))
    return model


def loss_of(model: Transformer) -> torch.Tensor:
    tokens = torch.randint(MODEL.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    result = model(None, Microbatch(tokens))
    assert isinstance(result, StageLoss)
    return result.loss


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: weight.main_grad.clone() for name, weight in model.named_parameters()}  # type: ignore[attr-defined]


def test_every_linear_but_embedding_head_and_router() -> None:
    model = built()
    names = {name for name, module in model.named_modules() if isinstance(getattr(module, "fp8", None), FP8Layer)}
    assert names == set(fp8_linears(model))
    matrices = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.ndim > 1}
    wide = matrices - names
    assert wide == {"embed_tokens", "lm_head", *(n for n in matrices if n.endswith(".gate.proj"))}
    assert {"mtp.0.eh_proj", "layers.3.mlp.experts.down_proj", "layers.0.mlp.gate_up_proj"} <= names


def test_only_the_linear_after_attention_keeps_e5m6() -> None:
    caches = {name: linear.fp8.recipe.input_cache for name, linear in fp8_linears(built()).items()}  # type: ignore
    assert {name for name, cache in caches.items() if cache is InputCache.E5M6} == {
        name for name in caches if name.endswith(".o_proj")
    }


@pytest.mark.parametrize("keys", [{}, {"recompute_swiglu": False, "attention_cache": "fp8"}, {"scales": "fp32"}])
def test_gradients_stay_near_bf16(keys: dict[str, Any]) -> None:
    wide, narrow = gradients(built(fp8=False, config=DENSE)), gradients(built(config=DENSE, **keys))
    assert wide.keys() == narrow.keys()
    # Matrices: the few numbers of a latent's norm are differences of large sums.
    matrices = [name for name in wide if wide[name].ndim > 1]
    errors = {name: ((narrow[name] - wide[name]).norm() / wide[name].norm()).item() for name in matrices}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 0.2, (worst, errors[worst])  # roundings of 2.7e-2 one after another
    assert min(errors[f"{name}.weight"] for name in fp8_linears(built(config=DENSE))) > 1e-2, "a layer stayed wide"


def test_a_forgotten_update_is_noticed() -> None:
    model = built()
    loss_of(model)
    with torch.no_grad():
        model.get_parameter("layers.1.self_attn.o_proj.weight").mul_(1.5)
    with pytest.raises(StaleWeight):
        loss_of(model)
    weights_changed(model)
    loss_of(model)
