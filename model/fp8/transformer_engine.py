"""Transformer Engine as the back end of the FP8 linears on a GPU: te.Linear and te.GroupedLinear around our weights.

It is imported when asked for and not before: importing it needs cuDNN and a CUDA build of torch. Nothing here has run
on a GPU; the classes, arguments and attributes it uses are held to the sources of the pinned wheel by
tests/model/fp8/test_transformer_engine.py, the numbers to the oracle by tests/gpu/test_te_contract.py.

Differences from the report and from the oracle's defaults: activations and gradients are rounded in both orientations
from the wide tensor (`InputCache.WIDE`); the amax has no floor; nothing is kept in E5M6. Scales are what `fp8.scales`
says, by an environment variable that it reads when it is imported (`model.backends.transformer_engine_environment`;
`launcher/build.py` sets it). Rows are filled up with zeros to multiples of 128, which add nothing to a weight gradient.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.backends import FP32_SCALES, MissingBackend, load_transformer_engine, transformer_engine_environment
from model.fp8.config import CAPABILITY, TRANSFORMER_ENGINE_CUDA_FROM, FP8Config
from model.fp8.formats import TILE_SIZE
from model.linear import GroupedLinear, Linear
from model.weight_grad import WeightGradSink, main_grad

KEY = "fp8.backend=transformer_engine"
INSTEAD = "choose fp8.backend=oracle_fast (an emulation, on any machine) or train.precision=bf16"


def load_engine(config: FP8Config) -> tuple[Any, Any]:
    """The module and the recipe; MissingBackend in one line with what was found, what is needed, what to do."""
    te = load_transformer_engine(KEY, INSTEAD)
    able, reason = te.is_fp8_block_scaling_available(return_reason=True)
    found = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    if not able or found != CAPABILITY:
        here = "no GPU" if found is None else f"compute capability {found}, torch for CUDA {torch.version.cuda}"
        raise MissingBackend(
            f"{KEY} needs a GPU of compute capability {CAPABILITY} and CUDA {TRANSFORMER_ENGINE_CUDA_FROM} or newer, "
            f"here: {here}{f' ({reason})' if reason else ''}: {INSTEAD}"
        )
    recipe = load_transformer_engine(KEY, INSTEAD, "transformer_engine.common.recipe").Float8BlockScaling()
    if recipe.fp8_quant_fwd_inp.power_2_scale != (config.scales == "pow2"):
        needed = transformer_engine_environment(config)[FP32_SCALES]
        raise MissingBackend(
            f"fp8.scales={config.scales}: Transformer Engine was imported before {FP32_SCALES}={needed} was in the "
            "environment: set it for every rank before it starts"
        )
    return te, recipe


class _AfterBackward(torch.autograd.Function):
    """The identity on a layer's input, whose backward runs once the layer's own is done: the time to tell the sink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: WeightGradSink, layer: Any, overwrites: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.sink, ctx.layer, ctx.overwrites = sink, layer, overwrites
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        if weight.requires_grad:
            ctx.layer.overwrites.append(ctx.overwrites)
            ctx.sink.put(weight, _WeightGrad(ctx.layer))
        return grads[0], None, None, None, None


class _WeightGrad:
    """The next weight gradient of a layer's queue, as a contribution.

    Transformer Engine puts it into the weights' main_grad itself, which is the accumulator that the sink gives. A
    micro-batch whose forward rounded the weight (`is_first_microbatch`) it writes over what is there, any other it
    adds: right only if that micro-batch's gradient is the first of the step too. Here it is right in any order; what
    came before is set aside, one FP32 copy of the weight, where it was not the first.
    """

    def __init__(self, layer: "TransformerEngineLinear") -> None:
        self._layer = layer

    def __call__(self, acc: Tensor) -> None:
        """See `model.weight_grad.Overwriting`."""
        if not self._layer.overwrites.popleft():
            self._layer.module.backward_dw()
            return
        earlier = acc.clone()
        acc.zero_()
        self._layer.module.backward_dw()
        acc.add_(earlier)

    def write(self, acc: Tensor) -> None:
        """See `model.weight_grad.Overwriting`."""
        self._layer.overwrites.popleft()
        acc.zero_()
        self._layer.module.backward_dw()


class TransformerEngineLinear:
    """`FP8Call` over te.Linear, or te.GroupedLinear for a stack of experts' weights [groups, out, in].

    The weight stays ours: its memory and its main_grad are shared. It is rounded in the first forward after
    `weights_changed`, and kept so for the step. overwrites: of each weight gradient that Transformer Engine's queue
    holds, in its order, whether it will be written over main_grad instead of added.
    """

    def __init__(self, te: Any, recipe: Any, weight: nn.Parameter) -> None:
        self._te, self._recipe, self._fresh = te, recipe, True
        self.overwrites: deque[bool] = deque()
        out_features, in_features = weight.shape[-2:]
        options = {
            "bias": False,
            "params_dtype": weight.dtype,
            "device": "meta",  # no memory of its own
            "fuse_wgrad_accumulation": True,
            "delay_wgrad_compute": True,
        }
        gradient = main_grad(weight)
        if weight.dim() == 2:
            self.module = te.Linear(in_features, out_features, **options)
            self.module.weight = weight
            return
        self.module = te.GroupedLinear(len(weight), in_features, out_features, **options)
        for number, (part, part_gradient) in enumerate(zip(weight.data, gradient, strict=True)):
            own = nn.Parameter(part)
            own.main_grad = part_gradient  # type: ignore[attr-defined]
            setattr(self.module, f"weight{number}", own)

    def __call__(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None = None
    ) -> Tensor:
        """See `model.linear.FP8Call`."""
        rows_RI = self._rows(x, weight, sink)
        padded, index = padded_rows(rows_RI, counts or (len(rows_RI),))
        with self._te.autocast(enabled=True, recipe=self._recipe):
            if counts is None:
                y = self.module(padded, is_first_microbatch=self._fresh)
            else:
                splits = [_padded_count(count) for count in counts]
                y = self.module(padded, splits, is_first_microbatch=self._fresh)
        self._fresh = False
        return y.index_select(0, index).view(*x.shape[:-1], y.shape[-1])

    def _rows(self, x: Tensor, weight: Tensor, sink: WeightGradSink) -> Tensor:
        """x as a matrix whose gradient, when it comes, hands the weight's to the sink."""
        x_RI = x.flatten(0, -2)
        if torch.is_grad_enabled() and not x_RI.requires_grad:
            x_RI = x_RI.detach().requires_grad_()  # so that the weight gradient still has its turn
        return _AfterBackward.apply(x_RI, weight, sink, self, self._fresh)  # type: ignore[return-value]

    def weights_changed(self) -> None:
        """Round the weight anew at the next use."""
        self._fresh = True


def _padded_count(count: int) -> int:
    return -(-count // TILE_SIZE) * TILE_SIZE


def padded_rows(x_RI: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x with every group's rows filled up with zero rows to a multiple of 128, and where each of its rows went."""
    starts, places = 0, []
    for count in counts:
        places.append(torch.arange(starts, starts + count, device=x_RI.device))
        starts += _padded_count(count)
    index = torch.cat(places)
    return x_RI.new_zeros(starts, x_RI.shape[1]).index_copy(0, index, x_RI), index


def apply_transformer_engine(linears: Mapping[str, Linear | GroupedLinear], config: FP8Config) -> None:
    """Let these linears compute in Transformer Engine; their weights must be where they will stay."""
    te, recipe = load_engine(config)
    for linear in linears.values():
        linear.fp8 = TransformerEngineLinear(te, recipe, linear.weight)
