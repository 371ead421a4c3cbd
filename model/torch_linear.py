"""torch's own layers under the weight-gradient sink: `nn.Linear` is served as ours are, anything else is refused.

Without this a foreign layer's gradient would go to `.grad`, which no optimizer here reads, and would be computed with
the input's although the schedule has put it off.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.linear import _Linear
from model.weight_grad import Weighted, WeightGradSink, add_product, set_sink


class ForeignWeight(TypeError):
    """A parameter whose layer does not hand its gradient to the sink; the message names it."""


class _AddBias(torch.autograd.Function):
    """x [..., O] + bias [O]; the bias's gradient through the sink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, sink: WeightGradSink) -> Tensor:
        ctx.sink = sink
        ctx.save_for_backward(bias)
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (bias,) = ctx.saved_tensors
        grad_TO = grads[0].flatten(0, -2)
        if ctx.needs_input_grad[1]:
            ctx.sink.put(bias, lambda acc: acc.add_(grad_TO.sum(0, dtype=torch.float32)))
        return grads[0], None, None


def _forward(layer: nn.Linear, sink: WeightGradSink, x: Tensor) -> Tensor:
    product: Tensor = _Linear.apply(x, layer.weight, sink, None, add_product)  # type: ignore[assignment]
    return product if layer.bias is None else _AddBias.apply(product, layer.bias, sink)  # type: ignore[return-value]


def serve(module: nn.Module, sink: WeightGradSink) -> None:
    """Send every weight gradient of `module` and all below it to `sink`; ForeignWeight where a layer cannot."""
    set_sink(module, sink)
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(_forward, layer, sink)  # type: ignore[method-assign]
        elif not isinstance(layer, Weighted):
            own = [weight for weight, value in layer.named_parameters(recurse=False) if value.requires_grad]
            if own:
                raise ForeignWeight(
                    f"{name}.{own[0]} belongs to a {type(layer).__name__}, whose weight gradient cannot be put off: "
                    "derive it from model.weight_grad.Weighted and hand the gradient to its sink, or use nn.Linear"
                )
