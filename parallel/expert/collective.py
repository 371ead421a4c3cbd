"""Expert all-to-all in two stages, each token once over every link: between nodes first, then within the node.

A token goes once to every node that holds one of its experts, to the rank of the same index there (its rail), and from
there once to every rank of the node that holds one (report section 3.2.2). Results come back the same way: a rank sums
its experts' rows of a token, the rail rank sums the node's, the token's own rank sums the nodes', each in FP32 and in a
fixed order, so the sum is the same in every run. What arrives, and in which order, is exactly what `flat` defines.

Plain collectives of torch.distributed: gloo on CPUs, where stage two is issued by the thread that completes stage one;
NCCL on GPUs, all on a stream of its own. Host syncs: one, to read the counts, in a dispatch without a handle.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import Combined, Dispatched
from model.fp8.formats import QuantisedTensor
from model.fp8.quantise import Quantiser
from parallel.expert.exchange import Exchanged, ExpertGroup, Given
from parallel.expert.fan import Fan
from parallel.expert.hops import memberships
from parallel.expert.placement import Placement
from parallel.expert.transfer import Following, Hop, Lane, Parcel, Sent, Traffic, Transfer
from parallel.expert.wire import GRADIENT_QUANTISER, QUANTISER, WIRES, as_bytes, decode, encode, from_bytes, wire_dtype

T = TypeVar("T")
MAX_EXPERTS_PER_NODE = 32767  # ids within a node travel as int16


@dataclass(frozen=True)
class Wires:
    """Forms in which rows travel, see `wire`.

    dispatch: of activations. gradient: of a dispatch with a handle, which is how gradients of `combine` go to the
    experts. combine: of partial sums, model | bf16 | fp32.
    """

    dispatch: str = "model"
    gradient: str = "model"
    combine: str = "model"


@dataclass(frozen=True)
class CollectiveTraffic:
    """Tokens and bytes sent to other ranks so far, by stage: dispatch over rail, node; combine over node, rail."""

    dispatch_rail: Traffic
    dispatch_node: Traffic
    combine_node: Traffic
    combine_rail: Traffic


@dataclass(frozen=True)
class _Splits:
    """Rows to and from each rank of a hop."""

    sent: list[int]
    received: list[int]

    @property
    def back(self) -> "_Splits":
        return _Splits(self.received, self.sent)


@dataclass(frozen=True)
class _Plan:
    """What the host knows of a routing. starts_S, sizes_S: where the tokens of each source rank lie on arrival."""

    rail: _Splits
    node: _Splits
    starts_S: list[int]
    sizes_S: list[int]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class _Handle:
    """The routing of a dispatch: how tokens fan out to nodes, at the rail rank to ranks, on arrival to experts.

    slot_R: place of each row in [arrived tokens, K].
    """

    plan: _Plan
    to_nodes: Fan
    to_ranks: Fan
    to_experts: Fan
    slot_R: Tensor
    top_k: int
    weights_R: Tensor


class CollectiveDispatcher:
    """`TokenDispatcher` over a process group whose rank i holds the experts [i * E / n, (i + 1) * E / n).

    ranks_per_node: neighbouring ranks of the group on one node; must divide the group. All ranks of the group construct
    it together (four process groups are made) and start their transfers in the same order. quantiser: of the fp8 wire
    (gradients: without its amax floor); other kernels give the same bits. Raises PlacementError where experts or ranks
    do not divide.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        *,
        ranks_per_node: int,
        wires: Wires = Wires(),
        quantiser: Quantiser = QUANTISER,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        for name, choices in (("dispatch", WIRES), ("gradient", WIRES), ("combine", ("model", "bf16", "fp32"))):
            if getattr(wires, name) not in choices:
                raise ValueError(f"{name} wire {getattr(wires, name)!r}: use {', '.join(choices)}")
        code = [WIRES.index(w) for w in (wires.dispatch, wires.gradient, wires.combine)]
        wire = sum(c * len(WIRES) ** i for i, c in enumerate(code))
        self._experts = ExpertGroup(group, num_experts=num_experts, wire=wire, timeout=timeout)
        self._place = Placement(num_experts, len(self._experts.ranks), ranks_per_node)
        if self._place.experts_per_node > MAX_EXPERTS_PER_NODE:
            raise ValueError(f"{self._place.experts_per_node} experts on a node: at most {MAX_EXPERTS_PER_NODE}")
        self._index = self._experts.me % ranks_per_node
        self._wires, self._quantiser = wires, quantiser
        self._gradients = replace(quantiser, amax_floor=GRADIENT_QUANTISER.amax_floor)
        groups = memberships(self._experts.ranks, ranks_per_node)[self._experts.me]
        self._dispatch_rail = self._hop("stage 1 of 2 (between nodes)", groups["dispatch rail"])
        self._dispatch_node = self._hop("stage 2 of 2 (within the node)", groups["dispatch node"])
        self._combine_node = self._hop("stage 1 of 2 (within the node)", groups["combine node"])
        self._combine_rail = self._hop("stage 2 of 2 (between nodes)", groups["combine rail"])
        self._dispatches, self._combines = Lane(), Lane()
        self._stream: torch.cuda.Stream | None = None

    def _hop(self, name: str, ranks: tuple[int, ...]) -> Hop:
        group = None
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=self._experts.timeout, use_local_synchronization=True)
        return Hop(name, group, ranks, ranks.index(self._experts.ranks[self._experts.me]))  # type: ignore[arg-type]

    @property
    def traffic(self) -> CollectiveTraffic:
        """What this rank has sent so far."""
        hops = (self._dispatch_rail, self._dispatch_node, self._combine_node, self._combine_rail)
        return CollectiveTraffic(*(replace(hop.traffic) for hop in hops))

    def dispatch(
        self,
        x_TD: Tensor | QuantisedTensor,
        ids_TK: Tensor | None = None,
        weights_TK: Tensor | None = None,
        *,
        handle: _Handle | None = None,
    ) -> Transfer[Dispatched]:
        """See `TokenDispatcher`; weights travel in FP32. Errors in the arguments are raised on all ranks alike.

        x_TD may be quantised already (1 x 128 tiles, one-byte exponents) where the wire is fp8; rows arrive in BF16.
        """
        parts = (x_TD.values, x_TD.scales) if isinstance(x_TD, QuantisedTensor) else (x_TD,)
        with self._on_stream(*parts, ids_TK, weights_TK):
            if handle is not None:
                return self._dispatch_again(x_TD, handle)
            if ids_TK is None or weights_TK is None:
                raise ValueError("a first dispatch needs ids_TK and weights_TK")
            return self._dispatch_first(x_TD, ids_TK, weights_TK)

    def combine(self, rows_RD: Tensor, handle: _Handle, weights_R: Tensor | None = None) -> Transfer[Combined]:
        """See `TokenDispatcher`; the sum is accumulated in FP32 and returned in the type of the rows."""
        if len(rows_RD) != len(handle.slot_R):
            raise ValueError(f"rows_RD has {len(rows_RD)} rows: the handle is of a dispatch of {len(handle.slot_R)}")
        with self._on_stream(rows_RD, weights_R):
            return self._combine(rows_RD, handle, weights_R)

    # --- dispatch ----------------------------------------------------------------------------------------------

    def _dispatch_first(
        self, x_TD: Tensor | QuantisedTensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Transfer[Dispatched]:
        place, width = self._place, 1 + self._place.ranks_per_node + self._place.experts_per_rank
        values, dtype = (x_TD, x_TD.dtype) if isinstance(x_TD, Tensor) else (x_TD.values, torch.bfloat16)
        given = Given(values, dtype, ids_TK, weights_TK)
        exchanged = self._experts.exchange(given, width=width, table=self._table)
        plan, top_k = self._plan(exchanged), ids_TK.shape[1]
        to_nodes = Fan.by_column(self._spread(ids_TK, place.num_nodes), sum(plan.rail.sent))
        meta = self._meta(ids_TK, weights_TK, to_nodes, plan)
        tokens = encode(x_TD, self._wires.dispatch, self._quantiser)
        parcel = _with(to_nodes.gather(tokens), meta)
        first = self._dispatch_rail.start(parcel, plan.rail.sent, plan.rail.received)
        kept: list[Fan] = []

        def forward(arrived: Parcel) -> Sent:
            ids_MK, _ = _read_meta(arrived, top_k)
            needed_ML = _marks(ids_MK, place.experts_per_rank, place.ranks_per_node)
            kept.append(Fan.by_column(needed_ML, sum(plan.node.sent)))
            return self._dispatch_node.start(kept[0].gather(arrived), plan.node.sent, plan.node.received)

        def finish(arrived: Parcel) -> Dispatched:
            ids_MK, weights_MK = _read_meta(arrived, top_k)
            slot_R = self._order(ids_MK, plan)
            to_experts = Fan(slot_R // max(top_k, 1), len(ids_MK))
            weights_R = weights_MK.flatten()[slot_R].to(weights_TK.dtype)
            made = self._keep(_Handle(plan, to_nodes, kept[0], to_experts, slot_R, top_k, weights_R))
            plain = decode(_without(arrived, top_k), self._wires.dispatch, dtype, self._quantiser)
            return Dispatched(plain.index_select(0, to_experts.source_C), weights_R, plan.counts, made)

        following = self._dispatches.follow(first, self._dispatch_rail, forward)
        return self._transfer(f"dispatch {self._experts.number}", following, finish, hop=self._dispatch_node)

    def _dispatch_again(self, x_TD: Tensor | QuantisedTensor, handle: _Handle) -> Transfer[Dispatched]:
        values, dtype = (x_TD, x_TD.dtype) if isinstance(x_TD, Tensor) else (x_TD.values, torch.bfloat16)
        if len(values) != handle.to_nodes.num_items:
            expected = handle.to_nodes.num_items
            raise ValueError(f"x_TD has {len(values)} tokens: the handle is of a dispatch of {expected}")
        plan, wire = handle.plan, self._wires.gradient
        parcel = handle.to_nodes.gather(encode(x_TD, wire, self._gradients))
        first = self._dispatch_rail.start(parcel, plan.rail.sent, plan.rail.received)

        def forward(arrived: Parcel) -> Sent:
            copies = handle.to_ranks.gather(arrived)
            return self._dispatch_node.start(copies, plan.node.sent, plan.node.received)

        def finish(arrived: Parcel) -> Dispatched:
            plain = decode(arrived, wire, dtype, self._gradients)
            rows_RD = plain.index_select(0, handle.to_experts.source_C)
            return Dispatched(rows_RD, handle.weights_R, plan.counts, handle)

        following = self._dispatches.follow(first, self._dispatch_rail, forward)
        return self._transfer("dispatch with a handle", following, finish, hop=self._dispatch_node)

    # --- combine -----------------------------------------------------------------------------------------------

    def _combine(self, rows_RD: Tensor, handle: _Handle, weights_R: Tensor | None) -> Transfer[Combined]:
        plan, dtype = handle.plan, rows_RD.dtype
        wire = wire_dtype(self._wires.combine, dtype)
        scalars_MK = None
        if weights_R is not None:
            flat = torch.zeros(handle.to_experts.num_items * handle.top_k, device=rows_RD.device)
            scalars_MK = flat.index_copy_(0, handle.slot_R, weights_R.float()).view(-1, handle.top_k)
        partial = handle.to_experts.sum(rows_RD, _width(self._combine_node, wire))
        parcel = Parcel(partial, None if scalars_MK is None else as_bytes(scalars_MK))
        first = self._combine_node.start(parcel, plan.node.received, plan.node.sent)

        def onward(arrived: Parcel) -> Sent:
            partial = handle.to_ranks.sum(arrived.rows_ND, _width(self._combine_rail, wire))
            scalars = _sum_scalars(arrived, handle.to_ranks)
            extra = None if scalars is None else as_bytes(scalars)
            return self._combine_rail.start(Parcel(partial, extra), plan.rail.received, plan.rail.sent)

        def finish(arrived: Parcel) -> Combined:
            sum_TD = handle.to_nodes.sum(arrived.rows_ND, dtype)
            scalars_TK = _sum_scalars(arrived, handle.to_nodes)
            return Combined(sum_TD, None if scalars_TK is None or weights_R is None else scalars_TK.to(weights_R.dtype))

        following = self._combines.follow(first, self._combine_node, onward)
        return self._transfer("combine", following, finish, hop=self._combine_rail)

    # --- routing -----------------------------------------------------------------------------------------------

    def _spread(self, ids_TK: Tensor, parts: int) -> Tensor:
        """Whether a token has an expert in each of `parts` equal parts of the experts: bool [T, parts]."""
        return _marks(ids_TK, self._place.num_experts // parts, parts)

    def _table(self, ids_TK: Tensor) -> Tensor:
        """For each rank r of the group: tokens for its node, tokens for each rank there, rows for each expert of r."""
        place = self._place
        ids = ids_TK.flatten().long() + 1
        experts_E = ids.new_zeros(place.num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[1:]
        ranks_NL = self._spread(ids_TK, place.num_ranks).sum(0).view(place.num_nodes, -1)
        nodes_N1 = self._spread(ids_TK, place.num_nodes).sum(0)[:, None]
        by_node = torch.cat([nodes_N1, ranks_NL], 1).repeat_interleave(place.ranks_per_node, 0)
        return torch.cat([by_node, experts_E.view(place.num_ranks, -1)], 1)

    def _plan(self, exchanged: Exchanged) -> _Plan:
        place = self._place
        num_nodes, size = place.num_nodes, place.ranks_per_node
        own_NLC = exchanged.own_RC.view(num_nodes, size, -1)
        from_NLC = exchanged.from_RC.view(num_nodes, size, -1)
        rail = _Splits(own_NLC[:, self._index, 0].tolist(), from_NLC[:, self._index, 0].tolist())
        to_me_NL = from_NLC[:, :, 1 + self._index]  # tokens of source (node, index) for this rank
        node = _Splits(from_NLC[:, self._index, 1 : 1 + size].sum(0).tolist(), to_me_NL.sum(0).tolist())
        arrival_LN = to_me_NL.T.flatten()  # tokens arrive by index, then node, and sources count node first
        starts_NL = (arrival_LN.cumsum(0) - arrival_LN).view(size, num_nodes).T
        counts = tuple(exchanged.from_RC[:, 1 + size :].sum(0).tolist())
        return _Plan(rail, node, starts_NL.flatten().tolist(), to_me_NL.flatten().tolist(), counts)

    def _meta(self, ids_TK: Tensor, weights_TK: Tensor, to_nodes: Fan, plan: _Plan) -> Tensor:
        """Bytes that go with each copy for a node: K weights (FP32), K expert ids within that node or -1 (int16)."""
        size, source = self._place.experts_per_node, to_nodes.source_C
        sizes = torch.tensor(plan.rail.sent, device=ids_TK.device)
        nodes = torch.arange(len(sizes), device=ids_TK.device)
        node_C = nodes.repeat_interleave(sizes, output_size=sum(plan.rail.sent))
        ids_CK = ids_TK.index_select(0, source) - (node_C * size)[:, None]
        ids_CK = ids_CK.where((ids_CK >= 0) & (ids_CK < size), -1)
        weights_CK = weights_TK.index_select(0, source)
        return torch.cat([as_bytes(weights_CK.float()), as_bytes(ids_CK.short())], 1)

    def _order(self, ids_MK: Tensor, plan: _Plan) -> Tensor:
        """Slots (token * K + k) of the rows in their order: by local expert, source rank, token, k."""
        place, top_k = self._place, ids_MK.shape[1]
        local_MK = ids_MK - self._index * place.experts_per_rank
        mine = (local_MK >= 0) & (local_MK < place.experts_per_rank)
        tokens = [torch.arange(s, s + n) for s, n in zip(plan.starts_S, plan.sizes_S, strict=True)]
        token_M = torch.cat(tokens).to(ids_MK.device)  # arrived tokens in the order of their sources
        key_MK = local_MK.where(mine, place.experts_per_rank).index_select(0, token_M)
        order = key_MK.flatten().argsort(stable=True)[: sum(plan.counts)]
        return token_M[order // max(top_k, 1)] * top_k + order % max(top_k, 1)

    # --- streams -----------------------------------------------------------------------------------------------

    @contextmanager
    def _on_stream(self, *tensors: Tensor | None) -> Iterator[None]:
        """On a GPU, the stream of this dispatcher, which starts when the current one has made the tensors."""
        given = [tensor for tensor in tensors if tensor is not None]
        if not given[0].is_cuda:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(given[0].device)
        self._stream.wait_stream(torch.cuda.current_stream(given[0].device))
        for tensor in given:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def _transfer(self, name: str, last: Following[Sent], finish: Callable[[Parcel], T], *, hop: Hop) -> Transfer[T]:
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
        return Transfer(name, last, hop, finish, self._experts.roll_call, event)

    def _keep(self, handle: _Handle) -> _Handle:
        """A handle is used on two streams: its memory may be given away only when both are done with it."""
        for tensor in (handle.to_nodes.source_C, handle.to_ranks.source_C, handle.to_experts.source_C, handle.slot_R):
            if self._stream is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return handle


def _marks(ids_NK: Tensor, size: int, parts: int) -> Tensor:
    """Whether a token has an id in each of `parts` runs of `size` ids, -1 being none: bool [N, parts]."""
    # Floor division takes -1 to -1, hence to column 0, which is left out.
    part_NK = ids_NK.long().div(size, rounding_mode="floor") + 1
    marks = torch.zeros(len(ids_NK), parts + 1, dtype=torch.bool, device=ids_NK.device)
    return marks.scatter_(1, part_NK, True)[:, 1:]


def _width(hop: Hop, wire: torch.dtype) -> torch.dtype | None:
    """Partial sums are rounded to the wire's type where there is a wire, else not at all."""
    return None if hop.group is None else wire


def _sum_scalars(arrived: Parcel, fan: Fan) -> Tensor | None:
    """The scalars [N, K] that travelled with partial sums: each is on one copy only, the others have 0 in its place."""
    return None if arrived.extra_NB is None else fan.sum(from_bytes(arrived.extra_NB, torch.float32))


def _meta_bytes(top_k: int) -> int:
    return top_k * 6


def _with(parcel: Parcel, meta_NB: Tensor) -> Parcel:
    """The parcel with meta data before whatever else goes with its rows."""
    extra = meta_NB if parcel.extra_NB is None else torch.cat([meta_NB, parcel.extra_NB], 1)
    return Parcel(parcel.rows_ND, extra)


def _without(parcel: Parcel, top_k: int) -> Parcel:
    assert parcel.extra_NB is not None
    return Parcel(parcel.rows_ND, parcel.extra_NB[:, _meta_bytes(top_k) :])


def _read_meta(parcel: Parcel, top_k: int) -> tuple[Tensor, Tensor]:
    """Expert ids within the node, and weights: [N, K] each."""
    assert parcel.extra_NB is not None
    weights_NB, ids_NB = parcel.extra_NB[:, : _meta_bytes(top_k)].split([4 * top_k, 2 * top_k], 1)
    return from_bytes(ids_NB, torch.int16), from_bytes(weights_NB, torch.float32)
