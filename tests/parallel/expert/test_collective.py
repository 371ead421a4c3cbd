"""The two-stage all-to-all beyond what arrives: order of issue, transfers in flight, traffic, mistakes, lost peers."""

import os
import random
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.expert import transfer as transfer_module
from parallel.expert.collective import CollectiveDispatcher, Wires
from parallel.expert.flat import FlatDispatcher
from parallel.expert.placement import PlacementError
from parallel.expert.roll_call import ExpertError
from parallel.expert.wire import row_bytes
from tests.distributed import run_distributed
from tests.parallel.expert.routings import EXPERTS, Case, nodes_reached, routing

TOP_K = 4
IN_FLIGHT = 6


def join(seconds: float = 60) -> tuple[Any, int]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    return dist.group.WORLD, dist.get_rank()


def collective(seconds: float = 60, ranks_per_node: int = 2, wires: Wires | None = None) -> CollectiveDispatcher:
    world = dist.group.WORLD
    assert world is not None
    timeout = timedelta(seconds=seconds)
    return CollectiveDispatcher(world, EXPERTS, ranks_per_node=ranks_per_node, wires=wires or Wires(), timeout=timeout)


# --- transfers in flight -----------------------------------------------------------------------------------------


def delay_stages(rank: int, *, in_order: bool) -> None:
    """Before it issues a second stage, a rank sleeps for a time of its own.

    in_order=False: stages overtake each other, each issued as soon as its own first stage is over.
    """
    choose = random.Random(rank)
    plain = transfer_module.Following.begin

    def slow(self: Any, broken: Any) -> Any:
        time.sleep(choose.random() * 0.03)
        return plain(self, broken)

    def at_once(self: Any) -> None:
        ready = [following for following in list(self._waiting) if following.is_ready]
        for following in sorted(ready, key=lambda _: choose.random()):
            self._waiting.remove(following)
            following.begin(None)

    transfer_module.Following.begin = slow  # type: ignore[method-assign]
    if not in_order:
        choose = random.Random(rank)
        transfer_module.Lane._advance = at_once  # type: ignore[method-assign]

        def late(self: Any, following: Any, future: Any) -> None:
            with self._lock:
                following.arrived(future)
            threading.Timer(choose.random() * 0.3, self._advance).start()

        transfer_module.Lane._over = late  # type: ignore[method-assign]


def many_in_flight(in_order: bool) -> None:
    world, rank = join(20)
    flat, tested = FlatDispatcher(world, EXPERTS), collective(20)
    case = Case((9, 5, 12), seed=1)
    handles, expected = [], []
    for seed in range(IN_FLIGHT):
        given = routing(Case(case.tokens, seed=seed, hidden=16 + seed), rank)
        sent = flat.dispatch(given.x, given.ids, given.weights).wait()
        back = flat.combine(sent.rows_RD, sent.handle).wait()
        expected.append((given, sent.rows_RD, back.sum_TD))
        handles.append(tested.dispatch(given.x, given.ids, given.weights).wait().handle)
    delay_stages(rank, in_order=in_order)
    choose = random.Random(100 + rank)
    for _ in range(4):
        under_way = []
        for i, (given, rows, total) in enumerate(expected):  # the same order on all ranks, at different times
            time.sleep(choose.random() * 0.02)
            under_way.append((tested.dispatch(given.x, handle=handles[i]), rows, "rows_RD"))
            under_way.append((tested.combine(rows, handles[i]), total, "sum_TD"))
        choose.shuffle(under_way)  # waited for in any order, another on each rank
        for pending, wanted, name in under_way:
            got = getattr(pending.wait(), name)
            assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-5), name
            assert pending.done()
    dist.barrier()


def test_transfers_in_flight_with_random_delays() -> None:
    run_distributed(4, many_in_flight, True)


def test_stages_out_of_order_would_be_caught() -> None:
    """The same without the lanes' order: collectives of different transfers meet, sizes or contents disagree."""
    with pytest.raises(AssertionError, match=r"rank \d"):
        run_distributed(4, many_in_flight, False)


