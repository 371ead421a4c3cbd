"""`parallel.schedule=auto` for a run: what its stages cost and hold, the choice made from that, and the run it gives.

Costs are relative: the weights that a token uses (`parallel.pipeline.split`), forward, input gradient and weight
gradient alike, and all-to-all as the configuration says; on a given cluster they are the planner's seconds. What is
compared is the time of their phases under the run's own overlap. Bytes of weights are exact, of activations an
estimate from the model's dimensions. The same configuration gives the same choice on every rank. No torch.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from launcher.config import ConfigError, RunConfig
from model.config import ModelConfig
from model.counts import block_shapes
from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import Choice, Fits, Phases, choose
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.placement import copies
from parallel.pipeline.schedules import ScheduleError
from parallel.pipeline.simulate import Costs, Memory
from parallel.pipeline.split import end_cost, layer_costs, split_layers, stage_costs

PhaseCostsOf = Callable[[Schedule], PhaseCosts]


def resolved(config: RunConfig) -> RunConfig:
    """The run with the schedule that `auto` takes in place of `auto`; any other run as it is."""
    if config.parallel.schedule != "auto":
        return config
    best = choice(config).best
    per_rank = best.stages_per_rank if best.name == "interleaved" else None
    return replace(config, parallel=replace(config.parallel, schedule=best.name, stages_per_rank=per_rank))


def choice(config: RunConfig, *, phases: Phases | None = None) -> Choice:
    """Every schedule simulated for the run; ConfigError if none fits its memory.

    phases: such as `on_cluster`, instead of the relative ones.
    """
    parallel = config.parallel
    given = parallel.layers_per_stage
    limit = parallel.memory_gib
    fits = Fits(
        num_layers=config.model.num_hidden_layers,
        stages=len(given) if given else None,
        bytes=None if limit is None else limit * 2**30,
    )
    try:
        return choose(
            num_ranks=parallel.pipeline,
            num_microbatches=config.num_microbatches,
            fits=fits,
            costs_of=lambda schedule: costs_of(config, schedule),
            memory_of=lambda schedule: memory_of(config, schedule),
            phases=phases or Phases(lambda schedule: phase_costs_of(config, schedule), level_of(config)),
        )
    except ScheduleError as error:
        key = "" if limit is None else f" with parallel.memory_gib={limit:g}"
        raise ConfigError([f"parallel.schedule=auto{key}: {error}"]) from error


def costs_of(config: RunConfig, schedule: Schedule) -> Costs:
    """Costs of each stage; 1 is the mean forward of a rank's layers."""
    model, parallel = config.model, config.parallel
    stages = split_layers(model, schedule.num_stages, parallel.layers_per_stage, placement=schedule.placement)
    layers = layer_costs(model)
    sizes = tuple(len(stage) for stage in stages)
    unit = (sum(layers) + end_cost(model)) / schedule.num_ranks
    work = tuple(cost / unit for cost in stage_costs(layers, end_cost(model), sizes))
    ratio = parallel.all_to_all_over_compute if parallel.expert > 1 else 0.0
    travel = tuple(ratio * sum(layers[i] for i in stage if model.is_moe(i)) / unit for stage in stages)
    hidden, pair_hidden = {"off": (0.0, 0.0), "pairs": (0.0, 1.0), "all": (0.5, 1.0)}[parallel.overlap]
    return Costs(
        work, work, work, forward_comm=travel, input_grad_comm=travel, hidden=hidden, pair_hidden=pair_hidden
    )  # fmt: skip


def level_of(config: RunConfig) -> str:
    """Overlap that the run has: without expert parallelism there is nothing to hide."""
    return config.parallel.overlap if config.parallel.expert > 1 else "off"


def phase_costs_of(config: RunConfig, schedule: Schedule) -> PhaseCosts:
    """Phases of each stage in the unit of `costs_of`, to whose sums they add up.

    A MoE layer is a link, its shares of computation those of its weights; dense layers, head and MTP are the stage's
    end. Dispatch and combine are alike.
    """
    model, parallel = config.model, config.parallel
    stages = split_layers(model, schedule.num_stages, parallel.layers_per_stage, placement=schedule.placement)
    costs = costs_of(config, schedule)
    moe = [sum(model.is_moe(i) for i in stage) for stage in stages]
    if parallel.expert == 1 or not any(moe):
        return PhaseCosts(LayerCosts.even(0.0, 0.0), 0, costs.forward, costs.forward, costs.forward)
    assert isinstance(costs.forward, tuple) and isinstance(costs.forward_comm, tuple)
    layers = layer_costs(model)
    unit = (sum(layers) + end_cost(model)) / schedule.num_ranks
    whole = layers[next(i for i in range(len(layers)) if model.is_moe(i))] / unit
    attend, shared = _shares(model)
    layer = LayerCosts.even(whole, sum(costs.forward_comm) / sum(moe), attend=attend, shared=shared)
    end = tuple(work - number * whole for work, number in zip(costs.forward, moe, strict=True))
    return PhaseCosts(layer, tuple(moe), end, end, end)


