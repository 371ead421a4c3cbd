"""The model, or the contiguous part of it that one pipeline stage holds.

A whole model is the stage with all layers, embedding and head; so one process and sixteen run the same code and every
parameter has the same name everywhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Documents
from model.block import Block, MoE
from model.config import ModelConfig
from model.dispatch import LocalDispatcher, TokenDispatcher
from model.linear import Linear
from model.loss import IGNORED, head_loss
from model.mtp import MTPModule
from model.norm import RMSNorm
from model.rope import rotations
from model.rowwise.kernels import TORCH, Rowwise
from model.weight_grad import Weighted, WeightGradSink


@dataclass(frozen=True)
class Microbatch:
    """Tokens [B, S + 1] int64, and what they weigh in the step.

    share: this micro-batch's part of the global batch, so that losses sum to the global mean.
    mtp_lambda: weight of the mean of the MTP losses beside the main loss.
    documents: the positions of every document, for attention that stays inside them; None: it crosses them.
    """

    tokens: Tensor
    share: float = 1.0
    mtp_lambda: float = 0.3
    documents: Documents | None = None


@dataclass(frozen=True)
class StageLoss:
    """Last stage's result: `loss` (scalar, weighted, to differentiate) and plain means in nats per position.

    main: mean over B*S; mtp: for each depth k, the sum over its valid positions / (B*S) (report eq. 24).
    """

    loss: Tensor
    main: Tensor
    mtp: tuple[Tensor, ...]


@dataclass
class Losses:
    """What a micro-batch's passage through the last stage collects: weighted scalars to differentiate, plain means."""

    roots: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)

    def add(self, mean: Tensor, weight: float) -> None:
        """A mean in nats per position and its weight in the loss; the main one first, then each MTP depth."""
        self.roots.append(mean * weight)
        self.means.append(mean.detach())

    def result(self) -> StageLoss:
        """Their sum, differentiable as far as the roots are."""
        main, *mtp = self.means
        return StageLoss(sum(self.roots[1:], self.roots[0]), main, tuple(mtp))


@dataclass(frozen=True)
class Link:
    """A piece of a stage: work on the hidden state that stays on this rank, then a MoE block, or none at the end.

    enter(h_BSD or None, batch, losses) -> h_BSD.
    """

    enter: Callable[[Tensor | None, Microbatch, Losses], Tensor]
    block: Block | None


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
    rowwise: Rowwise = TORCH

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
        losses = Losses()
        h_BSD = self.through(hidden_BSD, batch, losses)
        return losses.result() if self.is_last else h_BSD

    def through(self, hidden_BSD: Tensor | None, batch: Microbatch, losses: Losses) -> Tensor:
        """The whole chain, link by link."""
        h_BSD = hidden_BSD
        for link in self.chain():
            h_BSD = link.enter(h_BSD, batch, losses)
            if link.block is not None:
                h_BSD = link.block(h_BSD, self.rotations[: h_BSD.shape[1]], batch.share, batch.documents)
        assert h_BSD is not None
        return h_BSD

    def chain(self) -> list[Link]:
        """The stage cut in front of each MoE block; dense layers, embedding, head and losses lie between.

        Running the links in order is `forward`; `parallel` runs the blocks' phases among those of another micro-batch.
        """
        links: list[Link] = []
        dense: list[Block] = []
        for block in self.layers.values():
            assert isinstance(block, Block)
            if isinstance(block.mlp, MoE):
                links.append(Link(self._through(dense, first=not links), block))
                dense = []
            else:
                dense.append(block)
        through = self._through(dense, first=not links)
        for depth, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            links.append(Link(self._mtp_entry(through, depth, module), module.block))
            through = _same
        end = self._loss_after(through, len(self.mtp)) if self.is_last else through
        return [*links, Link(end, None)]

    def _through(self, dense: list[Block], *, first: bool) -> Callable[[Tensor | None, Microbatch, Losses], Tensor]:
        """Embedding, where the model starts here, and dense layers."""

        def enter(h_BSD: Tensor | None, batch: Microbatch, _losses: Losses) -> Tensor:
            if first and self.is_first:
                assert self.embed_tokens is not None and h_BSD is None
                h_BSD = self.embed_tokens(batch.tokens[:, :-1])
            assert h_BSD is not None, "a later stage needs the hidden state of the one before"
            return self._dense(dense, h_BSD, batch)

        return enter

    def _dense(self, blocks: Iterable[Any], h_BSD: Tensor, batch: Microbatch) -> Tensor:
        for block in blocks:
            h_BSD = block(h_BSD, self.rotations[: h_BSD.shape[1]], batch.share, batch.documents)
        return h_BSD

    def _loss_after(
        self, before: Callable[[Tensor | None, Microbatch, Losses], Tensor], depth: int
    ) -> Callable[[Tensor | None, Microbatch, Losses], Tensor]:
        """Norm and head of a depth (0: the main model) and its loss; gives the state that the next depth reads.

        Position i of depth k reads t_(i+k) and predicts t_(i+k+1); the last k positions have no target.
        """

        def enter(h_BSD: Tensor | None, batch: Microbatch, losses: Losses) -> Tensor:
            assert self.norm is not None and self.lm_head is not None
            h_BSD = before(h_BSD, batch, losses)
            normed_BSD = (self.mtp[depth - 1].norm if depth else self.norm)(h_BSD)  # type: ignore[operator]
            targets_BS = _shifted(batch.tokens, depth)[:, 1:]
            mean = head_loss(normed_BSD, self.lm_head.weight, targets_BS, self.lm_head.sink, self.rowwise).mean()
            losses.add(mean, batch.share * batch.mtp_lambda / len(self.mtp) if depth else batch.share)
            return normed_BSD if self.config.mtp_hidden == "after_norm" else h_BSD

        return enter

    def _mtp_entry(
        self, before: Callable[[Tensor | None, Microbatch, Losses], Tensor], depth: int, module: MTPModule
    ) -> Callable[[Tensor | None, Microbatch, Losses], Tensor]:
        """Loss of the depth before, then the way into MTP module `depth`."""
        exit_before = self._loss_after(before, depth - 1)

        def enter(h_BSD: Tensor | None, batch: Microbatch, losses: Losses) -> Tensor:
            assert self.embed_tokens is not None
            state_BSD = exit_before(h_BSD, batch, losses)
            inputs_BS = _shifted(batch.tokens, depth)[:, :-1].clamp(min=0)
            return module.enter(self.embed_tokens(inputs_BS), state_BSD)

        return enter

    def run_layers(self, hidden_BSD: Tensor | None, batch: Microbatch) -> Tensor:
        """Embedding, if here, and the main model's blocks: [B, S, D] before the final norm."""
        return self._dense(self.layers.values(), self._through([], first=True)(hidden_BSD, batch, Losses()), batch)

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


def _same(h_BSD: Tensor | None, _batch: Microbatch, _losses: Losses) -> Tensor:
    assert h_BSD is not None
    return h_BSD


def _shifted(tokens_BS: Tensor, depth: int) -> Tensor:
    """Tokens `depth` further on, IGNORED beyond the end; same shape."""
    return F.pad(tokens_BS[:, depth:], (0, depth), value=IGNORED) if depth else tokens_BS
