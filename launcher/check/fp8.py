"""What can be wrong with train.precision=fp8: the back end's version and machine, and sizes that it cannot do."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from launcher.check.layout import either
from launcher.config import RunConfig
from model.backends import version_problem
from model.counts import parameter_shapes
from model.fp8.config import (
    ATTENTION_CACHES,
    BACKENDS,
    DEEP_GEMM_FROM,
    DEEP_GEMM_MULTIPLE,
    DEEP_GEMM_UNTIL,
    GROUPED,
    INPUT_CACHES,
    SCALES,
    TRANSFORMER_ENGINE_FROM,
    TRANSFORMER_ENGINE_MULTIPLE,
    TRANSFORMER_ENGINE_UNTIL,
    FP8Config,
)

CHOICES = {
    "fp8.backend": BACKENDS,
    "fp8.grouped": GROUPED,
    "fp8.scales": SCALES,
    "fp8.input_cache": INPUT_CACHES,
    "fp8.attention_cache": ATTENTION_CACHES,
}
# What the back ends of a GPU do: any other value of these keys would have no effect there.
TRANSFORMER_ENGINE_HAS = {
    "attention_cache": "wide",
    "input_cache": "wide",
    "recompute_swiglu": False,
    "gradient_amax_floor": 0.0,
    "weights_per_step": True,
    "watch_every": 0,
}
DEEP_GEMM_HAS = {"recompute_swiglu": False, "weights_per_step": True, "watch_every": 0}
INSTEAD = "use fp8.backend=oracle_fast (an emulation, on any machine) or train.precision=bf16"


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


def check_transformer_engine(config: RunConfig) -> list[str]:
    """Transformer Engine is there in a known version, a GPU is meant, and it can do what is asked."""
    if config.train.precision != "fp8" or config.fp8.backend != "transformer_engine":
        return []
    found = []
    key = "fp8.backend=transformer_engine"
    needed = f"{TRANSFORMER_ENGINE_FROM} or newer, below {TRANSFORMER_ENGINE_UNTIL}"
    try:
        installed = version("transformer_engine")
        if not _tuple(TRANSFORMER_ENGINE_FROM) <= _tuple(installed) < _tuple(TRANSFORMER_ENGINE_UNTIL):
            found.append(f"{key}: Transformer Engine {installed} is installed, {needed} is needed: {INSTEAD}")
    except PackageNotFoundError:
        found.append(f"{key}: Transformer Engine is not installed ({needed} is needed): {INSTEAD}")
    if config.train.device == "cpu":
        found.append(f"{key} needs a GPU of compute capability 9.0, but train.device=cpu: {INSTEAD}")
    return found + _lacking(key, config.fp8, TRANSFORMER_ENGINE_HAS) + _odd_sizes(config)


def check_deep_gemm(config: RunConfig) -> list[str]:
    """DeepGEMM is there in a known version, a GPU is meant, and it can do what is asked."""
    if config.train.precision != "fp8" or config.fp8.grouped != "deep_gemm":
        return []
    key, instead, found = "fp8.grouped=deep_gemm", "use fp8.grouped=same", []
    if problem := version_problem("DeepGEMM", "deep_gemm", DEEP_GEMM_FROM, DEEP_GEMM_UNTIL):
        found.append(f"{key}: {problem}: build it from its sources, or {instead}")
    if config.train.device == "cpu":
        found.append(f"{key} needs a GPU of compute capability 9.0, but train.device=cpu: {instead}")
    found += _lacking(key, config.fp8, DEEP_GEMM_HAS)
    sizes = {
        "model.hidden_size": config.model.hidden_size, "model.moe_intermediate_size": config.model.moe_intermediate_size
    }  # fmt: skip
    for name, size in sizes.items():
        if size % DEEP_GEMM_MULTIPLE:
            rounded = -(-size // DEEP_GEMM_MULTIPLE) * DEEP_GEMM_MULTIPLE
            found.append(f"{key} takes multiples of {DEEP_GEMM_MULTIPLE}, {name}={size}: use {rounded}, or {instead}")
    return found


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


def _odd_sizes(config: RunConfig) -> list[str]:
    """Weights whose sizes its FP8 products cannot take, by name."""
    least = TRANSFORMER_ENGINE_MULTIPLE
    wide = ("embed_tokens", "lm_head", ".gate.")
    for name, shape in parameter_shapes(config.model):
        if len(shape) > 1 and not any(part in name for part in wide) and any(size % least for size in shape[-2:]):
            sizes = " x ".join(map(str, shape[-2:]))
            return [
                f"fp8.backend=transformer_engine: {name} is {sizes}, its FP8 products take multiples of {least}: "
                f"choose such sizes, or {INSTEAD.removeprefix('use ')}"
            ]
    return []


def _tuple(text: str) -> tuple[int, ...]:
    numbers = [part for part in text.split("+")[0].split(".") if part.isdecimal()]
    return tuple(map(int, numbers))
