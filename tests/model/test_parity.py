"""Equality with transformers' DeepseekV3ForCausalLM, which nobody here wrote."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.convert import published_tensors
from model.transformer import Microbatch
from tests.model.reference import TINY, YARN, build, reference_model, reference_parameters

CASES = {
    "groups": TINY,
    "yarn": YARN,
    "one_group": replace(TINY, n_group=1, topk_group=1),
    "no_query_latent": replace(TINY, q_lora_rank=None),
    "two_shared": replace(TINY, n_shared_experts=2, n_routed_experts=16),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_published_architecture(case: str) -> None:
    """Logits within 2e-5; every parameter's gradient within 1e-4 relative, in FP32."""
    config = replace(CASES[case], num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    model = build(config)
    reference = reference_model(model)
    tokens = torch.randint(0, config.vocab_size, (3, 129), generator=torch.Generator().manual_seed(1))

    theirs = reference(tokens[:, :-1]).logits
    ours = model.logits(tokens[:, :-1])
    assert (ours - theirs).abs().max() < 2e-5

    F.cross_entropy(theirs.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    loss = model(None, Microbatch(tokens))
    loss.loss.backward()
    assert abs(loss.main - F.cross_entropy(theirs.flatten(0, 1), tokens[:, 1:].flatten())) < 1e-5

    grads = {name: weight.main_grad for name, weight in model.named_parameters()}  # type: ignore[attr-defined]
    their_grads = reference_parameters(reference, config, grads=True)
    compared = 0
    for published in published_tensors(config):
        if published.name.endswith("e_score_correction_bias"):
            continue
        expected = their_grads[published.name]
        flat = grads[published.ours].flatten()[published.offset : published.offset + expected.numel()]
        error = (flat.view(expected.shape) - expected).norm() / expected.norm()
        assert error < 1e-4, (published.name, float(error))
        compared += expected.numel()
    assert compared == sum(weight.numel() for weight in model.parameters())
