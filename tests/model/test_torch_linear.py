"""torch's nn.Linear under the sink has torch's own gradients, at once or put off; other layers are refused by name."""

import pytest
import torch
from torch import Tensor, nn

from model.norm import RMSNorm
from model.torch_linear import ForeignWeight, serve
from model.weight_grad import AddGrad, ImmediateSink, main_grad


class Collecting:
    """Keeps what is put."""

    def __init__(self) -> None:
        self.put_off: list[tuple[Tensor, AddGrad]] = []

    def put(self, weight: Tensor, add: AddGrad) -> None:
        self.put_off.append((weight, add))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), RMSNorm(4, 1e-6))


def inputs() -> Tensor:
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()


def expected() -> tuple[Tensor, dict[str, Tensor]]:
    """torch alone, with its own norm."""
    theirs = network()
    layers = nn.Sequential(theirs[0], theirs[1], theirs[2], nn.RMSNorm(4, eps=1e-6))
    x = inputs()
    layers(x).square().sum().backward()
    assert x.grad is not None
    return x.grad, {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("put_off", [False, True])
def test_gradients_are_torchs(put_off: bool) -> None:
    ours, x, sink = network(), inputs(), Collecting()
    serve(ours, sink if put_off else ImmediateSink())
    ours(x).square().sum().backward()
    assert any(hasattr(weight, "main_grad") for weight in ours.parameters()) != put_off
    with torch.no_grad():
        for weight, add in sink.put_off:
            add(main_grad(weight))
    grad_x, grads = expected()
    torch.testing.assert_close(x.grad, grad_x)
    assert len(grads) == 4
    for name, weight in ours.named_parameters():
        assert weight.grad is None
        torch.testing.assert_close(main_grad(weight), grads[name])


def test_a_layer_that_keeps_its_gradient_is_named() -> None:
    with pytest.raises(ForeignWeight, match=r"1\.weight belongs to a LayerNorm.*use nn.Linear"):
        serve(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), ImmediateSink())


def test_frozen_foreign_weights_are_no_matter() -> None:
    module = nn.Sequential(nn.LayerNorm(4)).requires_grad_(False)
    serve(module, ImmediateSink())
