"""Head and cross entropy in one: equal to the plain two steps, wherever the chunks end."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import loss as loss_module
from model.loss import IGNORED, head_loss
from model.weight_grad import ImmediateSink, main_grad

TOKENS, WIDTH, VOCAB = 11, 6, 17


def case(*, ignored: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [1, T, D], weight [V, D], labels [1, T], incoming gradient [1, T]."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    labels = torch.randint(0, VOCAB, (1, TOKENS), generator=generator)
    labels[0, list(ignored)] = IGNORED
    return h, weight, labels, torch.rand(1, TOKENS, generator=generator)


def ours(h: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = head_loss(h, weight, labels, ImmediateSink())
    loss.backward(grad)
    assert h.grad is not None
    return loss.detach(), h.grad, main_grad(weight)


@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 4, 5, 10, 11, 12, 1000])
@pytest.mark.parametrize("ignored", [(), (0, 4, 10), tuple(range(TOKENS))])
def test_head_loss_equals_logits_and_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int, ignored: tuple[int, ...]
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", tokens_per_chunk * 4 * VOCAB)
    h, weight, labels, grad = case(ignored=ignored)
    wide_h, wide_weight = h.double().requires_grad_(), weight.double().requires_grad_()
    logits = (wide_h @ wide_weight.t()).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORED).view(1, -1)
    expected.backward(grad.double())
    loss, grad_h, grad_weight = ours(h, weight, labels, grad)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad_h.double(), wide_h.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad_weight.double(), wide_weight.grad, rtol=1e-5, atol=2e-6)


def test_an_ignored_position_has_no_loss_and_no_gradient() -> None:
    loss, grad_h, _ = ours(*case(ignored=(0, 4, 10)))
    assert not loss[0, [0, 4, 10]].any() and loss[0, [1, 2, 3]].all()
    assert not grad_h[0, [0, 4, 10]].any() and grad_h[0, 1].any()


def test_without_gradients_the_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 4 * VOCAB)
    h, weight, labels, grad = case(ignored=(3,))
    with torch.no_grad():
        loss = head_loss(h, weight, labels, ImmediateSink())
    assert torch.equal(loss, ours(h, weight, labels, grad)[0])


def test_large_logits_stay_finite() -> None:
    h, weight, labels, grad = case()
    for result in ours(1e4 * h, weight, labels, grad):
        assert torch.isfinite(result).all()


def test_bf16_is_close_to_fp32() -> None:
    """Logits and saved probabilities are BF16: losses within 2%, gradients within 2% in norm."""
    h, weight, labels, grad = case()
    wide = ours(h, weight, labels, grad)
    narrow = ours(h.bfloat16(), weight.bfloat16(), labels, grad)
    assert narrow[0].dtype == narrow[2].dtype == torch.float32 and narrow[1].dtype == torch.bfloat16
    for mine, exact in zip(narrow, wide, strict=True):
        assert (mine.float() - exact).norm() / exact.norm() < 0.02
