"""native_host as the back end of gloo processes, against the flat all-to-all; mistakes and silence end every rank."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from model.dispatch import combine_rows, dispatch_tokens
from parallel.expert.flat import FlatDispatcher
from parallel.expert.native.dispatcher import NativeConfig
from parallel.expert.native.failure import NativeError
from parallel.expert.native.host import NativeHostDispatcher
from tests.distributed import run_distributed
from tests.parallel.expert.native.reference import check_rank, routing, scaled

HIDDEN, TOP_K = 64, 4


def start() -> dist.ProcessGroup:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def open_native(group: dist.ProcessGroup, nodes: int, config: NativeConfig) -> NativeHostDispatcher:
    sizes = {"num_experts": 2 * dist.get_world_size(), "hidden_size": HIDDEN, "top_k": TOP_K}
    return NativeHostDispatcher.over_group(group, num_nodes=nodes, config=config, **sizes)


def equals_flat(nodes: int, seed: int) -> None:
    group = start()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    experts, tokens = 2 * ranks, (21, 13, 0, 1)
    sent = [
        routing(r, tokens=tokens[r % 4], hidden=HIDDEN, experts=experts, top_k=TOP_K, how="unused", dtype=torch.float32)
        for r in range(ranks)
    ]
    native = open_native(group, nodes, NativeConfig(timeout_seconds=60, seed=seed))
    check_rank(native, sent)
    results = []
    for dispatcher in (native, FlatDispatcher(group, experts)):
        x, weights = sent[rank].x_TD.clone().requires_grad_(), sent[rank].weights_TK.clone().requires_grad_()
        arrived = dispatch_tokens(dispatcher, x, sent[rank].ids_TK, weights)
        rows = scaled(arrived.rows_RD, arrived.counts, rank) * arrived.weights_R[:, None]
        out = combine_rows(dispatcher, rows, arrived.handle)
        out.backward(torch.sin(torch.arange(out.numel())).view_as(out))
        results.append((arrived.rows_RD, arrived.weights_R, arrived.counts, out, x.grad, weights.grad))
    (rows, scalars, counts, *sums), (flat_rows, flat_scalars, flat_counts, *flat_sums) = results
    assert counts == flat_counts and torch.equal(rows, flat_rows) and torch.equal(scalars, flat_scalars)
    for ours, flat in zip(sums, flat_sums, strict=True):  # another order of the same FP32 additions
        torch.testing.assert_close(ours, flat, rtol=1e-6, atol=1e-6)
    assert not [name for name in os.listdir("/dev/shm") if "expertpipe" in name]
    native.close()


def test_processes_equal_flat() -> None:
    run_distributed(4, equals_flat, 2, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 2), (1, 4), (4, 8), (2, 8), (4, 16), (2, 16)])
def test_more_processes_equal_flat(nodes: int, ranks: int) -> None:
    run_distributed(ranks, equals_flat, nodes, 2)


def failing(how: str, lost: int) -> str:
    group = start()
    rank = dist.get_rank()
    config = NativeConfig(timeout_seconds=1.5, ring=3 if how == "config" and rank == 1 else 8)
    began = time.monotonic()
    try:
        native = open_native(group, 2, config)
        sent = routing(rank, tokens=9, hidden=HIDDEN, experts=8, top_k=TOP_K, dtype=torch.float32)
        if rank == lost:
            time.sleep(5)
            return "slept"
        native.dispatch(sent.x_TD, sent.ids_TK, sent.weights_TK).wait()
    except NativeError as error:
        assert time.monotonic() - began < 15
        return str(error)
    return "no error"


@pytest.mark.parametrize("lost", [0, 1])
def test_late_rank_is_named(lost: int) -> None:
    lines = run_distributed(4, failing, "late", lost)
    assert lines.pop(lost) == "slept"
    first = [line for line in lines if "stopped with all others" not in line]
    assert len(first) == 1 and f"nothing from rank {lost} in 1.5 s (0 of 1 items so far)" in first[0]
    for line in lines:
        assert line.startswith("rank ") and f"nothing from rank {lost} in 1.5 s" in line and "\n" not in line
        assert ": notify " in line and ", channel 0" in line


@pytest.mark.exhaustive
def test_other_config_is_refused_by_all() -> None:
    for line in run_distributed(4, failing, "config", 1):
        assert line.startswith("rank 1 has NativeConfig(") and "rank 0 NativeConfig(" in line
