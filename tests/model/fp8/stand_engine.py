"""A stand-in with Transformer Engine's manners, on a CPU: put-off weight gradients, quantised parameters, wide sums."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from model.weight_grad import main_grad


class StandQuantizer:
    def __init__(
        self, fp8_dtype: str, *, rowwise: bool, columnwise: bool, amax_epsilon: float, force_pow_2_scales: bool,
        block_scaling_dim: int,
    ) -> None:  # fmt: skip
        assert (fp8_dtype, rowwise, columnwise, amax_epsilon, block_scaling_dim) == ("e4m3", True, True, 0.0, 2)
        self.pow2 = force_pow_2_scales

    def get_scale_shape(self, shape: tuple[int, ...], columnwise: bool) -> tuple[int, int]:
        rows, columns = (-(-size // 128) for size in (reversed(shape) if columnwise else shape))
        return rows, -(-columns // 4) * 4


class StandTensor(torch.Tensor):
    """Bytes and scales in rows, and in columns once they are made of the rows; what its shape holds is nobody's."""

    parts: dict[str, Any]

    @staticmethod
    def make(
        *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, is_2D_scaled: bool, **parts: Any
    ) -> Any:
        assert is_2D_scaled and parts["rowwise_data"].dtype == torch.uint8 and parts["fp8_dtype"] == "e4m3"
        made = torch.full(shape, torch.nan, dtype=dtype, device=device).as_subclass(StandTensor)
        made.parts = parts
        return made

    def detach(self) -> Any:
        other = super().detach().as_subclass(StandTensor)
        other.parts = self.parts
        return other

    def _create_columnwise(self) -> None:
        parts = self.parts
        parts["columnwise_data"] = parts["rowwise_data"].t().contiguous()
        scales = torch.zeros(parts["quantizer"].get_scale_shape(self.shape, columnwise=True))
        blocks = -(-self.shape[0] // 128)
        scales[:, :blocks] = parts["rowwise_scale_inv"].t()[: len(scales), :blocks]
        parts["columnwise_scale_inv"] = scales

    def wide(self, side: str) -> torch.Tensor:
        """What products read, FP32 [rows, columns] of that side."""
        values = self.parts[f"{side}_data"].view(torch.float8_e4m3fn).float()
        scales = self.parts[f"{side}_scale_inv"].repeat_interleave(128, 0)[: len(values)]
        return values * scales.repeat_interleave(128, 1)[:, : values.shape[1]]


def wide_of(weights: Any, side: str) -> list[torch.Tensor]:
    """Weights as the forward (rowwise) or the input's gradient (columnwise) reads them, the latter transposed back."""
    if not isinstance(weights[0], StandTensor):
        return list(weights)
    parts = [weight.wide(side) for weight in weights]
    return parts if side == "rowwise" else [part.t() for part in parts]


class _Product(torch.autograd.Function):
    """Wide products whose weight gradients wait in a queue, as with delay_wgrad_compute."""

    @staticmethod
    def forward(ctx: Any, x: Any, splits: Any, first: Any, module: Any, *weights: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.splits, ctx.first, ctx.module = splits, first, module
        rows = wide_of(weights, "rowwise")
        return torch.cat([part @ weight.t() for part, weight in zip(x.split(splits), rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x = ctx.saved_tensors[0]
        weights = wide_of(ctx.module.weights(), "columnwise")
        parts = list(zip(grads[0].split(ctx.splits), x.split(ctx.splits), weights, strict=True))
        ctx.module.waiting.put(([(grad, rows) for grad, rows, _ in parts], ctx.first))
        return torch.cat([grad @ weight for grad, _, weight in parts]), None, None, None, *([None] * len(weights))


class _Stand(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.made_for = PARAMETERS[-1]
        assert options["delay_wgrad_compute"] and options["fuse_wgrad_accumulation"] and not options["bias"]
        self.waiting: queue.Queue[Any] = queue.Queue()
        self.first: list[bool] = []

    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.device.type != "meta"]

    def backward_dw(self) -> None:
        """Adds, but overwrites with what a first micro-batch gives (`accumulate` in its linear.py)."""
        parts, first = self.waiting.get_nowait()
        for (grad, rows), weight in zip(parts, self.weights(), strict=True):
            if first is not None and first:
                main_grad(weight).zero_()
            main_grad(weight).add_(grad.t() @ rows)


class StandLinear(_Stand):
    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(**options)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=options["device"]))

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        assert len(inp) % 128 == 0
        self.first.append(bool(is_first_microbatch))
        return _Product.apply(inp, [len(inp)], is_first_microbatch, self, self.weight)


class StandGrouped(_Stand):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(**options)
        for number in range(num_gemms):
            setattr(self, f"weight{number}", nn.Parameter(torch.empty(out_features, in_features, device="meta")))

    def forward(self, inp: torch.Tensor, m_splits: Any, is_first_microbatch: bool | None = None) -> Any:
        assert all(split % 128 == 0 for split in m_splits) and sum(m_splits) == len(inp)
        self.first.append(bool(is_first_microbatch))
        return _Product.apply(inp, list(m_splits), is_first_microbatch, self, *self.weights())


@contextmanager
def autocast(*, enabled: bool, recipe: Any) -> Iterator[None]:
    assert enabled and recipe == "recipe"
    yield


PARAMETERS = ["wide"]  # what modules are made for, innermost last


@contextmanager
def quantized_model_init(*, enabled: bool, recipe: Any) -> Iterator[None]:
    assert enabled and recipe == "recipe"
    PARAMETERS.append("quantised")
    yield
    PARAMETERS.pop()


STAND = SimpleNamespace(
    Linear=StandLinear, GroupedLinear=StandGrouped, autocast=autocast, quantized_model_init=quantized_model_init,
    Float8BlockQuantizer=StandQuantizer, Float8BlockwiseQTensor=StandTensor.make,
    DType=SimpleNamespace(kFloat8E4M3="e4m3"),
)  # fmt: skip
