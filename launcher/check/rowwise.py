"""What can be wrong with train.rowwise=native: a GPU, or no compiler; no torch."""

import shutil

from launcher.run_config import RunConfig

ROWWISE = ("torch", "native")


def check_rowwise(config: RunConfig) -> list[str]:
    """Compiled row-wise kernels are for a CPU."""
    if config.train.rowwise == "native" and config.train.device == "cuda":
        return ["train.rowwise=native compiles for a CPU, but train.device=cuda: use train.rowwise=torch"]
    return []


def check_compiler(config: RunConfig) -> list[str]:
    """This machine can compile what is to be compiled."""
    if config.train.rowwise == "native" and shutil.which("g++") is None:
        return ["train.rowwise=native needs g++, which is not on PATH: install it, or use train.rowwise=torch"]
    return []
