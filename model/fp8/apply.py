"""Give a model's linears their FP8: every one but embedding, output head and router (report 3.3.1)."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from model.experts import Experts
from model.fp8.config import FP8Config
from model.fp8.formats import AMAX_FLOOR, QuantisedTensor, Scales, Tile
from model.fp8.linear import FP8Layer, FP8Recipe, InputCache
from model.fp8.native import NativeKernels
from model.fp8.quantise import Kernels, Quantiser, TorchKernels
from model.fp8.swiglu import FP8SwiGLU
from model.fp8.watch import Watch
from model.fp8.weights import WeightBlocks
from model.linear import GroupedLinear, Linear
from model.mlp import MLP

SCALES = {"pow2": Scales.POWER_OF_TWO, "fp32": Scales.FP32}
CACHES = {cache.value: cache for cache in InputCache}
HEAD = "lm_head"
ATTENTION_OUTPUT = "o_proj"


def recipe_of(config: FP8Config, *, cache: str, device: torch.device) -> FP8Recipe:
    """The oracle's recipe for linears that keep their input as `cache`."""
    return FP8Recipe(
        scales=SCALES[config.scales],
        input_cache=CACHES[cache],
        exact=config.backend == "oracle_exact",
        native=config.native and device.type == "cpu",  # compiled for the CPU alone; plain torch gives the same bits
        weights_per_step=config.weights_per_step,
        gradient_amax_floor=config.gradient_amax_floor,
    )


def fp8_linears(model: nn.Module) -> dict[str, Linear | GroupedLinear]:
    """The linears that compute in FP8, by name: all but the head and those with a precision of their own (router)."""
    found: dict[str, Linear | GroupedLinear] = {}
    for name, module in model.named_modules():
        plain = isinstance(module, GroupedLinear) or (isinstance(module, Linear) and module.dtype is None)
        if plain and name.rpartition(".")[2] != HEAD:
            assert isinstance(module, Linear | GroupedLinear)
            found[name] = module
    return found


def weight_blocks(model: nn.Module, config: FP8Config, *, device: torch.device) -> dict[str, WeightBlocks]:
    """In which blocks the weights of `model` are rounded that need no wide copy, by name of the parameter."""
    if config.primary_weights == "bf16":
        return {}
    native = config.native and device.type == "cpu"
    kernels: Kernels = NativeKernels() if native else TorchKernels()
    found = {}
    for name, linear in fp8_linears(model).items():
        floor = 0.0 if _back_end(config, linear) == "transformer_engine" else AMAX_FLOOR
        quantiser = Quantiser(Tile.BLOCK, SCALES[config.scales], floor, kernels)
        found[f"{name}.weight"] = WeightBlocks(tuple(linear.weight.shape), quantiser)
    return found


def _back_end(config: FP8Config, linear: Linear | GroupedLinear) -> str:
    grouped = isinstance(linear, GroupedLinear) and config.grouped != "same"
    return config.grouped if grouped else config.backend


def give_weights(model: nn.Module, tensors: Mapping[str, QuantisedTensor]) -> None:
    """Let the linears that compute in FP8 read their weights there; tensors: by name of the parameter."""
    for name, linear in fp8_linears(model).items():
        tensor = tensors.get(f"{name}.weight")
        if tensor is not None:
            assert linear.fp8 is not None
            linear.fp8.take_weight(tensor)


def apply_fp8(
    model: nn.Module, config: FP8Config, *, device: torch.device | str = "cpu", watch: Watch | None = None
) -> None:
    """Let every linear of `model` (a stage, or all of it) that may compute in FP8 do so from now on.

    watch: what their samples go to. Raises MissingBackend or MissingCompiler in one line where a back end is not there.
    """
    device, watch = torch.device(device), watch or Watch()
    if config.backend == "transformer_engine":
        from model.fp8.transformer_engine import apply_transformer_engine

        apply_transformer_engine(fp8_linears(model), config)
    else:
        _apply_oracle(model, config, device, watch)
    if config.grouped == "deep_gemm":
        from model.fp8.deep_gemm import apply_deep_gemm

        apply_deep_gemm(fp8_linears(model), config)


def _apply_oracle(model: nn.Module, config: FP8Config, device: torch.device, watch: Watch) -> None:
    for name, linear in fp8_linears(model).items():
        after_attention = name.rpartition(".")[2] == ATTENTION_OUTPUT
        cache = config.attention_cache if after_attention else config.input_cache
        linear.fp8 = FP8Layer(recipe_of(config, cache=cache, device=device), name, watch)
    if not config.recompute_swiglu:
        return
    for module in model.modules():
        if isinstance(module, MLP | Experts):
            layer = module.down_proj.fp8
            assert isinstance(layer, FP8Layer)
            module.swiglu_down = FP8SwiGLU(layer)


def watches(models: Iterable[nn.Module]) -> list[Watch]:
    """The watches of the FP8 layers of some stages, each once."""
    layers = (getattr(module, "fp8", None) for model in models for module in model.modules())
    return list({id(layer.watch): layer.watch for layer in layers if isinstance(layer, FP8Layer)}.values())
