"""Parameters and floating-point operations from the configuration alone; no torch.

Every parameter of the whole model with its global shape (`parameter_shapes`) is the one source that the counts, the
checkpoint and the planner read; tests hold it equal to the modules and to the published totals.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import ModelConfig

Shape = tuple[int, ...]


def _attention(c: ModelConfig) -> Iterator[tuple[str, Shape]]:
    heads = c.num_attention_heads
    if c.q_lora_rank is None:
        yield "q_proj.weight", (heads * c.qk_head_dim, c.hidden_size)
    else:
        yield "q_a_proj.weight", (c.q_lora_rank, c.hidden_size)
        yield "q_a_layernorm.weight", (c.q_lora_rank,)
        yield "q_b_proj.weight", (heads * c.qk_head_dim, c.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
    yield "kv_a_layernorm.weight", (c.kv_lora_rank,)
    yield "kv_b_proj.weight", (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield "o_proj.weight", (c.hidden_size, heads * c.v_head_dim)


def _mlp(hidden: int, intermediate: int) -> Iterator[tuple[str, Shape]]:
    yield "gate_up_proj.weight", (2 * intermediate, hidden)
    yield "down_proj.weight", (hidden, intermediate)


def block_shapes(c: ModelConfig, *, moe: bool) -> Iterator[tuple[str, Shape]]:
    """Parameters of one block, names relative to it; expert stacks with all experts."""
    yield "input_layernorm.weight", (c.hidden_size,)
    yield from ((f"self_attn.{name}", shape) for name, shape in _attention(c))
    yield "post_attention_layernorm.weight", (c.hidden_size,)
    if not moe:
        yield from ((f"mlp.{name}", shape) for name, shape in _mlp(c.hidden_size, c.intermediate_size))
        return
    yield "mlp.gate.proj.weight", (c.n_routed_experts, c.hidden_size)
    for name, shape in _mlp(c.hidden_size, c.moe_intermediate_size):
        yield f"mlp.experts.{name}", (c.n_routed_experts, *shape)
    if c.n_shared_experts:
        shared = _mlp(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)
        yield from ((f"mlp.shared_experts.{name}", shape) for name, shape in shared)


def parameter_shapes(c: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """(name, global shape) of every trained parameter, in the order of the layers; router biases are buffers."""
    yield "embed_tokens.weight", (c.vocab_size, c.hidden_size)
    for i in range(c.num_hidden_layers):
        yield from ((f"layers.{i}.{name}", shape) for name, shape in block_shapes(c, moe=c.is_moe(i)))
    yield "norm.weight", (c.hidden_size,)
    yield "lm_head.weight", (c.vocab_size, c.hidden_size)
    for k in range(c.num_nextn_predict_layers):
        yield f"mtp.{k}.enorm.weight", (c.hidden_size,)
        yield f"mtp.{k}.hnorm.weight", (c.hidden_size,)
        yield f"mtp.{k}.eh_proj.weight", (c.hidden_size, 2 * c.hidden_size)
        yield from ((f"mtp.{k}.block.{name}", shape) for name, shape in block_shapes(c, moe=True))
        yield f"mtp.{k}.norm.weight", (c.hidden_size,)


@dataclass(frozen=True)
class Counts:
    """Numbers of weights.

    main: the main model with embedding and head, router biases not counted. active: those that one token uses. mtp:
    the MTP modules, router biases counted, shared embedding and head not (as published for layer 61).
    router_biases: of the main model.
    """

    main: int
    active: int
    mtp: int
    router_biases: int


def counts(c: ModelConfig) -> Counts:
    """Parameter counts; for the 671B flavour 671,026,404,352 main, 37,552,282,624 active, 11,610,068,224 MTP."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(c)}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    main = sum(sizes.values()) - mtp
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    idle = c.num_moe_layers * (c.n_routed_experts - c.num_experts_per_tok) * expert
    biases = c.n_routed_experts
    return Counts(main, main - idle, mtp + c.num_nextn_predict_layers * biases, c.num_moe_layers * biases)


@dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs a token, forward and backward (a multiply-add counts 2, backward twice the forward).

    linear: all products with weights, head included, embedding lookup not; attention_causal: the attention core over
    the positions a token may see, on average; attention_full: over all of the sequence. Recomputation is not counted.
    """

    linear: float
    attention_causal: float
    attention_full: float

    @property
    def causal(self) -> float:
        """Linear and causal attention."""
        return self.linear + self.attention_causal

    @property
    def full(self) -> float:
        """Linear and full attention, the convention that counts masked positions."""
        return self.linear + self.attention_full


def flops_per_token(c: ModelConfig, sequence_length: int, *, mtp: bool) -> FlopsPerToken:
    """FLOPs of one trained token; mtp: whether the MTP modules (their use of the head included) are counted."""
    n = counts(c)
    weights = n.active - c.vocab_size * c.hidden_size
    blocks = c.num_hidden_layers
    if mtp:
        depth, expert = c.num_nextn_predict_layers, 3 * c.hidden_size * c.moe_intermediate_size
        idle = (c.n_routed_experts - c.num_experts_per_tok) * expert + c.n_routed_experts
        weights += n.mtp - depth * idle + depth * c.vocab_size * c.hidden_size
        blocks += depth
    per_position = 6 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * blocks
    causal = per_position * (sequence_length + 1) / 2
    return FlopsPerToken(6 * weights, causal, per_position * sequence_length)
