"""Multi-token prediction (report section 2.2, eq. 21-25): one more block that predicts one token further."""

import torch
from torch import Tensor, nn

from model.block import Block
from model.config import ModelConfig
from model.dispatch import TokenDispatcher
from model.linear import Linear
from model.norm import RMSNorm


class MTPModule(nn.Module):
    """h' = block(M [norm(embedding of the next token); norm(h)]), embedding first as in the published `eh_proj`.

    The stage's chain runs the parts: `enter`, `block`, then `norm` before the shared head.
    """

    def __init__(self, config: ModelConfig, *, expert_ids: range, dispatcher: TokenDispatcher) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(size, eps)
        self.hnorm = RMSNorm(size, eps)
        self.eh_proj = Linear(2 * size, size)
        self.block = Block(config, moe=True, expert_ids=expert_ids, dispatcher=dispatcher)
        self.norm = RMSNorm(size, eps)

    def enter(self, embedded_BSD: Tensor, state_BSD: Tensor) -> Tensor:
        """Embedded next tokens and the depth before's state -> the block's input [B, S, D]."""
        return self.eh_proj(torch.cat([self.enorm(embedded_BSD), self.hnorm(state_BSD)], dim=-1))
