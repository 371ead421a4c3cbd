"""What the optimizer does, as numbers; the report's values as defaults (section 4.2)."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Segment:
    """One piece of a schedule: from the value before it to `value` along `shape`, over `tokens` tokens.

    shape: `constant` (jump to `value` and stay), `linear` or `cosine`.
    """

    shape: str
    value: float
    tokens: float = float("inf")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with FP32 masters; every quantity that changes in a run is a list of segments over tokens seen."""

    lr: tuple[Segment, ...] = field(default_factory=lambda: (Segment("constant", 2.2e-4),))
    mtp_lambda: tuple[Segment, ...] = field(default_factory=lambda: (Segment("constant", 0.3),))
    bias_update_speed: tuple[Segment, ...] = field(default_factory=lambda: (Segment("constant", 1e-3),))
    # Share of documents turned for fill in the middle; none: as the data was prepared. A run can only lower that rate.
    fim_rate: tuple[Segment, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    adamw: str = "plain"  # plain | torch_fused | deepspeed_cpu | apex | transformer_engine: whose arithmetic
    zero1: str = "plain"  # plain | deepspeed: who shards, reduces and gathers
    offload: bool = False  # FP32 masters and moments in host memory, updated there
    ema_decay: float = 0.0  # of an average of the weights in host memory, after every step; 0: none is kept
    moments: str = "bf16"  # bf16 | fp32: storage of both AdamW moments
