"""Bytes of every pipeline rank by kind, from the parameter shapes and the schedule's own actions. No torch.

Weights, gradients, masters and moments follow `parallel.zero1`; activations live from their F to their B or W, as
`parallel.pipeline.simulate.peak_bytes` counts them; buffers follow `parallel.expert` and `parallel.pipeline.p2p`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from model.config import ModelConfig
from model.counts import parameter_shapes
from parallel.config import ParallelConfig
from parallel.pipeline.actions import Schedule
from parallel.pipeline.simulate import Memory, peak_bytes
from parallel.plan.layers import LayerShape

POSTED_AHEAD = 4  # receives of each kind, parallel.pipeline.p2p
NCCL_BYTES = 1.5 * 2**30  # assumed: CUDA context and the buffers of about a dozen communicators
MARGIN = 0.04  # of what is allocated: what the caching allocator cannot use, assumed
ALIGN = 64  # elements, parallel.zero1
GPU_LOGITS_BYTES, CPU_LOGITS_BYTES = 256 << 20, 4 << 20  # FP32 logits at a time, model.loss


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one GPU by kind. ema: on the GPU, 0 as it is kept on the host."""

    weights: float
    gradients: float
    masters: float
    moments: float
    ema: float
    activations: float
    all_to_all: float
    p2p: float
    nccl: float
    margin: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))

    def rows(self) -> dict[str, float]:
        """By kind."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class Holding:
    """Parameters of one rank that the same group of `group` ranks holds."""

    parameters: int
    group: int
    expert: bool


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


def holdings(
    model: ModelConfig, parallel: ParallelConfig, schedule: Schedule, stages: tuple[range, ...]
) -> tuple[tuple[Holding, ...], ...]:
    """What every pipeline rank holds, by group of ranks that share it."""
    found: list[dict[tuple[int, bool], int]] = [{} for _ in range(schedule.num_ranks)]
    for name, shape in parameter_shapes(model):
        expert = ".mlp.experts." in name
        on = stages_of(name, stages, has_mtp=model.num_nextn_predict_layers > 0)
        ranks = sorted({rank for stage in on for rank in schedule.holders(stage)})
        size = math.prod(shape) // (parallel.expert if expert else 1)
        key = len(ranks) * parallel.data // (parallel.expert if expert else 1), expert
        for rank in ranks:
            found[rank][key] = found[rank].get(key, 0) + size
    return tuple(
        tuple(Holding(size, group, expert) for (group, expert), size in sorted(held.items())) for held in found
    )


def kept_bytes(shape: LayerShape, *, moe: bool, element_bytes: int = 2) -> float:
    """Bytes that one layer keeps of a micro-batch from forward to backward.

    FP8, as the report recomputes and stores: residuals in BF16, latents in BF16, the output of attention in 12 bits,
    rows of the experts and SwiGLU inputs in FP8. Else what autograd keeps of `model.block`.
    """
    c, T, D = shape.model, shape.tokens, shape.model.hidden_size
    heads, width = c.num_attention_heads, c.moe_intermediate_size if moe else c.intermediate_size
    latent = (c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim
    rows = shape.rows if moe else 0
    wide = (c.n_shared_experts if moe else 1) * width
    routing = T * (4 * c.n_routed_experts + 16 * c.num_experts_per_tok) if moe else 0
    if shape.recompute == "layer":
        return T * D * element_bytes + routing
    if shape.fp8:
        attention = T * (2 * D + 2 * latent + 1.5 * heads * c.v_head_dim + 4 * heads)
        return attention + T * (2 * D + 2 * wide) + rows * (D + 2 * width) + routing
    assembled = heads * (2 * c.qk_head_dim + 2 * c.v_head_dim)  # q, k, v and what attention gives
    attention = T * (2 * D + 2 * latent + assembled) * element_bytes + 4 * T * heads
    mlp = (T * (2 * D + 3 * wide) + rows * (D + 3 * width)) * element_bytes
    return mlp + routing + (T * D * element_bytes if shape.recompute == "attend" else attention)


def activation_bytes(shape: LayerShape, stages: tuple[range, ...], *, element_bytes: int = 2) -> tuple[float, ...]:
    """Of one micro-batch on every stage; the last keeps the gradient of each head's logits (`model.loss`)."""
    c = shape.model
    by_kind = {moe: kept_bytes(shape, moe=moe, element_bytes=element_bytes) for moe in (False, True)}
    found = [sum(by_kind[c.is_moe(layer)] for layer in stage) for stage in stages]
    ends = shape.tokens * c.hidden_size * element_bytes
    heads = 1 + c.num_nextn_predict_layers
    found[-1] += ends + c.num_nextn_predict_layers * (by_kind[True] + 4 * ends)
    found[-1] += heads * shape.tokens * c.vocab_size * element_bytes
    return tuple(found)


def memory_of(
    shape: LayerShape,
    parallel: ParallelConfig,
    schedule: Schedule,
    stages: tuple[range, ...],
    *,
    precision: str,
    moments_bytes: int = 2,
    logits_chunk_bytes: int = GPU_LOGITS_BYTES,
) -> tuple[RankMemory, ...]:
    """Every pipeline rank's memory; ranks of one pipeline position are alike under a balanced gate.

    precision: fp32 | bf16 | fp8, of weights and activations; fp8 keeps a quantised copy of the weights beside BF16.
    moments_bytes: of an element of each of the two moments. logits_chunk_bytes: of one chunk of rows of FP32 logits.
    """
    c, T, D = shape.model, shape.tokens, shape.model.hidden_size
    element = 4 if precision == "fp32" else 2
    kept = activation_bytes(shape, stages, element_bytes=element)
    live = peak_bytes(schedule, Memory(kept, kept))
    logits = 2 * min(T * c.vocab_size * 4, logits_chunk_bytes)
    found = []
    for rank, held in enumerate(holdings(c, parallel, schedule, stages)):
        number = sum(h.parameters for h in held)
        shards = sum(_shard(h) for h in held)
        ends = schedule.num_stages - 1 in schedule.stages_of(rank)
        rows = shape.rows * D * element if parallel.expert > 1 else 0
        in_flight = 4 * rows if parallel.overlap != "off" else 2 * rows  # of both chunks of a pair, there and back
        hops = 2 * POSTED_AHEAD * T * D * element if schedule.num_ranks > 1 else 0
        parts = {
            "weights": number * (element + (precision == "fp8")),
            "gradients": number * 4 + sum(_shard(h) * 4 for h in held if h.group > 1),
            "masters": 0 if precision == "fp32" else shards * 4,
            "moments": shards * 2 * moments_bytes,
            "ema": 0.0,
            "activations": live[rank] + (logits if ends else 0),
            "all_to_all": in_flight,
            "p2p": hops,
        }
        allocated = sum(parts.values())
        found.append(RankMemory(**parts, nccl=NCCL_BYTES, margin=MARGIN * allocated))  # type: ignore[arg-type]
    return tuple(found)


def _shard(holding: Holding) -> int:
    return math.ceil(holding.parameters / (holding.group * ALIGN)) * ALIGN


def fullest(ranks: Iterable[RankMemory]) -> int:
    """Index of the rank that holds most."""
    totals = [memory.total for memory in ranks]
    return max(range(len(totals)), key=totals.__getitem__)
