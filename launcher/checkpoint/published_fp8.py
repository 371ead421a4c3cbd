"""Block FP8 of the published layout: E4M3 weights, one FP32 `weight_scale_inv` for every 128 x 128 block.

As in the released checkpoint: the linears of attention and of all MLPs, experts included. Embedding, head, router,
norms and the MTP layers' eh_proj stay in BF16. A ragged edge has blocks of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoint.tensor_file import Planned
from model.fp8.formats import TILE_SIZE, Rows, Scales, Tile, spread
from model.fp8.quantise import Quantiser

SCALE = "_scale_inv"  # after the weight's name
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [TILE_SIZE, TILE_SIZE],
}
FP8 = torch.float8_e4m3fn


def is_quantised(name: str) -> bool:
    """Whether the published checkpoint holds this weight in FP8."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    in_linear = ".self_attn." in name or ".mlp." in name
    return name.endswith(".weight") and in_linear and (module.endswith("_proj") or module == "kv_a_proj_with_mqa")


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of a weight [rows, columns]."""
    return tuple(-(-size // TILE_SIZE) for size in shape)


def plan_fp8(tensors: Iterable[Planned]) -> Iterator[Planned]:
    """The quantised plan of an unquantised one: each FP8 weight is followed by its scales."""
    for tensor in tensors:
        if is_quantised(tensor.name):
            yield Planned(tensor.name, tensor.shape, FP8)
            yield Planned(tensor.name + SCALE, scale_shape(tensor.shape), torch.float32)
        else:
            yield tensor


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 [rows, columns] to E4M3 and FP32 scales, which values are to be multiplied by.

    Raises ValueError for weights that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("it holds NaN or infinity")
    tensor = Quantiser(Tile.BLOCK, Scales.FP32, amax_floor=0.0).quantise(weight)
    return tensor.values, tensor.scales.view(scale_shape(tuple(weight.shape)))


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """E4M3 [rows, columns] and the scales of its blocks to FP32."""
    return values.float() * spread(scales, Tile.BLOCK, Rows.of((len(values),)), values.shape[1])


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published config.json without its `quantization_config` where that is the one that can be read."""
    given = config.get("quantization_config")
    same = isinstance(given, dict) and all(given.get(key) == value for key, value in QUANTIZATION.items())
    return {key: value for key, value in config.items() if key != "quantization_config" or not same}
