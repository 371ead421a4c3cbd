"""What `train.precision=fp8` means, as numbers and words; no torch, so that checks and planners can read it."""

from dataclasses import dataclass

BACKENDS = ("oracle_fast", "oracle_exact", "transformer_engine")
GROUPED = ("same", "deep_gemm")
SCALES = ("pow2", "fp32")
INPUT_CACHES = ("fp8", "wide")
ATTENTION_CACHES = ("e5m6", "fp8", "wide")
PRIMARY_WEIGHTS = ("fp8", "bf16")
# Versions whose signatures the adapter is held to, and the sizes that their FP8 products take.
TRANSFORMER_ENGINE_FROM, TRANSFORMER_ENGINE_UNTIL = "2.20", "2.21"
TRANSFORMER_ENGINE_MULTIPLE = 16
DEEP_GEMM_FROM, DEEP_GEMM_UNTIL = "2.1.1", "2.7"
DEEP_GEMM_MULTIPLE = 128
# The GPU that both are written for (on newer ones Transformer Engine computes blocks another way), and of CUDA.
CAPABILITY = "9.0"
TRANSFORMER_ENGINE_CUDA_FROM = "12.9"


@dataclass(frozen=True)
class FP8Config:
    """How the linears compute in FP8; read where `train.precision=fp8`, of no effect otherwise.

    backend: `oracle_fast` and `oracle_exact` emulate in plain products on any machine, `transformer_engine` runs on a
    GPU. grouped: what computes the experts' products, the `same` or `deep_gemm` (a GPU). scales: of every tile.
    gradient_amax_floor: least largest magnitude of a gradient's tile (0: none; the released kernel's 1e-4 would flush
    the small gradients of large batches). input_cache: what a linear keeps of its input for the weight gradient, the
    1x128 tiles of forward (`fp8`) or 128x1 tiles of the wide input (`wide`). attention_cache: the same for the linear
    after attention. recompute_swiglu: keep the SwiGLU's input in FP8 alone and compute its output again in backward.
    native: compiled quantisers on a CPU, the same bits as plain torch. primary_weights: what of these linears' weights
    a rank holds beside its shard of the FP32 masters, the `fp8` that was rounded from those, or `bf16` to round from.
    weights_per_step: keep the rounded weights of a step as products read them. watch_every: steps between rows of the
    FP8 statistics in the event log; 0: never.
    """

    backend: str = "oracle_fast"
    grouped: str = "same"
    scales: str = "pow2"
    gradient_amax_floor: float = 0.0
    input_cache: str = "fp8"
    attention_cache: str = "e5m6"
    recompute_swiglu: bool = True
    native: bool = True
    primary_weights: str = "fp8"
    weights_per_step: bool = True
    watch_every: int = 0


DEFAULT_FP8 = FP8Config()
