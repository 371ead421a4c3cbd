"""Seconds of kernels from their shapes and the hardware alone, times the factors of a calibration. No torch.

Matrix products: tiles of 128 x 128 run in waves over the SMs, a tile taking 2 * 128 * 128 * (K + K0) FLOPs at a share
of the peak. Share and K0 (a tile's start and end, as length of K) are the two numbers that fit DeepGEMM's table
for the H800 at 4,096 rows (README of its first release) to 5%. Everything elementwise takes its bytes over the memory's
bandwidth. The attention core takes shares of the peak that FlashAttention-3 publishes (arXiv 2407.08608).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from parallel.plan.hardware import Hardware, check_precision

CLASSES = ("grouped_gemm", "linear_gemm", "attention", "quantise", "norm", "elementwise", "dispatch", "combine")
TILE = 128
GEMM_SHARE, GEMM_K0 = 0.7075, 650.0  # 1,400 of 1,979 TFLOPS; K0 for one-byte operands
ATTENTION_SHARE, ATTENTION_GRAD_SHARE = 0.56, 0.44  # causal, 4K, head 128: 550 and 435 of 989 TFLOPS
HBM_SHARE = 0.8
LAUNCH_SECONDS = 2e-6  # of a short kernel
LINK_SHARE = 0.85  # DeepEP's published times against parallel.expert.cost on the bare links: 0.77 to 0.89
DEEPEP_SMS, ALL_TO_ALL_SMS = 24, 20  # of DeepEP's published times; beside computation, report section 3.2.2


@dataclass(frozen=True)
class Calibration:
    """Measured over predicted seconds of each class of kernels, 1 where nothing was measured.

    factors: under overlap, with 20 SMs fewer; source: what was measured, and where. training: a chunk in training over
    the same chunk in a profile with balanced experts and no traffic between stages.
    """

    source: str = "first principles"
    factors: Mapping[str, float] = field(default_factory=dict)
    training: float = 1.0

    def factor(self, kind: str) -> float:
        """Of a class."""
        return self.factors.get(kind, 1.0)


@dataclass(frozen=True)
class Machine:
    """A GPU with `num_sms` SMs left for computation (20 go to the all-to-all while that runs).

    fp32: what is not in FP8 is in FP32, without TF32 as torch has it, else in BF16. HardwareError where the hardware's
    file does not say how fast that is.
    """

    hardware: Hardware
    num_sms: int
    calibration: Calibration = field(default_factory=Calibration)
    fp32: bool = False

    def __post_init__(self) -> None:
        check_precision(self.hardware, "fp32" if self.fp32 else "bf16")

    @classmethod
    def beside_all_to_all(
        cls, hardware: Hardware, calibration: Calibration | None = None, *, expert: int, fp32: bool = False
    ) -> "Machine":
        """What computes while experts over `expert` ranks exchange rows; calibration None: first principles.

        A machine that would have fewer SMs left than it gives away, such as a CPU, keeps all of them.
        """
        gives = expert > 1 and hardware.num_sms >= 2 * ALL_TO_ALL_SMS
        left = hardware.num_sms - (ALL_TO_ALL_SMS if gives else 0)
        return cls(hardware, left, calibration or Calibration(), fp32=fp32)

    @property
    def sm_share(self) -> float:
        """Of the GPU's SMs."""
        return self.num_sms / self.hardware.num_sms

    @property
    def wide_flops(self) -> float:
        """Peak of products that are not in FP8."""
        return self.hardware.fp32_flops if self.fp32 and self.hardware.fp32_flops else self.hardware.bf16_flops

    def gemm(
        self, m: int, n: int, k: int, *, fp8: bool, kind: str = "linear_gemm", groups: int = 1, accumulate: bool = False
    ) -> float:
        """groups products [m, k] x [k, n]; kind: the class; accumulate: into FP32 in memory."""
        if min(m, n, k) < 1:
            return 0.0
        peak = self.hardware.fp8_flops if fp8 else self.wide_flops
        waves = ceil(groups * ceil(m / TILE) * ceil(n / TILE) / self.num_sms)
        start = GEMM_K0 if fp8 else GEMM_K0 / 2 * peak / self.hardware.bf16_flops  # the same time at a lower rate
        busy = waves * 2 * TILE * TILE * (k + start) / (GEMM_SHARE * peak / self.hardware.num_sms)
        moved = groups * m * n * 8 if accumulate else 0
        return self._scaled(kind, busy + self._bytes(moved))

    def grouped(self, rows: int, n: int, k: int, *, fp8: bool, groups: int) -> float:
        """Products of `rows` in all, spread over groups with weights of their own: half a tile of padding for each."""
        return self.gemm(rows + groups * TILE // 2, n, k, fp8=fp8, kind="grouped_gemm")

    def attention(self, flops: float, *, backward: bool) -> float:
        """The attention core of so many causal FLOPs; backward: with what it computes again, 2.6 times the forward."""
        share = ATTENTION_GRAD_SHARE if backward else ATTENTION_SHARE
        return self._scaled("attention", flops / (share * self.wide_flops * self.sm_share))

    def stream(self, kind: str, num_bytes: float) -> float:
        """A kernel of class `kind` that is bound by the bytes it reads and writes."""
        return self._scaled(kind, self._bytes(num_bytes) + LAUNCH_SECONDS) if num_bytes else 0.0

    def _bytes(self, num_bytes: float) -> float:
        return num_bytes / (HBM_SHARE * self.hardware.hbm_bytes_per_second * self.sm_share)

    def _scaled(self, kind: str, seconds: float) -> float:
        return seconds * self.calibration.factor(kind)


@dataclass
class Bill:
    """Seconds by (phase, class), and kernels by name for whoever wants to see them."""

    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, phase: str, kind: str, seconds: float) -> None:
        """Add a kernel."""
        key = phase, kind
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def phase(self, name: str) -> float:
        """Of a phase."""
        return sum(seconds for (phase, _), seconds in self.seconds.items() if phase == name)

    def kind(self, name: str) -> float:
        """Of a class."""
        return sum(seconds for (_, kind), seconds in self.seconds.items() if kind == name)
