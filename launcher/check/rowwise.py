"""What can be wrong with train.rowwise: the wrong device, no compiler, no such package; no torch."""

import shutil

from launcher.run_config import RunConfig
from model.backends import apex_problem, transformer_engine_problem

ON_GPU = ("apex", "transformer_engine")
ROWWISE = ("torch", "native", *ON_GPU)
INSTEAD = "use train.rowwise=torch"


def check_rowwise(config: RunConfig) -> list[str]:
    """Compiled row-wise kernels are for a CPU, the packages' for a GPU."""
    rowwise, device = config.train.rowwise, config.train.device
    if rowwise == "native" and device == "cuda":
        return [f"train.rowwise=native compiles for a CPU, but train.device=cuda: {INSTEAD}"]
    if rowwise in ON_GPU and device == "cpu":
        return [f"train.rowwise={rowwise} needs a GPU, but train.device=cpu: {INSTEAD}"]
    return []


def check_compiler(config: RunConfig) -> list[str]:
    """This machine can compile what is to be compiled, and has the package that is to be imported."""
    rowwise = config.train.rowwise
    if rowwise == "native" and shutil.which("g++") is None:
        return [f"train.rowwise=native needs g++, which is not on PATH: install it, or {INSTEAD}"]
    if rowwise == "apex" and (problem := apex_problem("fused_layer_norm_cuda")):
        return [f"train.rowwise=apex needs NVIDIA's apex, built from source, and {problem}: {INSTEAD}"]
    if rowwise == "transformer_engine" and (problem := transformer_engine_problem()):
        return [f"train.rowwise=transformer_engine: {problem}: {INSTEAD}"]
    return []
