"""The one construction order: mesh, schedule, groups, stages, ZeRO-1, optimizer, data."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch

from data.loader import Loader
from launcher.config import RunConfig
from launcher.record.clock import PhaseClock, TimedDispatcher, TimedStages
from launcher.record.norms import NormsByGroup
from launcher.runtime import Process
from launcher.step_plan import StepPlan
from model.backends import transformer_engine_environment
from model.block import MoE
from model.fp8.apply import apply_fp8, give_weights, weight_blocks
from model.fp8.config import FP8Config
from model.fp8.quantise import Quantiser
from model.fp8.weights import WeightBlocks
from model.rowwise.apply import apply_rowwise
from model.rowwise.choose import rowwise_kernels
from model.wgrad_kernels import add_product_kernel, apply_add_product
from optim.adamw import AdamW
from optim.ema import EMA
from optim.fused import ADAMW
from optim.schedule import value_at
from parallel.apply import Layout, LocalModel, build_local_model
from parallel.bucket import LocalParameter
from parallel.deepspeed_zero1 import DeepSpeedZero1
from parallel.expert.wire import QUANTISER
from parallel.mesh import Groups, Mesh
from parallel.pipeline.actions import Action
from parallel.pipeline.chunk import ModelStages
from parallel.pipeline.executor import Executor
from parallel.pipeline.schedules import build as build_schedule
from parallel.pipeline.split import split_layers
from parallel.zero1 import Zero1

ZERO1: dict[str, type[Zero1]] = {"plain": Zero1, "deepspeed": DeepSpeedZero1}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}  # of what is not in FP8


class BuildError(ValueError):
    """Parts of a run that do not fit; the message names the key."""

    user_error = True


class Batches(Protocol):
    """Where micro-batches come from: `data.loader.Loader`, or a stand-in."""

    def microbatch(
        self, *, consumed: int, microbatch: int, data_rank: int, data_size: int, micro_batch_size: int
    ) -> np.ndarray:
        """int64 [micro_batch_size, S + 1], a pure function of its arguments."""
        ...


@dataclass
class Progress:
    """How far the run is: completed steps, tokens trained on, samples taken from the data. The whole data state."""

    step: int = 0
    tokens: int = 0
    samples: int = 0


class Executors:
    """The executor of each number of micro-batches: made when a step needs it, kept until one needs another.

    make: a new one for a number; first: of the largest step, which a run without a ramp never leaves.
    """

    def __init__(self, make: Callable[[int], Executor], first: int) -> None:
        self._make, self._number, self.last = make, first, make(first)

    def of(self, num_microbatches: int) -> Executor:
        """The executor of a step; a batch that grows makes a new one at most once for each of its levels."""
        if num_microbatches != self._number:
            self.last, self._number = self._make(num_microbatches), num_microbatches
        return self.last


@dataclass(frozen=True)
class Run:
    """Everything a training step of one rank works with."""

    config: RunConfig
    process: Process
    mesh: Mesh
    groups: Groups
    layout: Layout
    model: LocalModel
    executors: Executors
    zero1: Zero1
    optimizer: AdamW
    loader: Batches
    progress: Progress
    plan: StepPlan
    norms: NormsByGroup
    ema: EMA | None = None
    clock: PhaseClock = field(default_factory=PhaseClock)

    @property
    def executor(self) -> Executor:
        """What ran the last step, or would run the largest one."""
        return self.executors.last


def plan_layout(config: RunConfig, num_microbatches: int | None = None) -> Layout:
    """Schedule and stages of the run, for steps of so many micro-batches (None: the largest); pure."""
    schedule = build_schedule(
        config.parallel.schedule,
        num_ranks=config.parallel.pipeline,
        num_microbatches=num_microbatches or config.num_microbatches,
        stages_per_rank=config.parallel.stages_per_rank,
    )
    layers = config.parallel.layers_per_stage
    stages = split_layers(config.model, schedule.num_stages, layers, placement=schedule.placement)
    return Layout(schedule, stages, has_mtp=config.model.num_nextn_predict_layers > 0)


def build(
    config: RunConfig,
    process: Process,
    *,
    on_action: Callable[[Action], None] = lambda action: None,
    loader: Batches | None = None,
) -> Run:
    """Construct one rank's part of the run, freshly initialised; loader: in place of the configured data."""
    per_node = config.parallel.ranks_per_node or process.local_size
    mesh = Mesh(replace(config.parallel, ranks_per_node=per_node), process.rank)
    layout = plan_layout(config)
    timeout = timedelta(seconds=config.train.timeout_seconds)
    groups = Groups(mesh, layout.holder_sets(), timeout=timeout)
    dtype = DTYPES[config.train.precision]
    model = build_local_model(
        config.model, layout, mesh, groups, device=process.device, seed=config.train.seed,
        max_tokens=config.train.micro_batch_size * config.data.sequence_length,
        quantiser=_row_quantiser(config, process.device),
    )  # fmt: skip
    parameters = _in_blocks(config, model, process.device)
    zero1 = ZERO1[config.optim.zero1](parameters, dtype=dtype, offload=config.optim.offload)
    if config.train.precision == "fp8":
        _use_fp8(config.fp8, model, process.device)
    rowwise = rowwise_kernels(config.train.rowwise, process.device)
    add_product = add_product_kernel(config.train.weight_grad, process.device)
    rounded = zero1.rounded_weights()
    for stage in model.stages.values():
        give_weights(stage, rounded)
        apply_rowwise(stage, rowwise)
        apply_add_product(stage, add_product)
    optimizer = ADAMW[config.optim.adamw](
        [bucket.master for bucket in zero1.buckets],
        [bucket.step_grad for bucket in zero1.buckets],
        [bucket.decay for bucket in zero1.buckets],
        config.optim,
    )
    overlap = config.parallel.overlap if config.parallel.expert > 1 else "off"  # else nothing is ever in transit
    clock = PhaseClock()
    _time_transfers(model, clock)
    stages = TimedStages(ModelStages(model.stages, cut=overlap != "off", recompute=config.parallel.recompute), clock)

    def executor(num_microbatches: int) -> Executor:
        return Executor(
            plan_layout(config, num_microbatches).schedule, mesh, groups, stages,
            dtype=dtype, device=process.device, overlap=overlap, on_action=on_action,
        )  # fmt: skip

    executors = Executors(executor, config.num_microbatches)
    batches, plan = loader or open_data(config), StepPlan(config)
    if config.data.document_mask and not hasattr(batches, "batch"):
        raise BuildError("data.document_mask=true: this run's tokens have no documents: use data.document_mask=false")
    decay = config.optim.ema_decay
    ema = EMA([bucket.master for bucket in zero1.buckets], decay=decay) if decay else None
    norms = NormsByGroup(zero1, process.device)
    return Run(
        config, process, mesh, groups, layout, model, executors, zero1, optimizer, batches, Progress(), plan, norms,
        ema, clock,
    )  # fmt: skip


