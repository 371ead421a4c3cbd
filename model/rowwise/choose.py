"""`train.rowwise` by name: the kernels, or one line that says why they cannot be had."""

import torch

from model.backends import MissingBackend
from model.rowwise.apex import ApexRowwise
from model.rowwise.kernels import TORCH, Rowwise
from model.rowwise.native import NativeRowwise
from model.rowwise.transformer_engine import TransformerEngineRowwise

ON_GPU: dict[str, type[Rowwise]] = {"apex": ApexRowwise, "transformer_engine": TransformerEngineRowwise}


def rowwise_kernels(name: str, device: torch.device) -> Rowwise:
    """torch | native | apex | transformer_engine, for tensors on `device`; MissingBackend or MissingCompiler."""
    if name == "torch":
        return TORCH
    if name == "native":
        return NativeRowwise()
    if device.type != "cuda":
        raise MissingBackend(f"train.rowwise={name} needs a GPU, the tensors are on {device}: use train.rowwise=torch")
    return ON_GPU[name]()
