"""What can be wrong with the back ends of other projects that the optimizer section chooses; nothing is imported.

Packages are looked up by name and version: some compile, wait or fail when they are imported.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from launcher.config import RunConfig
from model import backends

PACKAGE_CHOICES = {
    "optim.adamw": ("plain", "torch_fused", "deepspeed_cpu", "apex", "transformer_engine"),
    "optim.zero1": ("plain", "deepspeed"),
}
GPU_KERNELS = ("apex", "transformer_engine")
DEEPSPEED_FROM, DEEPSPEED_UNTIL = "0.19.8", "0.20"
FUSED = "use optim.adamw=torch_fused"


def check_offload(config: RunConfig) -> list[str]:
    """Each kernel of AdamW finds the masters where it can work on them."""
    adamw, device = config.optim.adamw, config.train.device
    found = []
    if adamw in GPU_KERNELS and config.optim.offload:
        found.append(f"optim.adamw={adamw} works on a GPU, but optim.offload=true keeps masters on the host: {FUSED}")
    if adamw in GPU_KERNELS and device == "cpu":
        found.append(f"optim.adamw={adamw} needs a GPU, but train.device=cpu: {FUSED}")
    if adamw == "deepspeed_cpu" and device == "cuda" and not config.optim.offload:
        found.append("optim.adamw=deepspeed_cpu works in host memory: set optim.offload=true, or " + FUSED)
    return found


def check_packages(config: RunConfig) -> list[str]:
    """What the chosen back ends need is installed here, in a version that was tested."""
    found = []
    if config.optim.zero1 == "deepspeed":
        found += deepspeed_problem("optim.zero1=deepspeed", "use optim.zero1=plain")
    if config.optim.adamw == "deepspeed_cpu":
        found += deepspeed_problem("optim.adamw=deepspeed_cpu", FUSED) or cpu_adam_problem()
    if config.optim.adamw == "apex":
        found += apex_problem()
    if config.optim.adamw == "transformer_engine" and (problem := backends.transformer_engine_problem()):
        found.append(f"optim.adamw=transformer_engine: {problem}: pip install -e .[gpu], or {FUSED}")
    return found


def deepspeed_problem(key: str, instead: str) -> list[str]:
    """Nothing, or the line that says which DeepSpeed is missing."""
    problem = backends.version_problem("DeepSpeed", "deepspeed", DEEPSPEED_FROM, DEEPSPEED_UNTIL)
    return [f"{key}: {problem}: pip install -e .[deepspeed], or {instead}"] if problem else []


def cpu_adam_problem() -> list[str]:
    """DeepSpeed compiles its CPU Adam when it is first used."""
    missing = missing_tools()
    if not missing:
        return []
    tools = " and no ".join(missing)
    return [f"optim.adamw=deepspeed_cpu is compiled at first use and there is no {tools}: install it, or {FUSED}"]


def missing_tools() -> list[str]:
    """Of those that DeepSpeed compiles with; ninja's wheel puts it beside the interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return [tool for tool in ("g++", "ninja") if shutil.which(tool, path=path) is None]


def apex_problem() -> list[str]:
    """NVIDIA's apex by its compiled module; the package registry's `apex` is another project."""
    if find_spec("amp_C") is not None:
        return []
    other = backends.installed("apex")
    here = f"the apex {other} installed here is another project" if other else "it is not installed"
    if other and find_spec("apex.multi_tensor_apply") is not None:
        here = f"the apex {other} installed here was built without its CUDA extensions"
    return [f"optim.adamw=apex needs NVIDIA's apex, built from source, and {here}: run slurm/install.sh, or {FUSED}"]