def begins_before_wait() -> bool:
    _, rank = join()
    tested = collective()
    given = routing(Case((8,)), rank)
    pending = tested.dispatch(given.x, given.ids, given.weights)
    end = time.monotonic() + 20
    while not pending.done() and time.monotonic() < end:
        time.sleep(0.01)
    done = pending.done()  # nobody has waited
    pending.wait()
    dist.barrier()
    return done


def test_both_stages_go_on_without_anybody_waiting() -> None:
    assert run_distributed(4, begins_before_wait) == [True] * 4


# --- traffic -----------------------------------------------------------------------------------------------------


def traffic(wire: str) -> dict[str, int]:
    _, rank = join()
    tested, case = collective(wires=Wires(wire)), Case((33, 20, 7), hidden=200, top_k=8, dtype=torch.bfloat16)
    given = routing(case, rank)
    sent = tested.dispatch(given.x, given.ids, given.weights).wait()
    tested.combine(sent.rows_RD, sent.handle).wait()
    nodes, ranks = nodes_reached(given.ids, 2), nodes_reached(given.ids, 4)
    seen = tested.traffic
    dist.barrier()
    return {
        "rail": seen.dispatch_rail.tokens, "rail_bytes": seen.dispatch_rail.bytes, "node": seen.dispatch_node.tokens,
        "back_bytes": seen.combine_rail.bytes, "back": seen.combine_rail.tokens,
        "least": int(nodes[:, 1 - rank // 2].sum()),
        # Within each node: once to every rank that needs it, other than the one of the sender's own index.
        "node_least": int(ranks.sum() - ranks[:, rank % 2 :: 2].sum()),
    }  # fmt: skip


@pytest.mark.parametrize("wire", ["model", "fp8"])
def test_traffic_is_the_minimum(wire: str) -> None:
    ranks = run_distributed(4, traffic, wire)
    payload, extra = row_bytes(200, wire=wire, dtype=torch.bfloat16), 6 * 8  # weights in FP32, ids of two bytes
    for seen in ranks:
        assert seen["rail"] == seen["least"] > 0
        assert seen["rail_bytes"] == seen["least"] * (payload + extra)
        assert seen["back_bytes"] == seen["back"] * 400
    assert sum(r["node"] for r in ranks) == sum(r["node_least"] for r in ranks) > 0


# --- mistakes ----------------------------------------------------------------------------------------------------


def mistakes() -> dict[str, str]:
    """Each mistake is made by rank 1 alone; the message on this rank."""
    world, rank = join()
    wrong = rank == 1
    good = routing(Case((6, 5), top_k=3), rank)
    wide = routing(Case((6, 5), top_k=3, hidden=32), rank)
    makers = {"collective": collective(), "flat": FlatDispatcher(world, EXPERTS)}
    arguments = {
        "id": (good.x, good.ids + 99 * wrong, good.weights),
        "low_id": (good.x, good.ids - 20 * wrong, good.weights),
        "hidden": (wide.x if wrong else good.x, good.ids, good.weights),
        "dtype": (good.x.bfloat16() if wrong else good.x, good.ids, good.weights),
        "top_k": (good.x, good.ids[:, : 3 - wrong], good.weights[:, : 3 - wrong]),
        "rows": (good.x[: 6 - 3 * wrong], good.ids, good.weights),
        "weights": (good.x, good.ids, good.weights[:, : 3 - wrong]),
        "kind": (good.x, good.ids.float() if wrong else good.ids, good.weights),
        "shape": (good.x[0] if wrong else good.x, good.ids, good.weights),
    }
    found = {}
    for maker, dispatcher in makers.items():
        for name, given in arguments.items():
            with pytest.raises(ExpertError) as caught:
                dispatcher.dispatch(*given)
            found[f"{maker} {name}"] = str(caught.value)
        sent = dispatcher.dispatch(good.x, good.ids, good.weights).wait()  # and the group still works
        assert len(sent.rows_RD) == sum(sent.counts)
    with pytest.raises(ValueError, match=r"rows_RD has 1 rows: the handle is of a dispatch of"):
        makers["collective"].combine(
            good.x[:1], makers["collective"].dispatch(good.x, good.ids, good.weights).wait().handle
        )
    for make, error, words in (
        (
            lambda: collective(ranks_per_node=3),
            PlacementError,
            "ranks_per_node=3 does not divide num_ranks=4: use 2 or 4",
        ),
        (lambda: collective(wires=Wires("fp4")), ValueError, "dispatch wire 'fp4': use model, bf16, fp32, fp8"),
        (lambda: collective(wires=Wires(combine="fp8")), ValueError, "combine wire 'fp8': use model, bf16, fp32"),
    ):
        with pytest.raises(error, match=words):
            make()
    dist.barrier()
    return found


EXPECTED = {
    "id": "rank 1: ids_TK holds {}: experts go from 0 to 15, -1 is an unused slot",
    "low_id": "rank 1: ids_TK holds {}: experts go from 0 to 15, -1 is an unused slot",
    "hidden": "rank 1 sends hidden size 32, rank 0 24: all 4 must agree",
    "dtype": "rank 1 sends torch.bfloat16, rank 0 torch.float32: all 4 must agree",
    "top_k": "rank 1 sends top-k 2, rank 0 3: all 4 must agree",
    "rows": "rank 1: ids_TK has 5 rows: x_TD has 3 tokens",
    "weights": "rank 1: weights_TK has 10 elements: ids_TK has 15",
    "kind": "rank 1: ids_TK is not of whole numbers: use torch.int64",
    "shape": "rank 1: x_TD has 1 dimensions: it must have 2, [tokens, hidden]",
}


def test_a_mistake_of_one_rank_is_told_by_all() -> None:
    ranks = run_distributed(4, mistakes)
    ids = routing(Case((6, 5), top_k=3), 1).ids
    values = {"id": int(ids.min()) + 99, "low_id": int(ids.min()) - 20}
    for maker in ("collective", "flat"):
        for name, words in EXPECTED.items():
            assert {rank[f"{maker} {name}"] for rank in ranks} == {words.format(values.get(name))}, name


# --- lost peers --------------------------------------------------------------------------------------------------

SECONDS = 4.0


def losing(lost: int, how: str, when: str) -> tuple[str, float]:
    """A rank leaves, or sleeps, before the second dispatch or before the combine; what the others say and when."""
    _, rank = join(SECONDS)
    tested, given = collective(SECONDS), routing(Case((8,)), rank)
    sent = tested.dispatch(given.x, given.ids, given.weights).wait()
    if rank == lost:
        if how == "hangs":
            time.sleep(3 * SECONDS)
        threading.Timer(0.5, lambda: os._exit(0)).start()  # after this result is on its way
        return "", 0.0
    started = time.monotonic()
    try:
        if when == "dispatch":
            tested.dispatch(given.x, given.ids, given.weights).wait()
        else:
            tested.combine(sent.rows_RD, sent.handle).wait()
    except ExpertError as error:
        said = str(error), time.monotonic() - started
        threading.Timer(4.0, lambda: os._exit(0)).start()  # rank 0 has the store, which the others still ask
        return said
    return "nothing", 0.0


@pytest.mark.parametrize(
    ("lost", "how", "when"), [(3, "dies", "dispatch"), (3, "hangs", "combine"), (0, "dies", "combine")]
)
def test_a_lost_peer_is_named(lost: int, how: str, when: str) -> None:
    """Rank 0 keeps the store through which the others ask after each other."""
    ranks = run_distributed(4, losing, lost, how, when)
    others = {rank: said for rank, said in enumerate(ranks) if rank != lost}
    transfer = "dispatch 2, exchange of counts" if when == "dispatch" else "combine, stage"
    store = "so rank 0, which keeps it, may be the one; waited for ranks ["
    for rank, (line, _) in others.items():
        assert line.startswith(f"rank {rank}: {transfer}") and "\n" not in line, line
        if (lost, how) == (0, "dies"):
            assert store in line or "rank 0 gives no sign of life" in line, line
        else:
            assert f"rank {lost} gives no sign of life" in line, line
        assert "waited for ranks [" in line
    assert max(seconds for _, seconds in others.values()) < SECONDS + 3 * SECONDS / 4 + 2
