"""What can be wrong with train.rowwise and train.weight_grad: device, compiler, package; no torch."""

import shutil

from launcher.run_config import RunConfig
from model.backends import apex_problem, transformer_engine_problem

ON_GPU = ("apex", "transformer_engine")
ROWWISE = ("torch", "native", *ON_GPU)
WEIGHT_GRAD = ("torch", *ON_GPU)
INSTEAD = "use train.rowwise=torch"
APEX_MODULES = {"train.rowwise": "fused_layer_norm_cuda", "train.weight_grad": "fused_weight_gradient_mlp_cuda"}


def check_rowwise(config: RunConfig) -> list[str]:
    """Compiled row-wise kernels are for a CPU, the packages' for a GPU."""
    device, found = config.train.device, []
    if config.train.rowwise == "native" and device == "cuda":
        found.append(f"train.rowwise=native compiles for a CPU, but train.device=cuda: {INSTEAD}")
    for key, value in _chosen(config):
        if value in ON_GPU and device == "cpu":
            found.append(f"{key}={value} needs a GPU, but train.device=cpu: use {key}=torch")
    return found


def check_compiler(config: RunConfig) -> list[str]:
    """This machine can compile what is to be compiled, and has the package that is to be imported."""
    found = []
    if config.train.rowwise == "native" and shutil.which("g++") is None:
        found.append(f"train.rowwise=native needs g++, which is not on PATH: install it, or {INSTEAD}")
    for key, value in _chosen(config):
        if value == "apex" and (problem := apex_problem(APEX_MODULES[key])):
            found.append(f"{key}=apex needs NVIDIA's apex, built from source, and {problem}: use {key}=torch")
        if value == "transformer_engine" and (problem := transformer_engine_problem()):
            found.append(f"{key}=transformer_engine: {problem}: use {key}=torch")
    return found


def _chosen(config: RunConfig) -> list[tuple[str, str]]:
    return [("train.rowwise", config.train.rowwise), ("train.weight_grad", config.train.weight_grad)]
