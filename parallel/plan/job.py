"""What the planner is asked for: a run on a cluster, as plain values; and the plan it gives. No torch."""

from dataclasses import dataclass, field, replace

from model.config import ModelConfig
from model.fp8.config import DEFAULT_FP8, FP8Config
from parallel.config import ParallelConfig
from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import build, is_file
from parallel.pipeline.split import split_layers
from parallel.plan.hardware import Hardware
from parallel.plan.kernels import Calibration
from parallel.plan.layers import LayerShape

WAYS = {"flat": "expert", "collective": "node", "native": "node", "native_host": "node", "deepep": "node"}
PRECISIONS = ("fp8", "bf16", "fp32")


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
        fp8 = self.precision == "fp8"
        wires = [wire == "fp8" for wire in (parallel.dispatch_wire, parallel.dispatch_grad_wire)]
        return LayerShape(
            self.model, self.micro_batch_size * self.sequence_length // self.cut, self.sequence_length, parallel.expert,
            parallel.ranks_per_node or self.hardware.gpus_per_node, fp8, WAYS[parallel.dispatcher], wires[0], wires[1],
            parallel.recompute, cut=self.cut,
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
        return split_layers(self.model, schedule.num_stages, given, placement=schedule.placement)

    def with_parallel(self, **changes: object) -> "Job":
        """Another layout."""
        return replace(self, parallel=replace(self.parallel, **changes))  # type: ignore[arg-type]
