"""What the planner is asked for: a run on a cluster, as plain values; and the plan it gives. No torch."""

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

from model.config import ModelConfig
from model.counts import parameter_shapes
from model.fp8.config import DEFAULT_FP8, TRANSFORMER_ENGINE_MULTIPLE, FP8Config
from model.fp8.precision_map import WIDE, Precision
from parallel.config import ParallelConfig
from parallel.pipeline.actions import Schedule
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedules import build, is_file
from parallel.pipeline.split import split_layers
from parallel.plan.hardware import Hardware
from parallel.plan.kernels import Calibration
from parallel.plan.layers import LayerShape

WAYS = {"flat": "expert", "collective": "node", "native": "node", "native_host": "node", "deepep": "node"}
PRECISIONS = ("fp8", "bf16", "fp32")
# What an FP8 run on GPUs needs in place of an emulation's defaults (launcher/check/fp8.py).
GPU_FP8 = {
    "backend": "transformer_engine", "attention_cache": "wide", "input_cache": "wide", "recompute_swiglu": False,
    "gradient_amax_floor": 0.0, "weights_per_step": True, "watch_every": 0,
}  # fmt: skip


@lru_cache(maxsize=16)
def fp8_problem(model: ModelConfig) -> str | None:
    """The first weight whose sizes FP8 on tensor cores does not take; None where there is none."""
    least = TRANSFORMER_ENGINE_MULTIPLE
    for name, shape in parameter_shapes(model):
        if len(shape) > 1 and not any(part in name for part in WIDE) and any(size % least for size in shape[-2:]):
            return f"{name} is {' x '.join(map(str, shape[-2:]))}, FP8 products take multiples of {least}"
    return None


@lru_cache(maxsize=256)
def _split(
    model: ModelConfig, num_stages: int, given: tuple[int, ...] | None, placement: Placement
) -> tuple[range, ...]:
    """`split_layers`, once for each question."""
    return split_layers(model, num_stages, given, placement=placement)


@dataclass(frozen=True)
class Job:
    """A run.

    tokens: of the whole of it. moments_bytes: of an optimizer moment's element. bare: see `cost.StageCosts`. cut: ranks
    that would share each sequence (for what a longer context takes; the engine does not cut sequences). ramp: smaller
    batches before the constant one, each with the tokens seen in it, where the configuration has them.
    fp8: its back end and what it keeps. offload: masters and moments in host memory; to_offload: the overrides that
    would put them there. ema: an average of the weights is kept there.
    """

    model: ModelConfig
    parallel: ParallelConfig
    hardware: Hardware
    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    precision: str
    tokens: float
    moments_bytes: int = 2
    calibration: Calibration = field(default_factory=Calibration)
    bare: bool = False
    cut: int = 1
    ramp: tuple[tuple[int, float], ...] = ()
    fp8: FP8Config = DEFAULT_FP8
    offload: bool = False
    to_offload: str = "optim.offload=true"
    ema: bool = False

    @property
    def num_gpus(self) -> int:
        """Ranks of the run."""
        return self.parallel.world_size

    @property
    def fp8_alone(self) -> bool:
        """See `Precision.fp8_alone`."""
        return Precision(self.precision, self.fp8).fp8_alone

    @property
    def num_microbatches(self) -> int:
        """Of one pipeline and step."""
        return self.global_batch_size * self.cut // (self.micro_batch_size * self.parallel.data)

    @property
    def tokens_per_step(self) -> int:
        """Of all pipelines."""
        return self.global_batch_size * self.sequence_length

    def shape(self) -> LayerShape:
        """Of every layer."""
        parallel = self.parallel
        own = "fp32" if self.precision == "fp32" else "bf16"
        wires = (parallel.dispatch_wire, parallel.dispatch_grad_wire, parallel.combine_wire)
        out, gradients, back = (own if wire == "model" else wire for wire in wires)
        if parallel.dispatcher.startswith("native") and own == "fp32":
            back = own  # which adds FP32 rows up in FP32
        return LayerShape(
            self.model, self.micro_batch_size * self.sequence_length // self.cut, self.sequence_length, parallel.expert,
            parallel.ranks_per_node or self.hardware.gpus_per_node, self.precision == "fp8", WAYS[parallel.dispatcher],
            out, gradients, back, parallel.recompute, scale_bytes=4 if parallel.dispatcher == "deepep" else 1,
            cut=self.cut, element=4 if own == "fp32" else 2,
        )  # fmt: skip

    def schedule(self) -> Schedule:
        """The very one that will run."""
        return self._build(self.num_microbatches)

    def _build(self, num_microbatches: int) -> Schedule:
        return build(
            self.parallel.schedule,
            num_ranks=self.parallel.pipeline,
            num_microbatches=num_microbatches,
            stages_per_rank=self.parallel.stages_per_rank,
        )

    @property
    def settles(self) -> bool:
        """Whether time and memory of a long step follow from a short one: gpipe holds all of it, a file is as it is."""
        return self.parallel.schedule != "gpipe" and not is_file(self.parallel.schedule)

    def short_schedule(self) -> Schedule:
        """With as many micro-batches as its memory needs to reach its peak."""
        short = 2 * self.parallel.pipeline + 2
        number = min(self.num_microbatches, short) if self.settles else self.num_microbatches
        return self._build(number)

    def stages(self, schedule: Schedule) -> tuple[range, ...]:
        """Layers of each stage, as the run splits them."""
        given = self.parallel.layers_per_stage
        return _split(self.model, schedule.num_stages, given, schedule.placement)

    @property
    def emulates(self) -> bool:
        """Whether its FP8 back end computes in wider products."""
        return self.fp8.backend != GPU_FP8["backend"]

    def in_fp8(self) -> "Job":
        """In FP8 on tensor cores: with its own back end where that runs there, else with Transformer Engine."""
        fp8 = replace(self.fp8, **GPU_FP8) if self.emulates else self.fp8  # type: ignore[arg-type]
        return replace(self, precision="fp8", fp8=fp8)

    def fp8_words(self, given: "Job") -> list[str]:
        """The overrides of the section fp8 that make it of another job; none where it is not in FP8."""
        here = [(part.name, getattr(self.fp8, part.name)) for part in fields(FP8Config)]
        changed = [(key, value) for key, value in here if value != getattr(given.fp8, key)]
        words = [f"fp8.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changed]
        return words if self.precision == "fp8" else []

    def split_words(self, given: "Job") -> list[str]:
        """The overrides that take back a split of the layers that another job was given and this one leaves open."""
        keys = ("layers_per_stage", "stages_per_rank")
        there, here = ([getattr(job.parallel, key) for key in keys] for job in (given, self))
        return [
            f"parallel.{key}=null" for key, a, b in zip(keys, there, here, strict=True) if a is not None and b is None
        ]

    def with_parallel(self, **changes: object) -> "Job":
        """Another layout."""
        return replace(self, parallel=replace(self.parallel, **changes))  # type: ignore[arg-type]
