"""Packages of kernels for a GPU that may not be here: loaded when asked for, refused in one line otherwise; no torch.

NVIDIA's apex is on no package registry, and the `apex` there is another project: it is known by its compiled modules.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from model.fp8.config import TRANSFORMER_ENGINE_FROM, TRANSFORMER_ENGINE_UNTIL, FP8Config

# Read by Transformer Engine when it is imported, and never again.
FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


class MissingBackend(ValueError):
    """A package of kernels is not there, or this machine cannot do what is asked of it."""

    user_error = True


def numbers(text: str) -> tuple[int, ...]:
    """Of a version: "2.20.2+abc" is (2, 20, 2)."""
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdecimal())


def installed(package: str) -> str | None:
    """Its version, None where it is not installed; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def version_problem(name: str, package: str, since: str, until: str) -> str | None:
    """What is wrong with the installed version, with the one found and those needed; None where nothing is."""
    found, needed = installed(package), f"{since} or newer, below {until}"
    if found is None:
        return f"{name} is not installed ({needed} is needed)"
    if not numbers(since) <= numbers(found) < numbers(until):
        return f"{name} {found} is installed, {needed} is needed"
    return None


def transformer_engine_problem() -> str | None:
    """See `version_problem`."""
    return version_problem(
        "Transformer Engine", "transformer_engine", TRANSFORMER_ENGINE_FROM, TRANSFORMER_ENGINE_UNTIL
    )


def transformer_engine_environment(config: FP8Config) -> dict[str, str]:
    """What `fp8.scales` means to Transformer Engine: to be in the environment before it is imported."""
    return {FP32_SCALES: str(int(config.scales == "fp32"))}


def apex_problem(module: str) -> str | None:
    """Why apex's compiled `module` is not here; None where it is."""
    if find_spec(module) is not None:
        return None
    found = installed("apex")
    if found is None:
        return "it is not installed"
    if find_spec("apex") is not None and find_spec("apex.multi_tensor_apply") is not None:
        return f"the apex {found} installed here was built without {module}"
    return f"the apex {found} installed here is another project"


def load_transformer_engine(key: str, instead: str, module: str = "transformer_engine.pytorch") -> Any:
    """The imported module; MissingBackend in one line that begins with `key` and ends with `instead`.

    module: `transformer_engine_torch` has the kernels; it needs the libraries that importing the package loads.
    """
    problem = transformer_engine_problem()
    if problem:
        raise MissingBackend(f"{key}: {problem}: {instead}")
    try:
        importlib.import_module("transformer_engine.pytorch")
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        found = installed("transformer_engine")
        raise MissingBackend(f"{key}: Transformer Engine {found} cannot be imported ({reason}): {instead}") from None


def load_apex(key: str, instead: str, module: str) -> Any:
    """apex's compiled `module`; MissingBackend in one line that begins with `key` and ends with `instead`."""
    problem = apex_problem(module)
    if problem is None:
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:
            problem = f"its {module} cannot be imported ({str(error).splitlines()[0]})"
    build = "built from source (`pip install apex` is another project)"
    raise MissingBackend(f"{key} needs NVIDIA's apex, {build}, and {problem}: {instead}")
