"""The router: which experts a token goes to and with what weights (report section 2.1.2, eq. 12-20).

Scores are sigmoids of FP32 logits. Experts are chosen by score plus a bias that balances the load, at first
`topk_group` groups by the sum of their two best, then `num_experts_per_tok` experts in those groups. The weights are
the chosen scores alone, normalised: the bias never enters a weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.dropping import Again, project
from model.linear import Linear


@dataclass(frozen=True)
class Routing:
    """Choice for T tokens: ids_TK int64 (global expert ids), weights_TK FP32, scores_TE FP32 sigmoids."""

    ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor


class Router(nn.Module):
    """Sigmoid gate with a selection bias and group-limited top-k.

    In training `counts_E` (int64) adds up how many tokens each expert was sent since `reset`, `balance_loss_sum` the
    sequence-wise loss; the trainer reduces both over the global batch, updates the bias and resets.
    """

    e_score_correction_bias: Tensor
    counts_E: Tensor
    balance_loss_sum: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = Linear(config.hidden_size, config.n_routed_experts, dtype=torch.float32)
        num = config.n_routed_experts
        self.register_buffer("e_score_correction_bias", torch.zeros(num, dtype=torch.float32))
        self.register_buffer("counts_E", torch.zeros(num, dtype=torch.int64), persistent=False)
        self.register_buffer("balance_loss_sum", torch.zeros((), dtype=torch.float32), persistent=False)

    def reset(self) -> None:
        """Forget the counts and the balance loss of the step."""
        self.counts_E.zero_()
        self.balance_loss_sum.zero_()

    def forward(self, x_TD: Tensor, x_again: Again | None = None) -> Routing:
        """x_TD -> Routing of the T tokens; x_again: x for the backward, where it is not to be kept."""
        c = self.config
        scores_TE = project(self.proj, x_TD, x_again).sigmoid()
        with torch.no_grad():
            ids_TK = self.choose(scores_TE)
            if self.training:  # an evaluation between two steps must not move the bias
                self.counts_E += torch.bincount(ids_TK.flatten(), minlength=c.n_routed_experts)
        weights_TK = scores_TE.gather(1, ids_TK)
        if c.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
        return Routing(ids_TK, weights_TK * c.routed_scaling_factor, scores_TE)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Experts of each token by biased score within the best groups: scores_TE -> ids_TK."""
        c = self.config
        biased_TE = scores_TE + self.e_score_correction_bias
        if c.n_group > 1:
            grouped_TGE = biased_TE.unflatten(1, (c.n_group, -1))
            group_scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1)
            groups = group_scores_TG.topk(c.topk_group, dim=-1, sorted=False).indices
            outside_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, groups, False)
            biased_TE = grouped_TGE.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_TE.topk(c.num_experts_per_tok, dim=-1).indices

    def balance_loss(self, routing: Routing, num_sequences: int) -> Tensor:
        """Sequence-wise balance loss, mean over the sequences of the micro-batch (eq. 17-20), a scalar."""
        c = self.config
        ids_BN = routing.ids_TK.view(num_sequences, -1)
        with torch.no_grad():
            counts_BE = torch.zeros(num_sequences, c.n_routed_experts, device=ids_BN.device)
            counts_BE.scatter_add_(1, ids_BN, torch.ones(ids_BN.shape, device=ids_BN.device))
            fraction_BE = counts_BE * (c.n_routed_experts / ids_BN.shape[1])
        share_TE = routing.scores_TE / (routing.scores_TE.sum(1, keepdim=True) + 1e-20)
        share_BE = share_TE.unflatten(0, (num_sequences, -1)).mean(1)
        loss = c.aux_loss_alpha * (fraction_BE * share_BE).sum(1).mean()
        self.balance_loss_sum += loss.detach()
        return loss


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full((), ctx.share, device=grads[0].device), None


def attach_loss(x: Tensor, loss: Tensor, share: float) -> Tensor:
    """Returns x unchanged; when its gradient comes back, `loss` (a scalar) receives the gradient `share`.

    So an auxiliary loss of an inner layer needs no path to the last pipeline stage.
    """
    return _Attach.apply(x, loss, share)  # type: ignore[return-value]
