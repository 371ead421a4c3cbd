"""Bytes of every pipeline rank by kind, from the parameter shapes and the schedule's own actions. No torch.

Weights, gradients, masters and moments follow `parallel.zero1`. The rest rises and falls with the rank's actions
(`parallel.plan.live`); posted receives follow `parallel.pipeline.p2p`. What it says is held to the tensors that runs on
gloo processes allocate (`tests/parallel/plan/test_memory_measured.py`).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from model.config import ModelConfig
from model.counts import parameter_shapes
from model.fp8.config import DEFAULT_FP8, FP8Config
from model.fp8.memory import rounded_weight_bytes
from model.fp8.precision_map import WIDE, Precision
from parallel.config import ParallelConfig
from parallel.pipeline.actions import Action, Pair, Schedule, parts
from parallel.pipeline.overlap import halves_of
from parallel.plan.job import Job
from parallel.plan.layers import LayerShape, balanced_traffic
from parallel.plan.live import KINDS, Setting, Stage, Swing, UnderWay, fronts, parts_of
from parallel.plan.swing import Acting, swing_of

POSTED_AHEAD = 4  # receives of each kind, parallel.pipeline.p2p
NCCL_BYTES = 1.5 * 2**30  # assumed: CUDA context and the buffers of about a dozen communicators
MARGIN = 0.04  # of what is allocated: what the caching allocator cannot use, assumed
# A row: orders, inverses and weights of the local and the flat dispatcher, of the one in stages; there also of a copy.
LOCAL_INDEX_BYTES, FLAT_INDEX_BYTES, ROUTED_INDEX_BYTES, COPY_INDEX_BYTES = 16, 36, 28, 24
ALIGN = 64  # elements, parallel.bucket
ADAMW_CHUNK, INT64 = 1 << 15, 8  # optim.adamw, a token
GPU_LOGITS_BYTES, CPU_LOGITS_BYTES = 256 << 20, 4 << 20  # FP32 logits at a time, model.loss


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one rank in its machine's memory, pinned where it has a GPU; checkpoints under way come on top.

    With `optim.offload` masters, moments and a copy of the reduced gradients. ema: the average of the weights and the
    buffer through which the masters reach it (`optim.ema`).
    """

    masters: float = 0.0
    gradients: float = 0.0
    moments: float = 0.0
    ema: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.rows().values())

    def rows(self) -> dict[str, float]:
        """By kind."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one GPU by kind, at the moment when it holds most; host: beside it, in the machine's memory.

    masters, moments: 0 where they are on the host. ema: on the GPU, always 0. activations: kept for the backward or for
    a weight gradient; working: of the phase that computes then; buffers: rotations, routers, AdamW's scratch, tokens.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    ema: float
    activations: float
    working: float
    all_to_all: float
    p2p: float
    buffers: float
    nccl: float
    margin: float
    host: HostMemory = HostMemory()

    @property
    def total(self) -> float:
        """All of the GPU's."""
        return sum(self.rows().values())

    def rows(self) -> dict[str, float]:
        """By kind, the host's left out."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "host"}


@dataclass(frozen=True)
class Holding:
    """Parameters of one rank that the same group of `group` ranks holds.

    rounded: those that products read in FP8; alone: they are held in no wider form (all of these parameters, or none).
    """

    parameters: int
    group: int
    expert: bool
    rounded: int = 0
    alone: bool = False


def stages_of(name: str, stages: tuple[range, ...], *, has_mtp: bool) -> tuple[int, ...]:
    """Stages that hold a parameter of `model.counts.parameter_shapes`; as `parallel.apply.Layout` has it."""
    last = len(stages) - 1
    top, _, rest = name.partition(".")
    if top == "layers":
        layer = int(rest.partition(".")[0])
        return tuple(s for s, layers in enumerate(stages) if layer in layers)
    if top == "embed_tokens":
        return tuple({0, last}) if has_mtp else (0,)
    return (last,)


def in_blocks(name: str, shape: tuple[int, ...]) -> bool:
    """Whether products read a parameter in FP8, where the run is in FP8; as `model.fp8.apply.fp8_linears` has it."""
    return len(shape) > 1 and not any(part in name for part in WIDE)


def holdings(
    model: ModelConfig,
    parallel: ParallelConfig,
    schedule: Schedule,
    stages: tuple[range, ...],
    *,
    fp8_alone: bool = False,
) -> tuple[tuple[Holding, ...], ...]:
    """What every pipeline rank holds, by group of ranks that share it; fp8_alone: see `Precision.fp8_alone`."""
    found: list[dict[tuple[int, bool, bool, bool], tuple[int, int]]] = [{} for _ in range(schedule.num_ranks)]
    for name, shape in parameter_shapes(model):
        expert = ".mlp.experts." in name
        on = stages_of(name, stages, has_mtp=model.num_nextn_predict_layers > 0)
        ranks = sorted({rank for stage in on for rank in schedule.holders(stage)})
        size = math.prod(shape) // (parallel.expert if expert else 1)
        rounded = size if in_blocks(name, shape) else 0
        group = len(ranks) * parallel.data // (parallel.expert if expert else 1)
        key = group, expert, len(shape) > 1, fp8_alone and rounded > 0
        for rank in ranks:
            before = found[rank].get(key, (0, 0))
            found[rank][key] = before[0] + size, before[1] + rounded
    return tuple(
        tuple(
            Holding(size, group, expert, rounded, alone)
            for (group, expert, _, alone), (size, rounded) in sorted(held.items())
        )
        for held in found
    )


def held_by(job: Job, schedule: Schedule, stages: tuple[range, ...]) -> tuple[tuple[Holding, ...], ...]:
    """`holdings` of a run."""
    return holdings(job.model, job.parallel, schedule, stages, fp8_alone=job.fp8_alone)


def setting_of(
    shape: LayerShape, parallel: ParallelConfig, *, precision: str, fp8: FP8Config, on_cpu: bool = False
) -> Setting:
    """What decides a chunk's bytes, of a run."""
    spread = parallel.expert > 1
    return Setting(
        model=shape.model,
        precision=Precision(precision, fp8),
        tokens=shape.tokens,
        length=min(shape.sequence_length, shape.tokens),
        rows=shape.rows,
        spread=spread,
        cut=(spread and parallel.overlap != "off") or shape.recompute != "none",
        recompute=shape.recompute,
        on_cpu=on_cpu,
        logits_bytes=CPU_LOGITS_BYTES if on_cpu else GPU_LOGITS_BYTES,
        under_way=under_way(shape, element=4 if precision == "fp32" else 2),
    )


