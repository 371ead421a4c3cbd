"""What goes wrong on one rank ends all, with one line that names rank, argument and limit, or who was waited for."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.expert.native.dispatcher import Geometry, KernelDispatcher, NativeConfig, checked_shape
from parallel.expert.native.failure import NativeError
from parallel.expert.native.gpu import NativeGpuDispatcher
from parallel.expert.native.host import NativeHostDispatcher
from parallel.expert.native.library import Machine, bind_host
from parallel.expert.native.window import Window
from tests.parallel.expert.native.reference import on_threads, routing

GEOMETRY = Geometry(num_ranks=4, num_nodes=2, num_experts=8, hidden_size=64, top_k=4)
TIMEOUT = 2.0


def inputs(rank: int, how: str) -> tuple[Tensor, Any, Any]:
    sent = routing(rank, tokens=9, hidden=64, experts=8, top_k=4, dtype=torch.float32)
    x, ids, weights = sent.x_TD, sent.ids_TK, sent.weights_TK
    if rank != 1:
        return x, ids, weights
    bad_ids = ids.clone()
    bad_ids[4, 1] = 8 if how == "id" else -2
    changed: dict[str, tuple[Any, Any, Any]] = {
        "hidden": (x[:, :32], ids, weights),
        "top_k": (x, ids[:, :2], weights[:, :2]),
        "dtype": (x.bfloat16(), ids, weights),
        "too_wide": (torch.zeros(9, 72), ids, weights),
        "many_copies": (x, torch.zeros(9, 5, dtype=torch.int64), torch.zeros(9, 5)),
        "three_dims": (x[None], ids, weights),
        "float64": (x.double(), ids, weights),
        "meta": (x.to("meta"), ids, weights),
        "meta_ids": (x, ids.to("meta"), weights),
        "meta_weights": (x, ids, weights.to("meta")),
        "tokens": (x, ids[:8], weights[:8]),
        "weights": (x, ids, weights[:, :3]),
        "no_ids": (x, None, None),
        "id": (x, bad_ids, weights),
        "negative_id": (x, bad_ids, weights),
    }
    return changed.get(how, (x, ids, weights))


def use(dispatcher: NativeHostDispatcher, how: str) -> None:
    if how == "late" and dispatcher.rank == 1:
        return
    arrived = dispatcher.dispatch(*inputs(dispatcher.rank, how)).wait()
    rows = arrived.rows_RD
    if dispatcher.rank == 1:
        if how == "late_combine":
            return
        rows = rows[1:] if how == "rows" else rows
        if how == "cached":
            dispatcher.dispatch(torch.zeros(8, 64), handle=arrived.handle)
    weights = torch.zeros(3) if how == "row_weights" and dispatcher.rank == 1 else None
    if how == "combine_width" and dispatcher.rank == 1:
        rows = rows[:, :32]
    dispatcher.combine(rows, arrived.handle, weights).wait()


def failures(how: str, dispatchers: list[NativeHostDispatcher] | None = None) -> list[str | None]:
    """Each rank's message; None where it had no error."""
    config = NativeConfig(timeout_seconds=TIMEOUT)
    dispatchers = dispatchers or NativeHostDispatcher.in_process(GEOMETRY, config)
    began = time.monotonic()
    errors = on_threads(dispatchers, lambda dispatcher: use(dispatcher, how))
    assert time.monotonic() - began < 10 * TIMEOUT
    for dispatcher in dispatchers:
        dispatcher.close()
    for error in errors:
        assert error is None or isinstance(error, NativeError), error
    return [None if error is None else str(error) for error in errors]


