"""What dispatch and combine must give, from the definition: plain loops over the routings of all ranks."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.fp8.quantise import Quantiser
from parallel.expert.native.dispatcher import Geometry, NativeConfig
from parallel.expert.native.host import NativeHostDispatcher
from parallel.expert.wire import GRADIENT_QUANTISER, QUANTISER, decode, encode


@dataclass(frozen=True)
class Routing:
    """One rank's tokens, and the geometry of all."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def routing(
    seed: int, *, tokens: int, hidden: int, experts: int, top_k: int, how: str = "random", dtype: torch.dtype
) -> Routing:
    """Tokens whose copies go to different experts; how: random, unused (some or all slots -1), first, last."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    if how == "unused" and tokens:
        ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.4] = -1
        ids_TK[0] = -1
    elif how in ("first", "last"):
        ids_TK = torch.full_like(ids_TK, -1)
        ids_TK[:, -1] = 0 if how == "first" else experts - 1
    return Routing(x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator))


def arrived(routings: list[Routing], rank: int, experts: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Rows, weights and counts of a rank: by local expert, then source rank, then token."""
    local = experts // len(routings)
    rows, weights, counts = [], [], []
    for expert in range(rank * local, (rank + 1) * local):
        before = len(rows)
        for source in routings:
            for token, k in (source.ids_TK == expert).nonzero().tolist():
                rows.append(source.x_TD[token])
                weights.append(source.weights_TK[token, k])
        counts.append(len(rows) - before)
    empty = routings[0].x_TD.new_empty(0, routings[0].x_TD.shape[1])
    return torch.stack(rows) if rows else empty, torch.tensor(weights), tuple(counts)


def scaled(rows_RD: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
    """Some expert: each row times a number of its own, in the rows' precision."""
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) + rank * len(counts)
    return (rows_RD.float() * (1 + owners[:, None] % 7) / 3).to(rows_RD.dtype)


def combined(own: Routing, *, ranks: int, nodes: int, experts: int, me: int, wire: torch.dtype) -> Tensor:
    """The sum that combine defines: copies of a GPU by k, GPUs of a node rising, nodes rising; FP32; wire rounding."""
    local = experts // ranks
    dtype = own.x_TD.dtype
    total = torch.zeros_like(own.x_TD)
    for token, ids in enumerate(own.ids_TK.tolist()):
        by_node: dict[int, dict[int, list[Tensor]]] = {}
        for expert in ids:
            if expert >= 0:
                rank = expert // local
                row = (own.x_TD[token].float() * (1 + expert % 7) / 3).to(dtype).float()
                by_node.setdefault(rank // (ranks // nodes), {}).setdefault(rank, []).append(row)
        sums = []
        for node in sorted(by_node):
            node_sum = chain([chain(by_node[node][rank]) for rank in sorted(by_node[node])])
            sums.append(node_sum if node == me // (ranks // nodes) else node_sum.to(wire).float())
        if sums:
            total[token] = chain(sums).to(dtype)
    return total


def chain(terms: list[Tensor]) -> Tensor:
    """((a + b) + c) + ..."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def minimum(own: Routing, *, me: int, ranks: int, nodes: int, experts: int) -> int:
    """Tokens that must leave the node: once for each other node that holds one of their experts."""
    node_experts, node = experts // nodes, me // (ranks // nodes)
    return sum(len({expert // node_experts for expert in ids if expert >= 0} - {node}) for ids in own.ids_TK.tolist())


def through_fp8(x_TD: Tensor, quantiser: Quantiser) -> Tensor:
    """What the FP8 wire makes of rows."""
    return decode(encode(x_TD, "fp8", quantiser), "fp8", x_TD.dtype)


def check_rank(dispatcher: NativeHostDispatcher, routings: list[Routing]) -> None:
    """Dispatch and combine of one rank against the above, then dispatch again along the cached routing, as a gradient.

    Where the wire is FP8, against what FP8 makes of the same tokens.
    """
    geometry, me = dispatcher.geometry, dispatcher.rank
    given, fp8 = routings[me].x_TD, dispatcher.config.dispatch_wire == "fp8"
    gradients = [replace(sent, x_TD=-sent.x_TD) for sent in routings]
    if fp8:
        routings = [replace(sent, x_TD=through_fp8(sent.x_TD, QUANTISER)) for sent in routings]
        gradients = [replace(sent, x_TD=through_fp8(sent.x_TD, GRADIENT_QUANTISER)) for sent in gradients]
    own = routings[me]
    rows, weights, counts = arrived(routings, me, geometry.num_experts)
    sent = dispatcher.dispatch(given, own.ids_TK, own.weights_TK).wait()
    assert sent.counts == counts
    assert torch.equal(sent.rows_RD, rows) and torch.equal(sent.weights_R, weights)
    wire = torch.float32 if dispatcher.config.combine_wire == "fp32" else own.x_TD.dtype
    places = {"ranks": geometry.num_ranks, "nodes": geometry.num_nodes, "experts": geometry.num_experts, "me": me}
    back = dispatcher.combine(scaled(sent.rows_RD, counts, me), sent.handle, sent.weights_R).wait()
    assert torch.equal(back.sum_TD, combined(own, wire=wire, **places))
    assert back.weights_TK is not None
    assert torch.equal(back.weights_TK, torch.where(own.ids_TK >= 0, own.weights_TK, 0))
    again = dispatcher.dispatch(-given, handle=sent.handle).wait()
    assert torch.equal(again.rows_RD, arrived(gradients, me, geometry.num_experts)[0])
    assert torch.equal(again.weights_R, weights)


def on_threads(dispatchers: list[NativeHostDispatcher], work: Callable[[NativeHostDispatcher], Any]) -> list[Any]:
    """work(dispatcher) of every rank in a thread each; results by rank, the first exception raised."""
    results: list[Any] = [None] * len(dispatchers)

    def one(rank: int) -> None:
        try:
            results[rank] = work(dispatchers[rank])
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(dispatchers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def run_ranks(routings: list[Routing], *, nodes: int, experts: int, config: NativeConfig) -> dict[str, int]:
    """`check_rank` on all ranks, as threads; the sum of their counters."""
    hidden, top_k = routings[0].x_TD.shape[1], routings[0].ids_TK.shape[1]
    geometry = Geometry(len(routings), nodes, experts, hidden, top_k)
    dispatchers = NativeHostDispatcher.in_process(geometry, config)
    errors = [e for e in on_threads(dispatchers, lambda d: check_rank(d, routings)) if e is not None]
    totals = [dispatcher.machine.counters() for dispatcher in dispatchers]
    for dispatcher in dispatchers:
        dispatcher.close()
    if errors:
        raise next((e for e in errors if isinstance(e, AssertionError)), errors[0])
    return {name: sum(counters[name] for counters in totals) for name in totals[0]}
