"""The level `parallel.recompute=report`: what a stage's layers compute again in the backward instead of keeping it.

Outputs of the norms around attention and feed-forward and of both latents, the up-projections of attention with the
heads made of them, outputs of every SwiGLU (report 3.2.3). Kept are the residuals, the latents, attention's output and
the SwiGLU's input; where products are in FP8 the experts' rows and the SwiGLU's input as FP8 rows (3.3.3).
"""

from torch import nn

from model.block import Block
from model.experts import Experts
from model.fp8.apply import ATTENTION_OUTPUT, fp8_linears
from model.fp8.formats import Scales, Tile
from model.fp8.lean_engine import LeanEngineLinear
from model.fp8.linear import FP8Layer
from model.fp8.quantise import Quantiser
from model.fp8.swiglu import CachedSwiGLU, FP8SwiGLU
from model.fp8.transformer_engine import TransformerEngineLinear
from model.mlp import MLP, RecomputedSwiGLU, SwiGLUDown


def keep_less(model: nn.Module) -> None:
    """Let every layer of `model` (a stage, or all of it) keep so little; after `apply_fp8`.

    Gradients stay the same to the bit, but for a back end of FP8 that would keep the SwiGLU's input wide.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True
        if isinstance(module, MLP | Experts):
            module.swiglu_down = _swiglu_down(module)
    for name, linear in fp8_linears(model).items():
        if isinstance(linear.fp8, FP8Layer):
            linear.fp8.hold_rounded = True
        elif isinstance(linear.fp8, TransformerEngineLinear):
            shares = name.rpartition(".")[2] == ATTENTION_OUTPUT  # with the attention kernel
            linear.fp8 = LeanEngineLinear.instead_of(linear.fp8, linear.weight, shares_input=shares)


def _swiglu_down(module: MLP | Experts) -> SwiGLUDown:
    layer = module.down_proj.fp8
    if isinstance(layer, FP8Layer):
        return FP8SwiGLU(layer)
    if layer is not None:  # with an exponent a tile, whatever the products' scales are
        return CachedSwiGLU(Quantiser(Tile.ROW, Scales.POWER_OF_TWO))
    return RecomputedSwiGLU()