def under_way(shape: LayerShape, *, element: int) -> UnderWay:
    """Buffers of a micro-batch's transfers: `parallel.expert.flat` where a row goes to every expert, else `collective`.

    Both sides have one, and the first stage's stays until the second is over. Wires as configured.
    """
    wide = shape.model.hidden_size * element
    if shape.expert == 1:
        return UnderWay(index=LOCAL_INDEX_BYTES * shape.rows)
    if shape.way == "expert":
        rows = 2.0 * shape.rows * wide
        return UnderWay(rows, rows, rows, FLAT_INDEX_BYTES * shape.rows)
    copies = balanced_traffic(shape.workload(), shape.way)
    share = shape.rows / (shape.tokens * shape.model.num_experts_per_tok)
    one_node = shape.expert <= shape.ranks_per_node
    reached = share * shape.tokens * (copies.ranks + (0.0 if one_node else copies.nodes))
    wires = (shape.dispatch_wire, shape.dispatch_grad_wire, shape.combine_wire)
    out, gradient, back = (2 * reached * shape.row_bytes(wire) for wire in wires)
    return UnderWay(out, gradient, back, ROUTED_INDEX_BYTES * shape.rows + COPY_INDEX_BYTES * reached)


def layer_kept_bytes(setting: Setting, *, moe: bool) -> float:
    """Of one layer and one micro-batch, from forward to backward without recomputation."""
    return sum(part.kept for part in parts_of(setting, moe=moe).values())


