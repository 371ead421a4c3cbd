"""Dropped tensors: the same gradients, computed again once, and nothing kept; what is not recognised is kept."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from model.dropping import Dropped, dropping, project
from model.linear import GroupedLinear, Linear
from model.norm import RMSNorm
from model.weight_grad import main_grad


class Counted:
    """norm(x) for the backward, counting."""

    def __init__(self, norm: RMSNorm, x: Tensor) -> None:
        self.norm, self.x, self.calls = norm, x.detach(), 0
        self.last: weakref.ref[Tensor] | None = None

    def __call__(self) -> tuple[Tensor]:
        self.calls += 1
        y = self.norm(self.x)
        self.last = weakref.ref(y)
        return (y,)


def two_linears(*, drop: bool) -> tuple[list[Tensor], Counted]:
    torch.manual_seed(0)
    norm, left, right, stack = RMSNorm(16, 1e-6), Linear(16, 8), Linear(16, 8), GroupedLinear(2, 16, 8)
    for linear in (left, right, stack):
        torch.nn.init.normal_(linear.weight)
    x = torch.randn(10, 16, requires_grad=True)
    again = Counted(norm, x)
    y = norm(x)
    part = Dropped(again).part(0) if drop else None
    out = project(left, y, part) + project(right, y.view(2, 5, 16), part).flatten(0, 1)
    out = out + project(stack, y, part, (4, 6))
    assert again.calls == 0
    del y, part
    out.backward(torch.cos(out.detach()))
    assert x.grad is not None
    return [out.detach(), x.grad, *(main_grad(m.weight) for m in (norm, left, right, stack))], again


def test_gradients_are_the_same_to_the_bit_and_it_is_computed_once() -> None:
    (kept, never), (dropped, once) = two_linears(drop=False), two_linears(drop=True)
    assert never.calls == 0 and once.calls == 1
    assert all(grad.any() for grad in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, dropped, strict=True))
    gc.collect()
    assert once.last is not None and once.last() is None  # gone with the backward


def test_a_wrong_recipe_shows_in_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = two_linears(drop=False)
    monkeypatch.setattr(Counted, "__call__", lambda self: (self.norm(self.x) * 1.0001,))
    wrong, _ = two_linears(drop=True)
    different = [not torch.equal(a, b) for a, b in zip(kept, wrong, strict=True)]
    assert different == [False, False, False, True, True, True]  # output, input, norm; the weights that read it


def weighted(y: Tensor) -> Tensor:
    """A kernel of torch's that saves its input."""
    return y.pow(3).flatten(0, -2)


def test_a_kernel_saves_a_note_and_finds_the_tensor() -> None:
    norm, grads = RMSNorm(16, 1e-6), []
    for drop in (False, True):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, kept = norm(x), x.detach()
        with dropping(Dropped(lambda kept=kept: (norm(kept),)) if drop else None, y):
            out = weighted(y[:, 1:])
        seen = weakref.ref(y.untyped_storage())
        del y
        gc.collect()
        assert (seen() is None) is drop
        out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_copy_is_kept_and_nothing_is_done_without_gradients() -> None:
    def fail() -> tuple[Tensor]:
        raise AssertionError("computed again although it was kept")

    x = torch.randn(5, 16, requires_grad=True)
    with dropping(Dropped(fail), x * 2.0):
        out = weighted(x * 2.0)  # another tensor with the same numbers
    out.sum().backward()
    linear = Linear(16, 8)
    torch.nn.init.normal_(linear.weight)
    with torch.no_grad(), dropping(Dropped(fail), x):
        project(linear, weighted(x), Dropped(fail).part(0))
    assert x.grad is not None