def _in_blocks(config: RunConfig, model: LocalModel, device: torch.device) -> list[LocalParameter]:
    """The parameters, with the blocks of those that the linears read in FP8 alone."""
    blocks: dict[str, WeightBlocks] = {}
    if config.train.precision == "fp8":
        for stage in model.stages.values():
            blocks |= weight_blocks(stage, config.fp8, device=device)
    return [replace(parameter, blocks=blocks.get(name)) for name, parameter in model.parameters.items()]


def _use_fp8(config: FP8Config, model: LocalModel, device: torch.device) -> None:
    """Let the linears of every stage compute in FP8."""
    if config.backend == "transformer_engine":
        os.environ.update(transformer_engine_environment(config))  # before anything imports it
    for stage in model.stages.values():
        apply_fp8(stage, config, device=device)


def _row_quantiser(config: RunConfig, device: torch.device) -> Quantiser:
    """Of rows sent in FP8; compiled on a CPU, the same bits as plain torch."""
    wires = (config.parallel.dispatch_wire, config.parallel.dispatch_grad_wire)
    if "fp8" not in wires or device.type != "cpu" or not config.fp8.native:
        return QUANTISER
    from model.fp8.native import NativeKernels

    return replace(QUANTISER, kernels=NativeKernels())


def _time_transfers(model: LocalModel, clock: PhaseClock) -> None:
    """Every MoE layer's transfers are timed, and the rows that arrive counted."""
    for stage in model.stages.values():
        for module in stage.modules():
            if isinstance(module, MoE):
                module.dispatcher = TimedDispatcher(module.dispatcher, clock)


def open_data(config: RunConfig) -> Loader:
    """The configured data, documents turned at the rate of the tokens seen."""
    rates = config.optim.fim_rate
    return Loader(config.data, fim_rate=(lambda tokens: value_at(rates, tokens)) if rates else None)
