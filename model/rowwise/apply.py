"""Which row-wise kernels the modules of a model use: plain torch, unless others are given here."""

from torch import nn

from model.experts import Experts
from model.mla import MultiHeadLatentAttention
from model.mlp import MLP
from model.norm import RMSNorm
from model.rowwise.kernels import Rowwise
from model.transformer import Transformer


def apply_rowwise(model: nn.Module, kernels: Rowwise) -> None:
    """Let every norm, softmax, SwiGLU and cross entropy of `model` (a stage, or all of it) use `kernels`."""
    for module in model.modules():
        if isinstance(module, RMSNorm | MLP | Experts | MultiHeadLatentAttention | Transformer):
            module.rowwise = kernels