def _shares(model: ModelConfig) -> tuple[float, float]:
    """Of a MoE layer's computation: attention with router and norms, and shared experts."""
    total = attend = shared = 0.0
    for name, shape in block_shapes(model, moe=True):
        used = model.num_experts_per_tok / model.n_routed_experts if ".experts." in name else 1.0
        size = math.prod(shape) * used
        total += size
        shared += size * (".shared_experts." in name)
        attend += size * (".experts." not in name and ".shared_experts." not in name)
    return attend / total, shared / total


def on_cluster(config: RunConfig, name: str) -> PhaseCostsOf:
    """The planner's seconds of every phase on a cluster, such as h800; HardwareError if there is none of that name.

    Where chunks alone hide their transfers too, these take their share of SMs and bandwidth from them as in a pair.
    """
    from launcher.plan.inputs import hardware_of, shipped
    from parallel.plan.cost import price
    from parallel.plan.job import Job

    train = config.train
    job = Job(
        model=config.model,
        parallel=config.parallel,
        hardware=hardware_of(name),
        sequence_length=config.data.sequence_length,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=config.num_microbatches * train.micro_batch_size * config.parallel.data,
        precision=train.precision,
        tokens=0.0,  # of the whole run, which is not asked for
        moments_bytes=2 if config.optim.moments == "bf16" else 4,
        fp8=config.fp8,
        calibration=shipped(),
    )

    def costs(schedule: Schedule) -> PhaseCosts:
        found = price(schedule, job.stages(schedule), job.shape(), job.hardware, job.calibration)
        return replace(found, single=frozenset()) if level_of(config) == "all" else found

    return costs


def memory_of(config: RunConfig, schedule: Schedule) -> Memory:
    """Bytes of each stage on a rank that holds it."""
    model, parallel = config.model, config.parallel
    stages = split_layers(model, schedule.num_stages, parallel.layers_per_stage, placement=schedule.placement)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    element = 4 if config.train.precision == "fp32" else 2
    copied = copies(schedule.placement)
    weights = [sum(_layer_bytes(config, model.is_moe(i), copied) for i in stage) for stage in stages]
    held = [
        sum(_kept_per_token(model, moe=model.is_moe(i), recompute=parallel.recompute) for i in stage) * tokens * element
        for stage in stages
    ]
    mtp = model.num_nextn_predict_layers
    embedding = _bytes_of(config, model.vocab_size * model.hidden_size, parallel.data * copied)
    weights[0] += embedding
    weights[-1] += embedding * (1 + bool(mtp)) - (embedding if mtp and _ends_meet(schedule) else 0)
    if mtp:
        joined = _bytes_of(config, 2 * model.hidden_size**2, parallel.data * copied)  # of embedding and hidden state
        weights[-1] += (_layer_bytes(config, True, copied) + joined) * mtp
        held[-1] += _kept_per_token(model, moe=True, recompute=parallel.recompute) * tokens * element * mtp
    activation = tuple(map(float, held))
    return Memory(activation, activation, tuple(map(float, weights)))


def _ends_meet(schedule: Schedule) -> bool:
    """Whether first and last stage are on one rank, and share the embedding there."""
    return schedule.holders(0) == schedule.holders(schedule.num_stages - 1)


def _bytes_of(config: RunConfig, weights: float, group: float) -> float:
    """A weight and its FP32 gradient on each rank, its FP32 master and two moments spread over the group."""
    element = 4 if config.train.precision == "fp32" else 2
    moments = 2 * (2 if config.optim.moments == "bf16" else 4)
    return weights * (element + 4) + weights * (4 + moments) / group


def _layer_bytes(config: RunConfig, moe: bool, copied: int) -> float:
    parallel = config.parallel
    total = 0.0
    for name, shape in block_shapes(config.model, moe=moe):
        if ".experts." in name:
            total += _bytes_of(config, math.prod(shape) / parallel.expert, copied * parallel.data / parallel.expert)
        else:
            total += _bytes_of(config, math.prod(shape), copied * parallel.data)
    return total


def _kept_per_token(model: ModelConfig, *, moe: bool, recompute: str) -> float:
    """Elements that a layer keeps of each token from forward to backward: the inputs of its products.

    report: neither heads nor the SwiGLUs' outputs, and of each norm only what it reads.
    """
    c, hidden = model, model.hidden_size
    if recompute == "layer":
        return hidden
    again = recompute == "report"
    attention = 2 * hidden + (c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim
    attention += c.num_attention_heads * ((0 if again else 2 * c.qk_head_dim + c.v_head_dim) + c.v_head_dim)
    width = 2 if again else 3  # gate and up; their product
    mlp = width * c.intermediate_size + (0 if again else hidden)
    if moe:
        expert = width * c.moe_intermediate_size
        mlp = c.num_experts_per_tok * (hidden + expert) + (0 if again else hidden) + c.n_shared_experts * expert
    return mlp + (hidden if recompute == "attend" else attention)
