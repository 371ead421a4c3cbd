"""Initial weights depend on seed and name alone, not on how the model is split."""

import torch

from model.init import initialise
from model.transformer import Transformer
from tests.model.reference import TINY


def whole(seed: int = 0) -> dict[str, torch.Tensor]:
    model = Transformer(TINY)
    initialise(model, std=0.02, seed=seed)
    return dict(model.named_parameters())


def test_stages_and_expert_ranges_hold_slices_of_the_whole_model() -> None:
    reference, held = whole(), dict[str, int]()
    for layers in (range(0, 1), range(1, 3), range(3, 4)):
        for experts in (range(0, 2), range(2, 8)):
            stage = Transformer(TINY, layers=layers, expert_ids=experts)
            initialise(stage, std=0.02, seed=0)
            for name, weight in stage.named_parameters():
                expected = reference[name]
                if ".mlp.experts." in name:
                    expected = expected[experts.start : experts.stop]
                assert torch.equal(weight, expected), name
                held[name] = held.get(name, 0) + weight.numel()
    for name, weight in reference.items():
        copies = 1 if ".mlp.experts." in name else 2  # every dense weight is on both expert ranges
        if name == "embed_tokens.weight":
            copies = 4  # and MTP reads the embedding on the last stage
        assert held[name] == copies * weight.numel(), name


def test_weights_are_normal_with_the_given_deviation_and_norms_are_one() -> None:
    for name, weight in whole().items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            deviation = weight.std().item()
            assert abs(deviation / 0.02 - 1) < 6 / weight.numel() ** 0.5, (name, deviation)


def test_every_tensor_and_every_seed_draws_its_own_numbers() -> None:
    first, second = whole(0), whole(1)
    matrices = [name for name, weight in first.items() if weight.ndim > 1]
    starts = {tuple(first[name].flatten()[:4].tolist()) for name in matrices}
    assert len(starts) == len(matrices)
    assert not any(torch.equal(first[name], second[name]) for name in matrices)
    stack = first["layers.1.mlp.experts.gate_up_proj.weight"]
    assert not torch.equal(stack[0], stack[1])


def test_router_biases_start_at_zero() -> None:
    model = Transformer(TINY)
    initialise(model, std=0.02, seed=0)
    biases = [router.e_score_correction_bias for router in model.routers().values()]
    assert len(biases) == 4 and not any(bias.any() for bias in biases)