# Refused by rank 1 itself before anything travels.
REFUSED = {
    "too_wide": "x_TD has hidden size 72: the buffers hold 64",
    "many_copies": "ids_TK has top-k 5: the buffers hold 4",
    "three_dims": "x_TD has 3 dimensions: it must have 2, [rows, hidden]",
    "float64": "x_TD is torch.float64: bfloat16 and float32 travel",
    "meta": "x_TD is on meta: dispatcher native_host takes cpu tensors",
    "meta_ids": "ids_TK is on meta: dispatcher native_host takes cpu tensors",
    "meta_weights": "weights_TK is on meta: dispatcher native_host takes cpu tensors",
    "tokens": "ids_TK is torch.int64 [8, 4]: it must be int64 [9, top-k]",
    "weights": "weights_TK is torch.float32 [9, 3]: it must be float32 [9, 4]",
    "no_ids": "a dispatch without a handle needs ids_TK and weights_TK",
    "cached": "x_TD has 8 rows: the handle is of 9 tokens",
    "rows": "rows_RD has ",
    "row_weights": "weights_R is torch.float32 [3]: use float32 [",
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_refusal_ends_all(how: str) -> None:
    lines = failures(how)
    own = lines.pop(1)
    assert own is not None and own.startswith(f"rank 1: {REFUSED[how]}")
    for line in lines:
        assert line is not None and line.endswith("stopped with all others, because rank 1: refused its arguments")


class Stopped:
    """A library that notes that all ranks were told to stop."""

    calls = 0

    def ep_stop(self, handle: int) -> None:
        self.calls += 1


def test_cpu_tensors_are_refused_by_native() -> None:
    """Without a GPU: the dispatcher's own checks, its machine a stand-in; all other ranks are stopped too."""
    dispatcher, library = NativeGpuDispatcher.__new__(NativeGpuDispatcher), Stopped()
    KernelDispatcher.__init__(dispatcher, geometry=GEOMETRY, config=NativeConfig(), rank=2, names=[8, 9, 10, 11])
    dispatcher.machine = Machine(library, 0, checked_shape(GEOMETRY, NativeConfig(), channels=2))  # type: ignore[arg-type]
    x, ids, weights = inputs(2, "")
    with pytest.raises(NativeError, match=r"^rank 10: x_TD is on cpu: dispatcher native takes cuda tensors$"):
        dispatcher.dispatch(x, ids, weights)
    with pytest.raises(NativeError, match=r"^rank 10: rows_RD is on cpu: dispatcher native takes cuda tensors$"):
        dispatcher.combine(x, None)  # type: ignore[arg-type]
    assert library.calls == 2


# Found by the kernels: what the rank that found it says, what the others say.
FOUND = {
    "hidden": ("bytes per row is", "bytes per row"),
    "top_k": ("top-k of ids_TK is", "top-k of ids_TK differs"),
    "dtype": ("bytes per row is", "bytes per row differs"),
    "id": ("rank 1: ids_TK holds 8: experts go from 0 to 7", "rank 1: ids_TK holds out of range: experts"),
    "negative_id": ("rank 1: ids_TK holds -2: experts go from 0 to 7", "rank 1: ids_TK holds out of range"),
    "combine_width": ("bytes per row is", "bytes per row differs"),
    "late": ("channel 0: nothing from rank 1 in 2 s (0 of ", "nothing from rank 1"),
    "late_combine": ("nothing from rank 1 in 2 s (", "nothing from rank 1 in 2 s"),
}


@pytest.mark.parametrize("how", FOUND)
def test_what_the_kernels_find_ends_all(how: str) -> None:
    lines = [line for line in failures(how) if line is not None]
    assert len(lines) == (3 if how.startswith("late") else 4)
    finder = [line for line in lines if "stopped with all others" not in line]
    assert finder and all(FOUND[how][0] in line for line in finder)  # two may find a disagreement at once
    for line in lines:
        assert FOUND[how][1] in line or line in finder
        assert line.startswith("rank ") and "\n" not in line


def test_dead_network_is_named_by_role_and_channel() -> None:
    """Rank 1's network stops after the notify stage and two messages."""
    config, dead = NativeConfig(timeout_seconds=TIMEOUT), NativeConfig(timeout_seconds=TIMEOUT, dead_after=4)
    window = Window.in_process(bind_host().ep_window_bytes(checked_shape(GEOMETRY, config, channels=2)) * 4)
    dispatchers = [
        NativeHostDispatcher(window, geometry=GEOMETRY, config=dead if rank == 1 else config, rank=rank)
        for rank in range(4)
    ]
    lines = [line for line in failures("dead", dispatchers) if line is not None]
    finder = [line for line in lines if "stopped with all others" not in line]
    assert len(lines) == 4 and finder
    for line in finder:
        assert "dispatch" in line and ", channel " in line and "items so far" in line


@pytest.mark.parametrize(("change", "words"), [
    ({"num_nodes": 3}, "3 nodes do not divide 4 ranks"),
    ({"num_experts": 6}, "4 ranks do not fit 6 experts"),
    ({"top_k": 33}, "top_k=33: from 1 to 32"),
    ({"num_ranks": 66, "num_nodes": 66, "num_experts": 66}, "more than 32 nodes"),
])  # fmt: skip
def test_sizes_that_do_not_fit(change: dict[str, int], words: str) -> None:
    with pytest.raises(NativeError, match=words):
        checked_shape(Geometry(**(vars(GEOMETRY) | change)), NativeConfig(), channels=2)
