"""What can be wrong in the layout of a run: ranks against layers, experts, batch and pipeline schedule; no torch.

Rules as in launcher/check/run.py: pure functions from the configuration to messages that name key, value and remedy.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from launcher.config import RunConfig
from optim.ramp import ramp_problems
from parallel.config import sms_problems, wire_problems


def check_experts(config: RunConfig) -> list[str]:
    """Experts spread evenly over the expert axis, which lies inside the data axis."""
    expert, data, routed = config.parallel.expert, config.parallel.data, config.model.n_routed_experts
    if min(expert, data, routed) < 1:
        return []
    both = [n for n in divisors(routed) if data % n == 0]
    found = []
    if routed % expert:
        good = both if len(both) > 1 else divisors(routed)
        found.append(f"parallel.expert={expert} does not divide model.n_routed_experts={routed}: use {either(good)}")
    if data % expert:
        found.append(f"parallel.expert={expert} does not divide parallel.data={data}: use {either(both)}")
    return found


def check_nodes(config: RunConfig) -> list[str]:
    """An expert group is whole nodes or lies inside one, where the dispatcher knows nodes; wires need one that does."""
    parallel = config.parallel
    expert, host = parallel.expert, parallel.ranks_per_node
    found = wire_problems(parallel) + sms_problems(parallel)
    if parallel.dispatcher == "flat" or host is None or min(expert, host) < 1:
        return found
    if expert % host == 0 or host % expert == 0:
        return found
    both = [n for n in divisors(expert) if n < host] or [expert]
    sizes = [n for n in divisors(config.model.n_routed_experts) if parallel.data % n == 0]
    fits = [n for n in sizes if n % host == 0 or host % n == 0]
    return [
        *found,
        f"parallel.expert={expert} is neither whole nodes of parallel.ranks_per_node={host} nor inside one: use "
        f"parallel.expert={either(fits)}, or parallel.ranks_per_node={either(both)}",
    ]


def check_batch(config: RunConfig) -> list[str]:
    """The batch of a step splits into whole micro-batches on every data rank."""
    batch, micro, data = config.train.global_batch_size, config.train.micro_batch_size, config.parallel.data
    if min(micro, data) < 1:
        return []
    if not isinstance(batch, int):
        return _ramp_problems(config)
    if batch < 1 or batch % (micro * data) == 0:
        return []
    samples, pipeline, whole = micro * data, config.parallel.pipeline, batch // (micro * data)
    below = range(whole, max(0, whole - 2 * min(pipeline, config.model.num_hidden_layers)), -1)
    searches = (below, _more_microbatches(config, whole))
    fits = [next((n for n in counts if _schedule_error(config, pipeline, n) is None), 0) for counts in searches]
    near = [n * samples for n in fits if n] or [n * samples for n in (whole, whole + 1) if n]
    return [
        f"train.global_batch_size={batch} is not divisible by train.micro_batch_size={micro} * parallel.data={data} "
        f"= {samples}: use {either(near)}"
    ]


def check_schedule(config: RunConfig) -> list[str]:
    """The pipeline schedule exists for this many ranks and micro-batches."""
    parallel, train = config.parallel, config.train
    samples = train.micro_batch_size * parallel.data
    if not _is_schedule(parallel.schedule) or min(parallel.pipeline, samples) < 1:
        return []
    if isinstance(train.global_batch_size, int) and train.global_batch_size < 1:
        return []
    if parallel.pipeline > config.model.num_hidden_layers or check_batch(config):
        return []  # another rule says so
    for count in config.microbatch_counts:
        reason = _schedule_error(config, parallel.pipeline, count) if count else "a step needs at least one micro-batch"
        if reason is not None:
            return [_no_schedule(config, count, reason)]
    return []


def _no_schedule(config: RunConfig, count: int, reason: str) -> str:
    parallel, train = config.parallel, config.train
    samples = train.micro_batch_size * parallel.data
    works = next((n for n in _more_microbatches(config, count) if not _schedule_error(config, parallel.pipeline, n)), 0)
    advice = f"; train.global_batch_size={works * samples} would give {works}" if works else ""
    return (
        f"parallel.schedule={parallel.schedule} with parallel.pipeline={parallel.pipeline} and {count} micro-batches "
        f"(train.global_batch_size={count * samples} / (train.micro_batch_size={train.micro_batch_size} * "
        f"parallel.data={parallel.data})): {reason}{advice}"
    )


def _ramp_problems(config: RunConfig) -> list[str]:
    """A batch that grows does so by multiples that every data rank can split."""
    train = config.train
    assert not isinstance(train.global_batch_size, int)
    samples = train.micro_batch_size * config.parallel.data
    multiple = train.batch_multiple or samples
    if multiple < 1 or multiple % samples:
        low = max(1, multiple // samples)
        return [
            f"train.batch_multiple={multiple} is not divisible by train.micro_batch_size={train.micro_batch_size} * "
            f"parallel.data={config.parallel.data} = {samples}: use {low * samples} or {(low + 1) * samples}"
        ]
    return ramp_problems("train.global_batch_size", train.global_batch_size, multiple=multiple)


def _is_schedule(name: str) -> bool:
    from parallel.pipeline.schedules import SCHEDULES, is_file

    return name == "auto" or name in SCHEDULES or is_file(name)


def _more_microbatches(config: RunConfig, count: int) -> range:
    """Counts above `count` among which a schedule finds one that suits it: twice the ranks and some is enough."""
    ranks = min(config.parallel.pipeline, config.model.num_hidden_layers)
    return range(count + 1, max(count, 2 * ranks) + 2 * ranks + 1)


def _schedule_error(config: RunConfig, num_ranks: int, num_microbatches: int) -> str | None:
    from parallel.pipeline.schedules import validate

    if num_ranks > config.model.num_hidden_layers:
        return "more ranks than layers"
    name = "1f1b" if config.parallel.schedule == "auto" else config.parallel.schedule  # which is always a candidate
    wanted = config.parallel.stages_per_rank if name != "1f1b" else None
    try:
        validate(name, num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=wanted)
    except ValueError as error:
        return str(error)
    return None


def check_stages(config: RunConfig) -> list[str]:
    """Every pipeline stage gets at least one layer, and stages given by hand add up."""
    from parallel.pipeline.split import split_layers

    ranks, layers, given = config.parallel.pipeline, config.model.num_hidden_layers, config.parallel.layers_per_stage
    if min(ranks, layers) < 1 or not _is_schedule(config.parallel.schedule):
        return []
    if ranks > layers:
        most = layers - bool(_schedule_error(config, layers, 4 * layers))  # DualPipe needs an even number
        return [
            f"parallel.pipeline={ranks} is more than model.num_hidden_layers={layers}, and each stage needs a layer: "
            f"use {most} or fewer"
        ]
    per_rank = _stages_per_rank(config)
    if per_rank is None or (config.parallel.schedule == "auto" and given is None):
        return []  # the first is another rule's; `auto` takes only what fits
    stages = ranks * per_rank
    if stages > layers:
        return [_too_many_stages(config, per_rank)]
    found = []
    if given is not None:
        key = f"parallel.layers_per_stage={_list(given)}"
        even = _list([(layers + i) // stages for i in reversed(range(stages))])
        if len(given) != stages:
            whose = f"parallel.pipeline={ranks} stages"
            if per_rank > 1:
                whose = f"the {stages} stages of parallel.schedule={config.parallel.schedule} on {ranks} ranks"
            found.append(f"{key} has {len(given)} numbers for {whose}: use {even}")
        elif sum(given) != layers:
            found.append(f"{key} adds up to {sum(given)}, model.num_hidden_layers={layers}: use {even}")
        elif min(given) < 1:
            found.append(f"{key} leaves a stage without a layer: use {even}")
    if found:
        return found
    try:
        split_layers(config.model, stages, given)
    except ValueError as error:
        return [f"parallel.pipeline={ranks}, model.num_hidden_layers={layers}: {error}"]
    return []


def _stages_per_rank(config: RunConfig) -> int | None:
    """Stages a rank of the schedule; None where there is none. With `auto`, as many as layers_per_stage has."""
    from parallel.pipeline.schedules import stages_per_rank_of

    parallel = config.parallel
    if parallel.schedule == "auto":
        return max(1, len(parallel.layers_per_stage or ()) // parallel.pipeline)
    try:
        return stages_per_rank_of(parallel.schedule, parallel.stages_per_rank)
    except ValueError:
        return None


def _too_many_stages(config: RunConfig, per_rank: int) -> str:
    parallel, layers = config.parallel, config.model.num_hidden_layers
    fitting = layers // per_rank
    ways = [f"parallel.pipeline={fitting}"] if fitting else []
    if parallel.schedule == "interleaved" and layers >= parallel.pipeline:
        ways.append(f"parallel.stages_per_rank={layers // parallel.pipeline}")
    ways.append("parallel.schedule=1f1b, which has one stage a rank")
    return (
        f"parallel.schedule={parallel.schedule} with parallel.pipeline={parallel.pipeline} has {per_rank} stages a "
        f"rank, {parallel.pipeline * per_rank} in all, and each needs one of model.num_hidden_layers={layers}: use "
        f"{either(ways)}"
    )


def check_world_size(config: RunConfig, world_size: int) -> list[str]:
    """The processes that were started are as many as the layout has ranks."""
    parallel = config.parallel
    if world_size == parallel.world_size or min(parallel.pipeline, parallel.data) < 1:
        return []
    fitting = [f"parallel.pipeline={p} parallel.data={d}" for p, d in _layouts(config, world_size)]
    advice = f", or set {' or '.join(fitting)}" if fitting else ""
    return [
        f"{world_size} processes were started, parallel.pipeline={parallel.pipeline} * parallel.data={parallel.data} "
        f"needs {parallel.world_size}: start {parallel.world_size}{advice}"
    ]


def _layouts(config: RunConfig, world_size: int) -> list[tuple[int, int]]:
    """At most three (pipeline, data) with this many ranks on which nothing else would be wrong, nearest first."""
    fitting = []
    for pipeline in sorted(divisors(world_size), key=lambda n: abs(n - config.parallel.pipeline)):
        layout = replace(config.parallel, pipeline=pipeline, data=world_size // pipeline)
        other = replace(config, parallel=layout)
        if not any(rule(other) for rule in (check_experts, check_batch, check_stages, check_schedule)):
            fitting.append((pipeline, world_size // pipeline))
    return fitting[:3]


def divisors(number: int) -> list[int]:
    """The whole numbers that divide `number`, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def either(values: Sequence[object]) -> str:
    """`a, b or c`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _list(numbers: Sequence[int]) -> str:
    return "[" + ",".join(map(str, numbers)) + "]"
