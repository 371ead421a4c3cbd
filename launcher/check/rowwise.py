"""What can be wrong with what is compiled, and with train.rowwise and train.weight_grad: device, compiler, package.

No torch.
"""

from launcher.check.machine import can_compile, torch_cuda
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
    if config.train.rowwise == "native" and not can_compile("rowwise"):
        found.append(f"train.rowwise=native needs g++, which is not on PATH: install it, or {INSTEAD}")
    if _compiles_quantisers(config) and not can_compile("fp8"):
        found.append("fp8.native=true needs g++, which is not on PATH: install it, or use fp8.native=false")
    for key, value in _chosen(config):
        if value == "apex" and (problem := apex_problem(APEX_MODULES[key])):
            found.append(f"{key}=apex needs NVIDIA's apex, built from source, and {problem}: use {key}=torch")
        if value == "transformer_engine" and (problem := transformer_engine_problem()):
            found.append(f"{key}=transformer_engine: {problem}: use {key}=torch")
    return found


def _compiles_quantisers(config: RunConfig) -> bool:
    """As `launcher.build` does on a CPU: for linears in FP8, and for rows that are sent in FP8 in any precision."""
    by_linears = config.train.precision == "fp8" and config.fp8.backend != "transformer_engine"
    by_wire = "fp8" in (config.parallel.dispatch_wire, config.parallel.dispatch_grad_wire)
    device = config.train.device
    on_cpu = device == "cpu" or (device == "auto" and torch_cuda() is None)
    return config.fp8.native and (by_linears or by_wire) and on_cpu


def _chosen(config: RunConfig) -> list[tuple[str, str]]:
    return [("train.rowwise", config.train.rowwise), ("train.weight_grad", config.train.weight_grad)]