def of_job(job: Job, schedule: Schedule, stages: tuple[range, ...]) -> tuple[RankMemory, ...]:
    """`memory_of` a run; schedule: its own, or one of fewer micro-batches."""
    return memory_of(
        job.shape(), job.parallel, schedule, stages,
        precision=job.precision, moments_bytes=job.moments_bytes, fp8=job.fp8, offload=job.offload, ema=job.ema,
    )  # fmt: skip


def memory_of(
    shape: LayerShape,
    parallel: ParallelConfig,
    schedule: Schedule,
    stages: tuple[range, ...],
    *,
    precision: str,
    moments_bytes: int = 2,
    fp8: FP8Config = DEFAULT_FP8,
    on_cpu: bool = False,
    offload: bool = False,
    ema: bool = False,
) -> tuple[RankMemory, ...]:
    """Every pipeline rank's memory; ranks of one pipeline position are alike under a balanced gate.

    precision: fp32 | bf16 | fp8, of weights and activations; fp8 keeps weights rounded, beside BF16 or in its place.
    moments_bytes: of an element of each of the two moments. on_cpu: with gloo and the CPU's scratch memory. offload,
    ema: masters and moments, an average of the weights in host memory.
    """
    setting = setting_of(shape, parallel, precision=precision, fp8=fp8, on_cpu=on_cpu)
    walk = Walk(schedule, stages, setting, level=parallel.overlap if parallel.expert > 1 else "off")
    found = []
    fp8_alone = setting.precision.fp8_alone
    for rank, held in enumerate(holdings(shape.model, parallel, schedule, stages, fp8_alone=fp8_alone)):
        bytes_by_kind = _held_bytes(held, setting, moments_bytes=moments_bytes)
        host = _host_bytes(held, moments_bytes=moments_bytes, offload=offload, ema=ema)
        if offload:
            bytes_by_kind["masters"] = bytes_by_kind["moments"] = 0.0
        peak = walk.peak(rank)
        bytes_by_kind["buffers"] = _buffer_bytes(shape.model, [stages[s] for s in schedule.stages_of(rank)], held)
        bytes_by_kind["buffers"] += schedule.num_microbatches * (shape.tokens + 1) * INT64
        bytes_by_kind["activations"] = peak["kept"] + peak["put_off"]
        bytes_by_kind["working"] = peak["computing"]
        bytes_by_kind["all_to_all"] = peak["travelling"]
        bytes_by_kind["p2p"] = peak["messages"]
        allocated = sum(bytes_by_kind.values())
        found.append(RankMemory(**bytes_by_kind, ema=0.0, nccl=NCCL_BYTES, margin=MARGIN * allocated, host=host))
    return tuple(found)


def _held_bytes(held: tuple[Holding, ...], setting: Setting, *, moments_bytes: int) -> dict[str, float]:
    """Weights, gradients, masters and moments, filled up as `parallel.zero1` does."""
    number = sum(_shard(h) * h.group for h in held)
    shards = sum(_shard(h) for h in held)
    precision = setting.precision
    gathered = sum(_shard(h) * h.group * (1 if h.alone else setting.element) for h in held)
    rounded = sum(h.rounded * rounded_weight_bytes(precision, "experts." if h.expert else "") for h in held)
    return {
        "weights": gathered + rounded,
        "gradients": number * 4 + sum(_shard(h) * 4 for h in held if h.group > 1),
        "masters": 0 if precision.precision == "fp32" else shards * 4,
        "moments": shards * 2 * moments_bytes,
    }


def _host_bytes(held: tuple[Holding, ...], *, moments_bytes: int, offload: bool, ema: bool) -> HostMemory:
    """As `parallel.bucket.Bucket` and `optim.ema` allocate it."""
    shards = sum(_shard(h) for h in held)
    kept = (shards * 4, shards * 4, shards * 2 * moments_bytes) if offload else (0, 0, 0)
    return HostMemory(*kept, ema=shards * 2 * 4 if ema else 0)


