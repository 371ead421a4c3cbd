"""One micro-batch on one stage, run phase by phase; between its phases other chunks may compute.

The autograd graph is cut at every transfer: each computing phase is a graph of its own between leaves and roots, and
the transfers are the dispatcher's own, started in one phase and awaited in a later one. Phases in any admissible
order give what `Transformer.forward` and its backward give, bitwise but for the sums over halves.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from model.block import Attended, Block, MoE, merge
from model.dispatch import Combined, Dispatched, Pending
from model.recompute import keep_less
from model.torch_linear import serve
from model.transformer import Link, Losses, Microbatch, StageLoss, Transformer
from parallel.pipeline.graph import Entrance, Graph
from parallel.pipeline.phases import Phase
from parallel.pipeline.weight_grad import Contributions, DeferredSink


class Chunk(Protocol):
    """What the executor runs: the forward phases, then the backward phases, of one micro-batch on one stage.

    output: after `end`, the stage's output [B, S, D] to send on; None in the last stage, which has `loss` instead.
    input_grad: after the last backward phase but `weights`, the gradient to send back; None in the first stage.
    """

    output: Tensor | None
    loss: StageLoss | None
    input_grad: Tensor | None

    def begin(self, hidden_BSD: Tensor | None) -> None:
        """Give the forward its input; before the first phase."""
        ...

    def begin_backward(self, grad_BSD: Tensor | None) -> None:
        """Give the backward its input; weight gradients wait for `weights` phases."""
        ...

    def run(self, phase: Phase) -> None:
        """Run one phase."""
        ...


class Stages(Protocol):
    """The stages a rank holds, as the executor sees them."""

    @property
    def hidden_size(self) -> int:
        """Width of what crosses stages."""
        ...

    def new_chunk(self, stage: int, batch: Microbatch, halves: int) -> Chunk:
        """A micro-batch about to enter a stage, whose tokens go through the experts in so many parts."""
        ...

    def num_links(self, stage: int) -> int:
        """Links of the stage's chain, 1 if it is not cut."""
        ...


class ModelStages:
    """`Stages` over the model's own; recompute: see `ModelChunk`.

    cut: into links, where there are transfers to hide; recomputation cuts too.
    """

    def __init__(self, stages: Mapping[int, Transformer], *, cut: bool = False, recompute: str = "none") -> None:
        self._stages, self._cut, self._recompute = stages, cut or recompute != "none", recompute
        self._sink = DeferredSink()
        for stage in stages.values():
            serve(stage, self._sink)
            if recompute == "report":
                keep_less(stage)

    @property
    def hidden_size(self) -> int:
        """See `Stages`."""
        return next(iter(self._stages.values())).config.hidden_size

    def new_chunk(self, stage: int, batch: Microbatch, halves: int) -> Chunk:
        """See `Stages`."""
        return ModelChunk(
            self._stages[stage], batch, sink=self._sink, halves=halves, cut=self._cut, recompute=self._recompute
        )

    def num_links(self, stage: int) -> int:
        """See `Stages`."""
        return len(self._stages[stage].chain()) if self._cut else 1


@dataclass
class _Half:
    """Some of the tokens on their way through the experts of a layer."""

    tokens: slice
    arriving: Pending[Dispatched] | None = None
    rows: Entrance = field(default_factory=Entrance)
    weights_R: Tensor | None = None
    handle: Any = None
    graph: Graph | None = None
    returning: Pending[Combined] | None = None


@dataclass
class _Link:
    """State of one link between its forward and its backward."""

    hidden_BSD: Tensor | None
    halves: list[_Half] = field(default_factory=list)
    graph: Graph | None = None
    num_losses: int = 0
    attended: Attended | None = None
    residual_BSD: Tensor | None = None
    shared: Graph | None = None
    shared_input: Entrance | None = None


