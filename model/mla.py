"""Multi-head latent attention (report section 2.1.1, eq. 1-11).

Keys and values come from a latent of kv_lora_rank numbers a token, queries from one of q_lora_rank; position enters
through qk_rope_head_dim extra dimensions, of which the key has one copy for all heads.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Documents, causal_attention
from model.config import ModelConfig
from model.dropping import Again, Dropped, dropping, project
from model.linear import Linear
from model.norm import RMSNorm
from model.rope import rotate, softmax_scale
from model.rowwise.kernels import TORCH, Rowwise


class _Assemble(torch.autograd.Function):
    """Heads for the attention kernel from the projections, position applied, in one pass each way.

    q_BSHX (X = N + P), kv_BSHY (Y = N + V), k_BSP -> q, k [B, H, S, X] and v [B, H, S, V].
    """

    @staticmethod
    def forward(
        ctx: Any, q_BSHX: Tensor, kv_BSHY: Tensor, k_BSP: Tensor, rotations_SP: Tensor, nope: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, S, H, X = q_BSHX.shape
        q_BHSX, k_BHSX = q_BSHX.new_empty(B, H, S, X), q_BSHX.new_empty(B, H, S, X)
        v_BHSV = q_BSHX.new_empty(B, H, S, kv_BSHY.shape[3] - nope)
        q, k, v = q_BHSX.transpose(1, 2), k_BHSX.transpose(1, 2), v_BHSV.transpose(1, 2)
        q[..., :nope] = q_BSHX[..., :nope]
        q[..., nope:] = rotate(q_BSHX[..., nope:], rotations_SP)
        k[..., :nope] = kv_BSHY[..., :nope]
        k[..., nope:] = rotate(k_BSP.unsqueeze(2), rotations_SP)
        v[...] = kv_BSHY[..., nope:]
        ctx.save_for_backward(rotations_SP)
        ctx.nope = nope
        return q_BHSX, k_BHSX, v_BHSV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads)
        (rotations_SP,) = ctx.saved_tensors
        nope, back = ctx.nope, rotations_SP.conj()
        q_BSHX = torch.empty(grad_q.shape, dtype=grad_q.dtype, device=grad_q.device)
        q_BSHX[..., :nope] = grad_q[..., :nope]
        q_BSHX[..., nope:] = rotate(grad_q[..., nope:], back)
        kv_BSHY = grad_k.new_empty(*grad_k.shape[:3], nope + grad_v.shape[3])
        kv_BSHY[..., :nope] = grad_k[..., :nope]
        kv_BSHY[..., nope:] = grad_v
        k_BSP = rotate(grad_k[..., nope:].sum(2, keepdim=True, dtype=torch.float32), back).squeeze(2)
        return q_BSHX, kv_BSHY, k_BSP.to(grad_k.dtype), None, None


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention over each sequence of the micro-batch."""

    rowwise: Rowwise = TORCH

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, heads = config, config.num_attention_heads
        self.num_heads, self.nope, self.kv_rank = heads, c.qk_nope_head_dim, c.kv_lora_rank
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * c.qk_head_dim)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)  # latent norms keep 1e-6 whatever rms_norm_eps is
            self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size)
        self.scale = softmax_scale(config)

    def forward(
        self,
        x_BSD: Tensor,
        rotations_SP: Tensor,
        documents: Documents | None = None,
        x_again: Again | None = None,
    ) -> Tensor:
        """x_BSD -> [B, S, D]; rotations_SP: `rope.rotations` of the S positions; documents: to keep apart.

        x_again: gives x_BSD for the backward, and then of all that lies between x and the output only the two latents
        and what the attention gives are kept; queries, keys and values are computed again (report 3.2.3).
        """
        query_BSQ = project(self.q_a_proj, x_BSD, x_again) if self.has_query_latent else x_BSD
        kv_BSC = project(self.kv_a_proj_with_mqa, x_BSD, x_again)
        inputs_again = heads_again = None
        if x_again is not None:
            kept_query, kept_kv = query_BSQ.detach() if self.has_query_latent else None, kv_BSC.detach()
            up = Dropped(lambda: self._up_inputs(x_again() if kept_query is None else kept_query, kept_kv))
            inputs_again, heads_again = up, Dropped(lambda: self._heads(up[0], up[1], kept_kv, rotations_SP))
        heads = self._heads(*self._up_inputs(query_BSQ, kv_BSC), kv_BSC, rotations_SP, inputs_again)
        with dropping(heads_again, *heads):
            out_BHSV = causal_attention(*heads, self.scale, documents, self.rowwise)
        return self.o_proj(out_BHSV.transpose(1, 2).flatten(2))

    @property
    def has_query_latent(self) -> bool:
        """Whether queries come from a latent of their own."""
        return not hasattr(self, "q_proj")

    def _up_inputs(self, query_BSQ: Tensor, kv_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """What the up-projections of queries (without a latent: their only projection), and of keys and values read."""
        latent_BSC = kv_BSC.tensor_split((self.kv_rank,), dim=-1)[0]
        query_BSQ = self.q_a_layernorm(query_BSQ) if self.has_query_latent else query_BSQ
        return query_BSQ, self.kv_a_layernorm(latent_BSC)

    def _heads(
        self,
        query_BSQ: Tensor,
        latent_BSC: Tensor,
        kv_BSC: Tensor,
        rotations_SP: Tensor,
        again: Dropped | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [B, H, S, X] and values [B, H, S, V]; kv_BSC has the rotary key; again: the first two."""
        up_q = self.q_b_proj if self.has_query_latent else self.q_proj
        q = project(up_q, query_BSQ, None if again is None else again.part(0))
        kv = project(self.kv_b_proj, latent_BSC, None if again is None else again.part(1))
        k_BSP = kv_BSC.tensor_split((self.kv_rank,), dim=-1)[1]
        q_BSHX, kv_BSHY = q.unflatten(-1, (self.num_heads, -1)), kv.unflatten(-1, (self.num_heads, -1))
        return _Assemble.apply(q_BSHX, kv_BSHY, k_BSP, rotations_SP, self.nope)  # type: ignore[return-value]
