"""The model as a whole: stages chain to it, MTP predicts what it should, BF16 stays near FP32."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.block import Block, MoE, merge
from model.config import ModelConfig
from model.init import initialise
from model.transformer import Microbatch, StageLoss, Transformer
from tests.model.reference import TINY, build


def tokens(*, batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(seed))


def whole(model: Transformer, batch: Microbatch) -> StageLoss:
    result = model(None, batch)
    assert isinstance(result, StageLoss)
    return result


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: weight.main_grad for name, weight in model.named_parameters()}  # type: ignore[attr-defined]


def mtp_by_hand(model: Transformer, window: Tensor) -> list[float]:
    """Equations 21 to 25 for one sequence t_0..t_S and every depth, from the modules' own weights.

    Depth k at position i joins the embedding of t_(i+k) with the state of depth k - 1 and predicts t_(i+k+1); only
    positions where both exist are computed here at all.
    """
    config, length = model.config, len(window) - 1
    assert model.embed_tokens is not None and model.norm is not None and model.lm_head is not None
    hidden = model.run_layers(None, Microbatch(window[None]))
    state = model.norm(hidden) if config.mtp_hidden == "after_norm" else hidden
    found = []
    for depth, module in enumerate(model.mtp, start=1):
        valid = length - depth  # positions 0..S-k-1 have a target
        embedded = model.embed_tokens.weight[window[depth : depth + valid]]
        joined = torch.cat([module.enorm(embedded), module.hnorm(state[0, :valid])], -1)  # type: ignore[operator]
        hidden = module.block((joined @ module.eh_proj.weight.t())[None], model.rotations[:valid], 1.0)  # type: ignore
        normed = module.norm(hidden)  # type: ignore[operator]
        state = normed if config.mtp_hidden == "after_norm" else hidden
        logits = normed[0] @ model.lm_head.weight.t()
        targets = window[depth + 1 : depth + 1 + valid]
        found.append(float(F.cross_entropy(logits, targets, reduction="sum").detach()) / length)
    return found


@pytest.mark.parametrize("mtp_hidden", ["after_norm", "before_norm"])
@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_losses_equal_their_equations(depth: int, mtp_hidden: str) -> None:
    model = build(replace(TINY, num_nextn_predict_layers=depth, mtp_hidden=mtp_hidden))
    batch = Microbatch(tokens())
    losses = whole(model, batch)
    by_hand = [mtp_by_hand(model, window) for window in batch.tokens]
    assert len(losses.mtp) == depth
    for k in range(depth):
        assert losses.mtp[k].item() == pytest.approx(sum(row[k] for row in by_hand) / len(by_hand), rel=2e-6)


def test_the_two_states_that_mtp_may_read_differ() -> None:
    results = []
    for convention in ("after_norm", "before_norm"):
        model = build(replace(TINY, mtp_hidden=convention))
        results.append(whole(model, Microbatch(tokens())))
    assert torch.equal(results[0].main, results[1].main)
    assert (results[0].mtp[0] - results[1].mtp[0]).abs() > 1e-5


@pytest.mark.parametrize("depth", [1, 2])
def test_the_weighted_loss_is_main_plus_lambda_times_the_mean_mtp(depth: int) -> None:
    model = build(replace(TINY, num_nextn_predict_layers=depth))
    losses = whole(model, Microbatch(tokens(), share=0.25, mtp_lambda=0.7))
    expected = 0.25 * (losses.main + 0.7 * torch.stack(losses.mtp).mean())
    assert losses.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_main_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model, window = build(TINY), tokens()
    expected = F.cross_entropy(model.logits(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
    assert whole(model, Microbatch(window)).main.item() == pytest.approx(expected.item(), rel=1e-6)


def test_stages_chain_to_the_whole_model() -> None:
    """Losses bitwise, gradients too: the same operations in the same order."""
    model, batch = build(TINY), Microbatch(tokens(), share=0.5)
    expected = whole(model, batch)
    expected.loss.backward()
    stages = [Transformer(TINY, layers=layers) for layers in (range(0, 1), range(1, 3), range(3, 4))]
    hidden = None
    for stage in stages:
        stage.load_state_dict({name: model.state_dict()[name] for name in stage.state_dict()})
        hidden = stage(hidden, batch)
    assert isinstance(hidden, StageLoss)
    assert torch.equal(hidden.loss, expected.loss)
    hidden.loss.backward()
    reference, seen = gradients(model), dict[str, Tensor]()
    for stage in stages:
        for name, grad in gradients(stage).items():
            seen[name] = seen[name] + grad if name in seen else grad
    assert seen.keys() == reference.keys()
    for name, grad in seen.items():
        if name == "embed_tokens.weight":  # two uses, added up in another order
            torch.testing.assert_close(grad, reference[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(grad, reference[name]), name


def test_shares_of_micro_batches_sum_to_the_global_batch() -> None:
    """Two half batches with half shares give the gradients of the whole batch, balance loss included."""
    config = replace(TINY, aux_loss_alpha=0.1)
    model, window = build(config), tokens(batch=4)
    whole(model, Microbatch(window)).loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    for grad in gradients(model).values():
        grad.zero_()
    for half in window.chunk(2):
        whole(model, Microbatch(half, share=0.5)).loss.backward()
    for name, grad in gradients(model).items():
        assert (grad - expected[name]).norm() / expected[name].norm() < 1e-5, name


def test_the_balance_loss_reaches_the_router_and_only_in_training() -> None:
    grads = []
    for alpha, training in ((0.0, True), (0.5, True), (0.5, False)):
        model = build(replace(TINY, aux_loss_alpha=alpha)).train(training)
        whole(model, Microbatch(tokens())).loss.backward()
        grads.append(gradients(model)["layers.2.mlp.gate.proj.weight"])
    assert (grads[0] - grads[1]).norm() > 0.01 * grads[0].norm()
    assert torch.equal(grads[0], grads[2])


def test_routed_tokens_are_counted_in_every_moe_block() -> None:
    model = build(TINY)
    whole(model, Microbatch(tokens()))
    counts = {block: int(router.counts_E.sum()) for block, router in model.routers().items()}
    assert counts == dict.fromkeys((1, 2, 3, 4), 2 * 12 * TINY.num_experts_per_tok)  # block 4 is MTP's


def test_phases_in_order_are_the_forward() -> None:
    block = build(TINY).layers["1"]
    assert isinstance(block, Block) and isinstance(block.mlp, MoE)
    h, turns = torch.randn(2, 6, TINY.hidden_size), build(TINY).rotations[:6]
    attended = block.attend(h, turns, 1.0)
    assert attended.routing is not None
    routing, dispatcher = attended.routing, block.mlp.dispatcher
    sent = dispatcher.dispatch(attended.x_BSD.flatten(0, 1), routing.ids_TK, routing.weights_TK).wait()
    rows = block.mlp.experts(sent.rows_RD, sent.weights_R, sent.counts)
    routed = dispatcher.combine(rows, sent.handle).wait().sum_TD
    out = merge(attended.residual_BSD, routed, block.mlp.shared(attended.x_BSD))
    assert torch.equal(out, block(h, turns, 1.0))


def in_bf16(config: ModelConfig) -> Transformer:
    model = build(config)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    return model


@pytest.mark.parametrize("change", [{}, {"num_nextn_predict_layers": 2, "q_lora_rank": None}], ids=["v3", "depth_2"])
def test_bf16_stays_near_fp32(change: dict[str, int | None]) -> None:
    """Losses within 0.1%, every gradient within 5% in norm and all together within 2%.

    All experts are chosen: else a token whose two best scores are close takes another expert, which is no rounding.
    """
    config = replace(TINY, num_experts_per_tok=8, topk_group=4, **change)  # type: ignore[arg-type]
    wide, narrow = build(config), in_bf16(config)
    batch = Microbatch(tokens(length=32))
    exact, rounded = whole(wide, batch), whole(narrow, batch)
    exact.loss.backward()
    rounded.loss.backward()
    assert rounded.loss.dtype == torch.float32
    assert abs(rounded.main / exact.main - 1) < 1e-3
    assert abs(rounded.mtp[0] / exact.mtp[0] - 1) < 1e-3
    theirs, ours = gradients(wide), gradients(narrow)
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        assert (grad - theirs[name]).norm() / theirs[name].norm() < 0.05, name
    together = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    assert together / torch.cat([grad.flatten() for grad in theirs.values()]).norm() < 0.02


def test_bf16_with_sparse_routing_has_a_near_loss_and_finite_gradients() -> None:
    wide, narrow, batch = build(TINY), in_bf16(TINY), Microbatch(tokens(length=32))
    rounded = whole(narrow, batch)
    rounded.loss.backward()
    assert abs(rounded.main / whole(wide, batch).main - 1) < 5e-3
    assert all(torch.isfinite(grad).all() and grad.any() for grad in gradients(narrow).values())


def test_a_model_without_mtp_has_no_second_embedding() -> None:
    config = replace(TINY, num_nextn_predict_layers=0)
    last = Transformer(config, layers=range(2, 4))
    assert last.embed_tokens is None and not last.mtp
    initialise(last, std=0.02, seed=0)
    result = last(torch.randn(2, 12, TINY.hidden_size), Microbatch(tokens()))
    assert isinstance(result, StageLoss) and result.mtp == ()
