"""The model, or the contiguous part of it that one pipeline stage holds.

A whole model is the stage with all layers, embedding and head; so one process and sixteen run the same code and every
parameter has the same name everywhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.block import Block, MoE
from model.config import ModelConfig
from model.dispatch import LocalDispatcher, TokenDispatcher
from model.linear import Linear
from model.loss import IGNORED, head_loss
from model.mtp import MTPModule
from model.norm import RMSNorm
from model.rope import rotations
from model.weight_grad import Weighted, WeightGradSink


@dataclass(frozen=True)
class Microbatch:
    """Tokens [B, S + 1] int64, and what they weigh in the step.

    share: this micro-batch's part of the global batch, so that losses sum to the global mean.
    mtp_lambda: weight of the mean of the MTP losses beside the main loss.
    """

    tokens: Tensor
    share: float = 1.0
    mtp_lambda: float = 0.3


@dataclass(frozen=True)
class StageLoss:
    """Last stage's result: `loss` (scalar, weighted, to differentiate) and plain means in nats per position.

    main: mean over B*S; mtp: for each depth k, the sum over its valid positions / (B*S) (report eq. 24).
    """

    loss: Tensor
    main: Tensor
    mtp: tuple[Tensor, ...]


class _Embedding(torch.autograd.Function):
    """weight_VD, ids -> rows; the weight's gradient goes through the sink."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, sink: WeightGradSink) -> Tensor:
        ctx.save_for_backward(ids, weight_VD)
        ctx.sink = sink
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ids, weight_VD = ctx.saved_tensors
        grad_TD, ids_T = grads[0].flatten(0, -2), ids.flatten()
        ctx.sink.put(weight_VD, lambda acc: acc.index_add_(0, ids_T, grad_TD.float()))
        return None, None, None


class Embedding(Weighted):
    """Token embedding; weight [vocab, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] int64 -> [..., D]."""
        return _Embedding.apply(self.weight, ids, self.sink)  # type: ignore[return-value]


class Transformer(nn.Module):
    """Layers `layers` of the model, with the embedding in front if they start at 0 and head and MTP if they end last.

    expert_ids: the routed experts held here (default: all). dispatcher: how tokens reach experts (default: local).
    Weights are left uninitialised: see `init.initialise`.
    """

    rotations: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        expert_ids: range | None = None,
        dispatcher: TokenDispatcher | None = None,
    ) -> None:
        super().__init__()
        c = self.config = config
        layers = range(c.num_hidden_layers) if layers is None else layers
        self.is_first, self.is_last = layers.start == 0, layers.stop == c.num_hidden_layers
        experts = {
            "expert_ids": range(c.n_routed_experts) if expert_ids is None else expert_ids,
            "dispatcher": dispatcher or LocalDispatcher(c.n_routed_experts),
        }
        # MTP reads the embedding too (report section 2.2: shared with the main model).
        has_embedding = self.is_first or (self.is_last and c.num_nextn_predict_layers > 0)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size) if has_embedding else None
        self.layers = nn.ModuleDict({str(i): Block(c, moe=c.is_moe(i), **experts) for i in layers})
        self.norm = self.lm_head = None
        self.mtp = nn.ModuleList()
        if self.is_last:
            self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
            self.lm_head = Linear(c.hidden_size, c.vocab_size)
            self.mtp.extend(MTPModule(c, **experts) for _ in range(c.num_nextn_predict_layers))
        self.register_buffer("rotations", rotations(c, c.max_position_embeddings), persistent=False)

    def forward(self, hidden_BSD: Tensor | None, batch: Microbatch) -> Tensor | StageLoss:
        """One micro-batch through the stage.

        hidden_BSD: output of the stage before, None in the first. Gives the hidden state [B, S, D], or the losses
        in the last stage.
        """
        h_BSD = self.run_layers(hidden_BSD, batch)
        return self.losses(h_BSD, batch) if self.is_last else h_BSD

    def run_layers(self, hidden_BSD: Tensor | None, batch: Microbatch) -> Tensor:
        """Embedding, if here, and the blocks: [B, S, D] before the final norm."""
        if self.is_first:
            assert self.embed_tokens is not None and hidden_BSD is None
            hidden_BSD = self.embed_tokens(batch.tokens[:, :-1])
        assert hidden_BSD is not None, "a later stage needs the hidden state of the one before"
        rotations_SP = self.rotations[: hidden_BSD.shape[1]]
        for block in self.layers.values():
            hidden_BSD = block(hidden_BSD, rotations_SP, batch.share)
        assert hidden_BSD is not None
        return hidden_BSD

    def losses(self, h_BSD: Tensor, batch: Microbatch) -> StageLoss:
        """Main loss and the loss of each MTP depth, from the last layer's output."""
        assert self.norm is not None and self.lm_head is not None
        weight, sink = self.lm_head.weight, self.lm_head.sink
        normed_BSD = self.norm(h_BSD)
        main = head_loss(normed_BSD, weight, batch.tokens[:, 1:], sink).mean()
        loss = main * batch.share
        state = normed_BSD if self.config.mtp_hidden == "after_norm" else h_BSD
        mtp: list[Tensor] = []
        for depth, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule) and self.embed_tokens is not None
            # Position i reads t_(i+depth) and predicts t_(i+depth+1); the last `depth` positions have no target.
            shifted = F.pad(batch.tokens[:, depth:], (0, depth), value=IGNORED)
            embedded_BSD = self.embed_tokens(shifted[:, :-1].clamp(min=0))
            h_BSD, normed_BSD = module(embedded_BSD, state, self.rotations[: state.shape[1]], batch.share)
            state = normed_BSD if self.config.mtp_hidden == "after_norm" else h_BSD
            mtp.append(head_loss(normed_BSD, weight, shifted[:, 1:], sink).mean())
            loss = loss + mtp[-1] * (batch.share * batch.mtp_lambda / len(self.mtp))
        return StageLoss(loss, main.detach(), tuple(value.detach() for value in mtp))

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Main model's logits of a whole (unsplit) model: tokens [B, S] -> [B, S, vocab] in the weights' dtype."""
        assert self.norm is not None and self.lm_head is not None
        batch = Microbatch(F.pad(tokens_BS, (0, 1)))
        return self.lm_head(self.norm(self.run_layers(None, batch)))

    def routers(self) -> dict[int, Any]:
        """Router of every MoE block held here, by global block number (MTP blocks after the main layers)."""
        blocks = {int(i): block for i, block in self.layers.items()}
        first_mtp = self.config.num_hidden_layers
        blocks |= {first_mtp + k: module.block for k, module in enumerate(self.mtp)}  # type: ignore[misc]
        return {i: block.mlp.gate for i, block in blocks.items() if isinstance(block.mlp, MoE)}  # type: ignore
