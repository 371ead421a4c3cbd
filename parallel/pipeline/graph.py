"""The autograd graphs that a chunk is made of: each a computation between leaves and roots, cut off from the others."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class Graph:
    """A computation between leaves and roots, of whose roots only the edges are kept once `outputs` is cleared.

    again: computes the roots once more, for the backward; the first time then keeps nothing inside.
    """

    def __init__(self, compute: Callable[[], list[Tensor]], *, again: Callable[[], list[Tensor]] | None = None) -> None:
        with torch.set_grad_enabled(again is None):
            self.outputs = compute()
        self._again = again
        self._roots = [get_gradient_edge(root) for root in self.outputs] if again is None else []

    def backward(self, *grads: Tensor | None) -> None:
        """Gradients of the roots (None: a scalar loss) go to the leaves and the sink."""
        roots: Sequence[Any] = self._roots
        if self._again is not None:
            with torch.enable_grad():
                roots = self._again()
        torch.autograd.backward(roots, list(grads))


class _Enter(torch.autograd.Function):
    """x as the input of a graph that need not keep it: its gradient goes to `entrance`."""

    @staticmethod
    def forward(ctx: Any, _needs_grad: Tensor, x: Tensor, entrance: "Entrance") -> Tensor:
        ctx.entrance = entrance
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.entrance.grad = grads[0]
        return None, None, None


class Entrance:
    """The input of a graph whose gradient is wanted; a leaf in its place would stay until then, whoever keeps what."""

    grad: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x for the graph; without gradients (to be computed again) x itself."""
        nothing = torch.empty(0, device=x.device, requires_grad=True)
        return _Enter.apply(nothing, x, self)  # type: ignore[return-value]

    def take(self) -> Tensor:
        """The gradient, once."""
        grad, self.grad = self.grad, None
        assert grad is not None
        return grad
