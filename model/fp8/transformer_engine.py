"""Transformer Engine as the back end of the FP8 linears on a GPU: te.Linear and te.GroupedLinear around our weights.

It is imported when asked for and not before: importing it needs cuDNN and a CUDA build of torch. Nothing here has run
on a GPU; the classes, arguments and attributes it uses are held to the sources of the pinned wheel by
tests/model/fp8/test_transformer_engine.py, the numbers to the oracle by tests/gpu/test_te_contract.py.

With `fp8.primary_weights=fp8` the weights are its own quantised parameters, whose bytes and scales ZeRO-1 makes
(`EngineWeight`): nothing wide is behind them, and what is transposed is made of the bytes.

Differences from the report and from the oracle's defaults: activations and gradients are rounded in both orientations
from the wide tensor (`InputCache.WIDE`); the amax has no floor; nothing is kept in E5M6. Scales are what `fp8.scales`
says, by an environment variable that it reads when it is imported (`model.backends.transformer_engine_environment`;
`launcher/build.py` sets it). Rows are filled up with zeros to multiples of 128, which add nothing to a weight gradient.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from model.backends import FP32_SCALES, MissingBackend, load_transformer_engine, transformer_engine_environment
from model.fp8.config import CAPABILITY, TRANSFORMER_ENGINE_CUDA_FROM, FP8Config
from model.fp8.formats import TILE_SIZE, QuantisedTensor
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
    `weights_changed`, and kept so for the step; with `rounded` it is not there until `take_weight`, and then in FP8
    alone. overwrites: of each weight gradient that Transformer Engine's queue holds, in its order, whether it will be
    written over main_grad instead of added.
    """

    def __init__(self, te: Any, recipe: Any, weight: nn.Parameter, *, rounded: bool = False) -> None:
        self._te, self._recipe, self._fresh, self._rounded = te, recipe, True, rounded
        self.overwrites: deque[bool] = deque()
        stack = weight.dim() == 3
        self._gradients = list(main_grad(weight)) if stack else [main_grad(weight)]
        self._names = [f"weight{number}" for number in range(len(weight))] if stack else ["weight"]
        self._given: QuantisedTensor | None = None
        self._engine_weights: list[EngineWeight] = []
        out_features, in_features = weight.shape[-2:]
        options = {
            "bias": False,
            "params_dtype": weight.dtype,
            "device": "meta",  # no memory of its own
            "fuse_wgrad_accumulation": True,
            "delay_wgrad_compute": True,
        }
        with te.quantized_model_init(enabled=True, recipe=recipe) if rounded else nullcontext():
            if stack:
                self.module = te.GroupedLinear(len(weight), in_features, out_features, **options)
            else:
                self.module = te.Linear(in_features, out_features, **options)
        if not rounded:
            self._set_weights([nn.Parameter(part) for part in weight.data] if stack else [weight])

    def _set_weights(self, weights: Sequence[nn.Parameter]) -> None:
        """The module's weights, one of each matrix, whose gradients are ours."""
        for name, own, gradient in zip(self._names, weights, self._gradients, strict=True):
            own.main_grad = gradient  # type: ignore[attr-defined]
            setattr(self.module, name, own)

    def take_weight(self, tensor: QuantisedTensor) -> None:
        """See `model.linear.FP8Call`."""
        self._given = tensor
        self._engine_weights = [EngineWeight(self._te, part) for part in tensor.groups()]
        self._set_weights([weight.parameter for weight in self._engine_weights])
        self.weights_changed()

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
        """Round the weight anew at the next use, or take what somebody else has rounded."""
        self._fresh = True
        for weight in self._engine_weights:
            weight.refresh()


class EngineWeight:
    """A matrix in 128x128 blocks as Transformer Engine's own quantised parameter; its rows are our memory, no copy.

    tensor: E4M3 values [out, in] and their scales, which may change before every `refresh`.
    """

    def __init__(self, te: Any, tensor: QuantisedTensor) -> None:
        values = tensor.values.view(torch.uint8)
        self._tensor, shape = tensor, tuple(values.shape)
        quantizer = te.Float8BlockQuantizer(
            te.DType.kFloat8E4M3, rowwise=True, columnwise=True, amax_epsilon=0.0,
            force_pow_2_scales=tensor.power_of_two, block_scaling_dim=2,
        )  # fmt: skip
        # filled up as its products want them
        scales = torch.zeros(quantizer.get_scale_shape(shape, columnwise=False), device=values.device)
        self.parameter: Any = nn.Parameter(te.Float8BlockwiseQTensor(
            shape=shape, dtype=torch.bfloat16, rowwise_data=values, rowwise_scale_inv=scales, columnwise_data=None,
            columnwise_scale_inv=None, fp8_dtype=te.DType.kFloat8E4M3, quantizer=quantizer, is_2D_scaled=True,
            device=values.device,
        ))  # fmt: skip
        self._scales = scales

    def refresh(self) -> None:
        """Take the scales, and transpose the values for the input's gradient."""
        wide = self._tensor.wide_scales
        self._scales[:, : wide.shape[1]] = wide
        self.parameter._create_columnwise()


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
        elsewhere = isinstance(linear, GroupedLinear) and config.grouped != "same"
        if not elsewhere:
            rounded = config.primary_weights == "fp8"
            linear.fp8 = TransformerEngineLinear(te, recipe, linear.weight, rounded=rounded)