class ModelChunk:
    """`Chunk` over a `Transformer` stage.

    halves: parts in which tokens go through the experts. cut: phase by phase; else the whole stage is the `end` of a
    chain of one link. recompute: `none`, `report` (the stage's own layers keep less: `model.recompute`), `attend`
    (everything but the experts is computed again in the backward) or `layer` (the experts too). No transfer is ever
    repeated: the rows that arrived are kept.
    """

    def __init__(
        self,
        stage: Transformer,
        batch: Microbatch,
        *,
        sink: DeferredSink,
        halves: int = 1,
        cut: bool = True,
        recompute: str = "none",
    ) -> None:
        self._stage, self._batch, self._sink = stage, batch, sink
        self._chain = stage.chain() if cut else [Link(stage.through, None)]
        self._num_halves, self._recompute = halves, recompute
        self._links: dict[int, _Link] = {}
        self._losses = Losses()
        self._put_off: dict[int, Contributions] = {}
        self._grad_BSD: Tensor | None = None
        self._hidden_BSD: Tensor | None = None
        self.output: Tensor | None = None
        self.loss: StageLoss | None = None
        self.input_grad: Tensor | None = None

    def begin(self, hidden_BSD: Tensor | None) -> None:
        """See `Chunk`."""
        self._hidden_BSD = None if hidden_BSD is None else hidden_BSD.requires_grad_()

    def begin_backward(self, grad_BSD: Tensor | None) -> None:
        """See `Chunk`."""
        self._grad_BSD = grad_BSD

    def run(self, phase: Phase) -> None:
        """See `Chunk`."""
        if phase.kind in ("dispatch", "experts", "combine", "combine_grad", "experts_grad", "dispatch_grad"):
            getattr(self, f"_{phase.kind}")(phase.link, self._links[phase.link].halves[phase.half])
        else:
            getattr(self, f"_{phase.kind}")(phase.link)

    def _moe(self, link: int) -> MoE:
        block = self._chain[link].block
        assert block is not None and isinstance(block.mlp, MoE)
        return block.mlp

    def _enter(self, number: int) -> _Link:
        """A new link whose leaf is what the link before gave."""
        if number == 0:
            hidden_BSD, self._hidden_BSD = self._hidden_BSD, None
        else:
            hidden_BSD = self._merged(self._links[number - 1]).requires_grad_()
        link = self._links[number] = _Link(hidden_BSD)
        return link

    @torch.no_grad()
    def _merged(self, link: _Link) -> Tensor:
        assert link.residual_BSD is not None
        routed = [half.returning.wait().sum_TD for half in link.halves if half.returning is not None]
        for half in link.halves:
            half.returning = None
        shared_BSD = None if link.shared is None else link.shared.outputs.pop()
        routed_TD = torch.cat(routed) if len(routed) > 1 else routed[0]
        merged_BSD = merge(link.residual_BSD, routed_TD, shared_BSD)
        link.residual_BSD = None
        return merged_BSD

    # Forward

    def _attend(self, number: int) -> None:
        link, chained = self._enter(number), self._chain[number]
        block = chained.block
        assert block is not None

        def compute(losses: Losses) -> list[Tensor]:
            before = len(losses.roots)
            h_BSD = chained.enter(link.hidden_BSD, self._batch, losses)
            batch, turns_SP = self._batch, self._stage.rotations[: h_BSD.shape[1]]
            attended = block.attend(h_BSD, turns_SP, batch.share, batch.documents)
            assert attended.routing is not None
            if losses is self._losses:
                link.attended = attended
            return [attended.residual_BSD, attended.x_BSD, attended.routing.weights_TK, *losses.roots[before:]]

        def again() -> list[Tensor]:
            with _uncounted(block):
                return compute(Losses())

        link.graph = Graph(
            lambda: compute(self._losses), again=again if self._recompute in ("attend", "layer") else None
        )
        link.num_losses = len(link.graph.outputs) - 3
        link.graph.outputs.clear()
        num_tokens = link.attended.x_BSD[..., 0].numel()  # type: ignore[union-attr]
        cuts = [num_tokens * i // self._num_halves for i in range(self._num_halves + 1)]
        link.halves = [_Half(slice(*ends)) for ends in pairwise(cuts)]

    def _dispatch(self, number: int, half: _Half) -> None:
        attended = self._links[number].attended
        assert attended is not None and attended.routing is not None
        routing, x_TD = attended.routing, attended.x_BSD.detach().flatten(0, 1)
        half.arriving = self._moe(number).dispatcher.dispatch(
            x_TD[half.tokens], routing.ids_TK[half.tokens], routing.weights_TK.detach()[half.tokens]
        )

    def _shared(self, number: int) -> None:
        link, moe = self._links[number], self._moe(number)
        attended, link.attended = link.attended, None
        assert attended is not None
        link.residual_BSD = attended.residual_BSD.detach()
        if moe.shared_experts is None:
            return
        x_BSD, again, entrance = attended.x_BSD.detach(), attended.x_again, Entrance()
        link.shared_input = entrance
        link.shared = self._layer_graph(lambda: [moe.shared(entrance(x_BSD), again)])  # type: ignore[list-item]

    def _layer_graph(self, compute: Callable[[], list[Tensor]]) -> Graph:
        return Graph(compute, again=compute if self._recompute == "layer" else None)

    def _experts(self, number: int, half: _Half) -> None:
        assert half.arriving is not None
        arrived, half.arriving = half.arriving.wait(), None
        rows_RD, weights_R = arrived.rows_RD, arrived.weights_R.detach().requires_grad_()
        half.weights_R, half.handle = weights_R, arrived.handle
        moe, counts, enter = self._moe(number), arrived.counts, half.rows
        half.graph = self._layer_graph(lambda: [moe.experts(enter(rows_RD), weights_R, counts)])

    def _combine(self, number: int, half: _Half) -> None:
        assert half.graph is not None
        half.returning = self._moe(number).dispatcher.combine(half.graph.outputs.pop().detach(), half.handle)

    def _end(self, number: int) -> None:
        link = self._enter(number)

        def compute() -> list[Tensor]:
            before = len(self._losses.roots)
            out_BSD = self._chain[number].enter(link.hidden_BSD, self._batch, self._losses)
            return self._losses.roots[before:] if self._stage.is_last else [out_BSD]

        link.graph = Graph(compute)
        link.num_losses = len(link.graph.outputs) if self._stage.is_last else 0
        if self._stage.is_last:
            summed = self._losses.result()
            self.loss = StageLoss(summed.loss.detach(), summed.main, summed.mtp)
        else:
            self.output = link.graph.outputs[0].detach()
        link.graph.outputs.clear()

    # Backward

    def _grads_of(self, number: int) -> AbstractContextManager[None]:
        return self._sink.collecting(self._put_off.setdefault(number, []))

    def _leave(self, number: int) -> None:
        """The link's leaf has its gradient: hand it to the link before, or out of the stage."""
        link = self._links.pop(number)
        leaf_BSD = link.hidden_BSD
        link.graph = None  # under recomputation the graph's function knows the link: a cycle would keep all of it
        self._grad_BSD = None if leaf_BSD is None else leaf_BSD.grad
        if number == 0:
            self.input_grad, self._grad_BSD = self._grad_BSD, None

    def _end_grad(self, number: int) -> None:
        link = self._links[number]
        assert link.graph is not None
        grads = [None] * link.num_losses if self._stage.is_last else [self._grad_BSD]
        with self._grads_of(number):
            link.graph.backward(*grads)
        self._leave(number)

    def _token_grads(self) -> Tensor:
        assert self._grad_BSD is not None
        return self._grad_BSD.flatten(0, 1)

    def _combine_grad(self, number: int, half: _Half) -> None:
        half.arriving = self._moe(number).dispatcher.dispatch(self._token_grads()[half.tokens], handle=half.handle)

    def _shared_grad(self, number: int) -> None:
        link = self._links[number]
        if link.shared is not None:
            with self._grads_of(number):
                link.shared.backward(self._grad_BSD)
            link.shared = None

    def _experts_grad(self, number: int, half: _Half) -> None:
        assert half.arriving is not None and half.graph is not None
        grad_RD, half.arriving = half.arriving.wait().rows_RD, None
        with self._grads_of(number):
            half.graph.backward(grad_RD)
        half.graph = None

    def _dispatch_grad(self, number: int, half: _Half) -> None:
        assert half.weights_R is not None
        half.returning = self._moe(number).dispatcher.combine(half.rows.take(), half.handle, half.weights_R.grad)
        half.weights_R = None

    def _attend_grad(self, number: int) -> None:
        link = self._links[number]
        assert link.graph is not None and self._grad_BSD is not None
        returned = [half.returning.wait() for half in link.halves if half.returning is not None]
        grad_TD = torch.cat([part.sum_TD for part in returned]) if len(returned) > 1 else returned[0].sum_TD
        grad_BSD = grad_TD.view_as(self._grad_BSD)
        if link.shared_input is not None:
            grad_BSD = grad_BSD + link.shared_input.take()
        weights = [part.weights_TK for part in returned if part.weights_TK is not None]
        grad_TK = torch.cat(weights) if len(weights) > 1 else weights[0]
        with self._grads_of(number):
            link.graph.backward(self._grad_BSD, grad_BSD, grad_TK, *[None] * link.num_losses)
        self._leave(number)

    def _weights(self, number: int) -> None:
        for link in sorted(self._put_off, reverse=True):
            if link >= number:
                self._sink.run(self._put_off.pop(link))


@contextmanager
def _uncounted(block: Block) -> Iterator[None]:
    """The router's sums over the step stay as they are: what runs here has been counted."""
    assert isinstance(block.mlp, MoE)
    gate = block.mlp.gate
    counts_E, loss_sum = gate.counts_E.clone(), gate.balance_loss_sum.clone()
    try:
        yield
    finally:
        gate.counts_E.copy_(counts_E)
        gate.balance_loss_sum.copy_(loss_sum)
