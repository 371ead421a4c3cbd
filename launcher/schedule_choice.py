"""`parallel.schedule=auto` for a run: what its stages cost and hold, the choice made from that, and the run it gives.

Costs are relative: the weights that a token uses (`parallel.pipeline.split`), forward, input gradient and weight
gradient alike, and all-to-all as the configuration says. Bytes of weights are exact, of activations an estimate from
the model's dimensions. The same configuration gives the same choice on every rank. No torch.
"""

import math
from dataclasses import replace

from launcher.config import ConfigError, RunConfig
from model.config import ModelConfig
from model.counts import block_shapes
from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import Choice, Fits, choose
from parallel.pipeline.placement import copies
from parallel.pipeline.schedules import ScheduleError
from parallel.pipeline.simulate import Costs, Memory
from parallel.pipeline.split import end_cost, layer_costs, split_layers, stage_costs


def resolved(config: RunConfig) -> RunConfig:
    """The run with the schedule that `auto` takes in place of `auto`; any other run as it is."""
    if config.parallel.schedule != "auto":
        return config
    best = choice(config).best
    per_rank = best.stages_per_rank if best.name == "interleaved" else None
    return replace(config, parallel=replace(config.parallel, schedule=best.name, stages_per_rank=per_rank))


def choice(config: RunConfig) -> Choice:
    """Every schedule simulated for the run; ConfigError if none fits its memory."""
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
    """Elements that a layer keeps of each token from forward to backward: the inputs of its products."""
    c, hidden = model, model.hidden_size
    if recompute == "layer":
        return hidden
    attention = 2 * hidden + (c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim
    attention += c.num_attention_heads * (2 * c.qk_head_dim + 2 * c.v_head_dim)
    mlp = 3 * c.intermediate_size + hidden
    if moe:
        expert = 3 * c.moe_intermediate_size
        mlp = c.num_experts_per_tok * (hidden + expert) + hidden + c.n_shared_experts * expert
    return mlp + (hidden if recompute == "attend" else attention)