def _buffer_bytes(model: ModelConfig, stages: list[range], held: tuple[Holding, ...]) -> float:
    """Rotations of every stage, counts and biases of its routers, scratch of AdamW."""
    last = model.num_hidden_layers
    blocks = sum(model.is_moe(i) for stage in stages for i in stage)
    blocks += model.num_nextn_predict_layers * sum(stage.stop == last for stage in stages)
    rotations = len(stages) * model.max_position_embeddings * model.qk_rope_head_dim * 4
    longest = max((_shard(h) for h in held), default=0)
    return rotations + blocks * (12 * model.n_routed_experts + 4) + 3 * 4 * min(ADAMW_CHUNK, longest)


class Walk:
    """A rank's actions as swings of its level, each kind of action worked out once."""

    def __init__(self, schedule: Schedule, stages: tuple[range, ...], setting: Setting, *, level: str) -> None:
        self.schedule, self.setting, self.level = schedule, setting, level
        self.halves = halves_of(schedule, level)
        alike: dict[object, Stage] = {}
        self.stages = []
        for layers in stages:
            key = (tuple(fronts(setting.model, layers)), layers.start == 0)
            self.stages.append(alike.setdefault(key, Stage(setting, layers)))
        self._swings: dict[object, Swing] = {}

    def peak(self, rank: int) -> dict[str, float]:
        """By kind, at the moment when the rank holds most; messages: posted receives."""
        held = dict.fromkeys(KINDS, 0.0)
        remaining = self._incoming(rank)
        message = self.setting.hidden
        best: dict[str, float] = {**held, "messages": 0.0}
        for actions in self.works(rank):
            posted = sum(min(POSTED_AHEAD, left) for left in remaining.values()) * message
            swing = self._swing(actions)
            now = {kind: held[kind] + swing.peak[kind] for kind in KINDS}
            if sum(now.values()) + posted > sum(best.values()):
                best = {**now, "messages": posted}
            for kind in KINDS:
                held[kind] += swing.after[kind]
            for action in actions:
                source = self._source(rank, action)
                if source is not None:
                    remaining[source] -= 1
        return best

    def works(self, rank: int) -> Iterator[tuple[Action, ...]]:
        """Actions that the rank runs as one, as `parallel.pipeline.overlap` joins them."""
        steps = self.schedule.ranks[rank]
        position = 0
        while position < len(steps):
            here, following = steps[position], steps[position + 1 : position + 2]
            position += 1
            if isinstance(here, Pair) and self.level == "off":
                yield from ((action,) for action in parts(here))
            elif (
                isinstance(here, Action) and here.kind == "I" and self.level == "all"
                and following == (Action("W", here.stage, here.microbatch),)
            ):  # fmt: skip
                yield (here, Action("W", here.stage, here.microbatch))
                position += 1
            else:
                yield parts(here)

    def acting(self, actions: tuple[Action, ...]) -> tuple[Acting, ...]:
        """Actions of one work as the walk plays them."""
        joined = [a.kind for a in actions] == ["I", "W"]  # its weight gradients run under its transfers, as of B
        return tuple(
            Acting("B" if joined else a.kind, self.stages[a.stage], self.halves.get((a.stage, a.microbatch), 1))
            for a in (actions[:1] if joined else actions)
        )

    def _swing(self, actions: tuple[Action, ...]) -> Swing:
        acting = self.acting(actions)
        key = tuple((one.kind, id(one.stage), one.halves) for one in acting)
        if key not in self._swings:
            self._swings[key] = swing_of(acting)
        return self._swings[key]

    def _source(self, rank: int, action: Action) -> int | None:
        """Rank whose message the action takes, if another's."""
        needed = self.schedule.inputs(action)
        if needed is None:
            return None
        stage = action.stage - 1 if action.kind == "F" else action.stage + 1
        source = self.schedule.rank_of(stage, action.microbatch)
        return None if source == rank else source

    def _incoming(self, rank: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for step in self.schedule.ranks[rank]:
            for action in parts(step):
                source = self._source(rank, action)
                if source is not None:
                    found[source] = found.get(source, 0) + 1
        return found


def _shard(holding: Holding) -> int:
    return math.ceil(holding.parameters / (holding.group * ALIGN)) * ALIGN


def fullest(ranks: Iterable[RankMemory]) -> int:
    """Index of the rank that holds most."""
    totals = [memory.total for memory in ranks]
    return max(range(len(totals)), key=totals.__getitem__)
