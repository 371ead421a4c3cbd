"""The two sides of tests/bench/peer_run.py are one model and one recipe: losses, gradients and biases of a step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.config import RunConfig
from model.convert import published_tensors
from model.init import initialise
from model.transformer import Microbatch, Transformer
from optim.router_bias import update_bias
from tests.bench.peer_model import Peer
from tests.launcher.spine import MODEL, config, write_tokens
from tests.model.reference import reference_parameters


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    prefix = write_tokens(str(Path(tmp_path_factory.mktemp("data")) / "tokens"))
    return config(prefix, pipeline=1, expert=1, data=1, schedule="1f1b")


def batches(num: int = 2) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, MODEL.vocab_size, (3, 33), generator=generator) for _ in range(num)]
    return [Microbatch(part, share=1 / num, mtp_lambda=0.3) for part in tokens]


def test_losses_gradients_and_biases_of_a_step_are_ours(run_config: RunConfig) -> None:
    ours, theirs = Transformer(run_config.model), Peer(run_config)
    initialise(ours, std=run_config.model.initializer_range, seed=run_config.train.seed)
    for batch in batches():
        mine, other = ours(None, batch), theirs.losses(batch)
        assert other.mtp is not None
        assert abs(mine.main - other.main) < 2e-6 and abs(mine.mtp[0] - other.mtp) < 2e-6
        mine.loss.backward()
        other.loss.backward()
    assert theirs.mtp is not None
    stem = f"model.layers.{run_config.model.num_hidden_layers}."
    found = reference_parameters(theirs.model, run_config.model, grads=True)
    found |= {f"{stem}{name}": grad for name, grad in _grads_of_mtp(theirs).items()}
    compared = 0
    for published in published_tensors(run_config.model):
        name = published.name
        if name.endswith("e_score_correction_bias") or name in (
            f"{stem}embed_tokens.weight",
            f"{stem}shared_head.head.weight",
        ):
            continue  # copies of what the main model has
        grad, weight = found[name], ours.get_parameter(published.ours)
        flat = weight.main_grad.flatten()[published.offset : published.offset + grad.numel()]  # type: ignore
        assert (flat.view_as(grad) - grad).norm() <= 1e-4 * grad.norm(), name
        compared += grad.numel()
    assert compared == sum(weight.numel() for weight in ours.parameters())
    loads = theirs.balance_experts(0.01)
    for router, gate, load in zip(ours.routers().values(), theirs.gates(), loads, strict=True):
        assert load == router.counts_E.max() * len(router.counts_E) / router.counts_E.sum()
        update_bias(router.e_score_correction_bias, router.counts_E, 0.01)
        assert torch.equal(gate.e_score_correction_bias, router.e_score_correction_bias)


def _grads_of_mtp(peer: Peer) -> dict[str, torch.Tensor]:
    assert peer.mtp is not None
    own = {
        "enorm": peer.mtp.enorm,
        "hnorm": peer.mtp.hnorm,
        "eh_proj": peer.mtp.eh_proj,
        "shared_head.norm": peer.mtp.norm,
    }
    found = {f"{name}.weight": part.weight.grad for name, part in own.items()}
    return found | reference_parameters(peer.mtp.block, peer.run.model, grads=True)


def test_held_out_losses_are_ours_and_count_nothing(run_config: RunConfig) -> None:
    ours, theirs = Transformer(run_config.model), Peer(run_config)
    initialise(ours, std=run_config.model.initializer_range, seed=run_config.train.seed)
    theirs.eval()
    (batch,) = batches(1)
    losses_BS = theirs.token_losses(batch.tokens)
    assert losses_BS.shape == (3, 32) and abs(losses_BS.mean() - ours(None, batch).main) < 2e-6
    assert all(not counts.any() for counts in theirs.counts.values())


def test_without_mtp_and_under_autocast(run_config: RunConfig) -> None:
    """BF16 products move a loss by rounding alone; the router's logits stay FP32."""
    plain = replace(run_config, model=replace(run_config.model, num_nextn_predict_layers=0))
    exact, low = Peer(plain), Peer(plain, autocast=True)
    seen = []
    next(low.gates()).register_forward_hook(lambda _, __, out: seen.append(out[0].dtype))
    (batch,) = batches(1)
    found = low.losses(batch)
    assert found.mtp is None and abs(found.main / exact.losses(batch).main - 1) < 1e-2
    assert seen == [torch.float32]
