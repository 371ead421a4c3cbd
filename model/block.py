"""One transformer layer, as four phases that `parallel` may interleave with another chunk's; `forward` is the order.

attend (attention, norms, router) -> dispatch -> experts (shared ones too) -> combine -> merge (sums, residual).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from model.attention import Documents
from model.config import ModelConfig
from model.dispatch import TokenDispatcher, combine_rows, dispatch_tokens
from model.dropping import Again, Dropped
from model.experts import Experts
from model.mla import MultiHeadLatentAttention
from model.mlp import MLP
from model.norm import RMSNorm
from model.router import Router, Routing, attach_loss


@dataclass(frozen=True)
class Attended:
    """State between attention and feed-forward: residual_BSD, the normed x_BSD, and the routing in a MoE layer.

    x_again: where x is not to be kept, it for the backward.
    """

    residual_BSD: Tensor
    x_BSD: Tensor
    routing: Routing | None
    x_again: Again | None = None


class MoE(nn.Module):
    """Shared experts on every token, routed experts on the tokens the router sends them (report eq. 12)."""

    def __init__(self, config: ModelConfig, expert_ids: range, dispatcher: TokenDispatcher) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.hidden_size, config.moe_intermediate_size, expert_ids)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.dispatcher = dispatcher

    def shared(self, x_BSD: Tensor, x_again: Again | None = None) -> Tensor | None:
        """Shared experts' output, None if the model has none; x_again: as of `Attended`."""
        return None if self.shared_experts is None else self.shared_experts(x_BSD, x_again)


class Block(nn.Module):
    """A layer: h + attention(norm(h)), then h + feed-forward(norm(h)), dense or mixture of experts.

    recompute: keep no output of a norm for the backward, nor of what `MultiHeadLatentAttention` can compute again.
    """

    recompute = False

    def __init__(
        self, config: ModelConfig, *, moe: bool, expert_ids: range, dispatcher: TokenDispatcher | None
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if moe:
            assert dispatcher is not None, "a MoE layer needs a dispatcher"
            self.mlp: MoE | MLP = MoE(config, expert_ids, dispatcher)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, h_BSD: Tensor, rotations_SP: Tensor, share: float, documents: Documents | None = None) -> Tensor:
        """h_BSD -> [B, S, D]; share: weight of this micro-batch's mean losses in the global batch's.

        documents: where attention stays inside documents, the positions of each.
        """
        attended = self.attend(h_BSD, rotations_SP, share, documents)
        if not isinstance(self.mlp, MoE):
            return attended.residual_BSD + self.mlp(attended.x_BSD, attended.x_again)
        x_TD, routing = attended.x_BSD.flatten(0, 1), attended.routing
        assert routing is not None
        sent = dispatch_tokens(self.mlp.dispatcher, x_TD, routing.ids_TK, routing.weights_TK)
        rows_RD = self.mlp.experts(sent.rows_RD, sent.weights_R, sent.counts)
        routed_TD = combine_rows(self.mlp.dispatcher, rows_RD, sent.handle)
        return merge(attended.residual_BSD, routed_TD, self.mlp.shared(attended.x_BSD, attended.x_again))

    def attend(self, h_BSD: Tensor, rotations_SP: Tensor, share: float, documents: Documents | None = None) -> Attended:
        """Attention and its residual, the second norm, and the router with its balance loss."""
        normed_BSD, normed_again = self._normed(self.input_layernorm, h_BSD)
        residual_BSD = h_BSD + self.self_attn(normed_BSD, rotations_SP, documents, normed_again)
        x_BSD, x_again = self._normed(self.post_attention_layernorm, residual_BSD)
        routing = None
        if isinstance(self.mlp, MoE):
            routing = self.mlp.gate(x_BSD.flatten(0, 1), x_again)
            if self.training and self.mlp.gate.config.aux_loss_alpha:
                x_BSD = attach_loss(x_BSD, self.mlp.gate.balance_loss(routing, len(x_BSD)), share)
        return Attended(residual_BSD, x_BSD, routing, x_again)

    def _normed(self, norm: RMSNorm, h_BSD: Tensor) -> tuple[Tensor, Again | None]:
        """norm(h), and how to compute it again where it is not to be kept."""
        kept_BSD = h_BSD.detach()
        return norm(h_BSD), Dropped(lambda: (norm(kept_BSD),)).part(0) if self.recompute else None


def merge(residual_BSD: Tensor, routed_TD: Tensor, shared_BSD: Tensor | None) -> Tensor:
    """A MoE layer's output: residual + (routed + shared): [B, S, D]."""
    out_BSD = routed_TD.view_as(residual_BSD)
    if shared_BSD is not None:
        out_BSD = out_BSD + shared_BSD
    return residual_BSD + out_BSD
