"""What can be wrong with train.precision=fp8: the back end's version and machine, and sizes that it cannot do."""

from collections.abc import Mapping

from launcher.check.layout import either
from launcher.check.machine import gpu_capabilities, torch_cuda
from launcher.config import RunConfig
from model.backends import numbers, transformer_engine_problem, version_problem
from model.fp8.config import (
    ATTENTION_CACHES,
    BACKENDS,
    CAPABILITY,
    DEEP_GEMM_FROM,
    DEEP_GEMM_MULTIPLE,
    DEEP_GEMM_UNTIL,
    GROUPED,
    INPUT_CACHES,
    PRIMARY_WEIGHTS,
    SCALES,
    TRANSFORMER_ENGINE_CUDA_FROM,
    FP8Config,
)
from parallel.plan.job import GPU_FP8, fp8_problem

CHOICES = {
    "fp8.backend": BACKENDS,
    "fp8.grouped": GROUPED,
    "fp8.scales": SCALES,
    "fp8.input_cache": INPUT_CACHES,
    "fp8.attention_cache": ATTENTION_CACHES,
    "fp8.primary_weights": PRIMARY_WEIGHTS,
}
# What it does (GPU_FP8 is Transformer Engine's): any other value of these keys would have no effect there.
DEEP_GEMM_HAS = {"recompute_swiglu": False, "weights_per_step": True, "watch_every": 0}
ENGINE, DEEP_GEMM = "fp8.backend=transformer_engine", "fp8.grouped=deep_gemm"
INSTEAD = "use fp8.backend=oracle_fast (an emulation, on any machine) or train.precision=bf16"
SAME = "use fp8.grouped=same"
ENGINE_NEEDS = (
    f"{ENGINE} needs a GPU of compute capability {CAPABILITY} and CUDA {TRANSFORMER_ENGINE_CUDA_FROM} or newer"
)
DEEP_GEMM_NEEDS = f"{DEEP_GEMM} needs a GPU of compute capability {CAPABILITY}"


def check_fp8_words(config: RunConfig) -> list[str]:
    """Words that choose an implementation are known ones; the floor is a number of 0 or more."""
    found = []
    for key, words in CHOICES.items():
        value = getattr(config.fp8, key.partition(".")[2])
        if value not in words:
            found.append(f"{key}={value}: use {either(words)}")
    if not 0 <= config.fp8.gradient_amax_floor < 1:
        found.append(f"fp8.gradient_amax_floor={config.fp8.gradient_amax_floor:g}: use a number from 0 to 1, such as 0")
    return found


def check_primary_weights(config: RunConfig) -> list[str]:
    """Who gathers the weights can gather them in FP8."""
    if config.train.precision != "fp8" or config.fp8.primary_weights != "fp8" or config.optim.zero1 == "plain":
        return []
    return [
        f"optim.zero1={config.optim.zero1} gathers weights in BF16 alone: use fp8.primary_weights=bf16, or "
        "optim.zero1=plain"
    ]


def check_transformer_engine(config: RunConfig) -> list[str]:
    """A GPU is meant, and Transformer Engine can do what is asked."""
    if not _on_transformer_engine(config):
        return []
    found = []
    if config.train.device == "cpu":
        found.append(f"{ENGINE_NEEDS}, but train.device=cpu: {INSTEAD}")
    found += _lacking(ENGINE, config.fp8, GPU_FP8)
    if problem := fp8_problem(config.model):
        found.append(f"{ENGINE}: {problem}: choose such sizes, or {INSTEAD.removeprefix('use ')}")
    return found


def check_deep_gemm(config: RunConfig) -> list[str]:
    """A GPU is meant, and DeepGEMM can do what is asked."""
    if not _on_deep_gemm(config):
        return []
    found = []
    if config.train.device == "cpu":
        found.append(f"{DEEP_GEMM_NEEDS}, but train.device=cpu: {SAME}")
    found += _lacking(DEEP_GEMM, config.fp8, DEEP_GEMM_HAS)
    sizes = {
        "model.hidden_size": config.model.hidden_size, "model.moe_intermediate_size": config.model.moe_intermediate_size
    }  # fmt: skip
    for name, size in sizes.items():
        if size > 0 and size % DEEP_GEMM_MULTIPLE:
            rounded = -(-size // DEEP_GEMM_MULTIPLE) * DEEP_GEMM_MULTIPLE
            found.append(
                f"{DEEP_GEMM} takes multiples of {DEEP_GEMM_MULTIPLE}, {name}={size}: use {rounded}, or {SAME}"
            )
    return found


def check_fp8_packages(config: RunConfig) -> list[str]:
    """The chosen back ends are installed on this machine, in versions that the adapters are held to."""
    found = []
    if _on_transformer_engine(config) and (problem := transformer_engine_problem()):
        found.append(f"{ENGINE}: {problem}: {INSTEAD}")
    deep_gemm = version_problem("DeepGEMM", "deep_gemm", DEEP_GEMM_FROM, DEEP_GEMM_UNTIL)
    if _on_deep_gemm(config) and deep_gemm:
        found.append(f"{DEEP_GEMM}: {deep_gemm}: build it from its sources, or {SAME}")
    return found


def check_fp8_gpu(config: RunConfig) -> list[str]:
    """The GPUs and the CUDA of this machine are those that the chosen back ends need, as far as it tells without torch.

    Of GPUs of several kinds one that will do is enough: which of them a rank takes is seen when it starts.
    """
    on_engine, on_deep_gemm = _on_transformer_engine(config), _on_deep_gemm(config)
    if config.train.device == "cpu" or not (on_engine or on_deep_gemm):
        return []
    gpus, cuda, found = gpu_capabilities(), torch_cuda(), []
    kinds = [f"compute capability {' and '.join(dict.fromkeys(gpus))}"] if gpus else []
    here = ", ".join([*kinds, f"torch for CUDA {cuda}" if cuda else "torch without CUDA"])
    # with train.device=cuda, check_device says that torch has none
    is_wrong = bool(gpus and CAPABILITY not in gpus) or (cuda is None and config.train.device == "auto")
    if on_engine and (is_wrong or (cuda is not None and numbers(cuda) < numbers(TRANSFORMER_ENGINE_CUDA_FROM))):
        found.append(f"{ENGINE_NEEDS}, here: {here}: {INSTEAD}")
    if on_deep_gemm and is_wrong:
        found.append(f"{DEEP_GEMM_NEEDS}, here: {here}: {SAME}")
    return found


def _on_transformer_engine(config: RunConfig) -> bool:
    return config.train.precision == "fp8" and config.fp8.backend == "transformer_engine"


def _on_deep_gemm(config: RunConfig) -> bool:
    return config.train.precision == "fp8" and config.fp8.grouped == "deep_gemm"


def _lacking(key: str, fp8: FP8Config, has: Mapping[str, object]) -> list[str]:
    """A line for each of the keys that has another value than the only one of this back end."""
    values = {name: getattr(fp8, name) for name in has}
    return [
        f"{key} has no fp8.{name}={_word(value)}: use fp8.{name}={_word(has[name])}"
        for name, value in values.items()
        if value != has[name]
    ]


def _word(value: object) -> str:
    """As the command line takes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
