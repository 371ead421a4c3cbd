"""The DeepEP adapter over a stand-in with DeepEP's signatures: the same rows as the flat all-to-all, forth and back."""

import importlib
import sys
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert import deepep
from parallel.expert.deepep import DeepEPDispatcher, DeepEPError, checked_library, find_library
from parallel.expert.flat import FlatDispatcher
from tests.distributed import run_distributed
from tests.parallel.expert import fake_deepep

HIDDEN, EXPERTS, TOP_K, MAX_TOKENS = 256, 8, 3, 9
NCCL = (2, 30, 4)
# Tokens by rank, and how they choose.
CASES = {
    "uneven": ((9, 4), "random"),
    "none_on_one": ((6, 0), "random"),
    "none_at_all": ((0, 0), "random"),
    "all_to_the_first": ((5, 3), "first"),
    "unused_slots": ((6, 5), "unused"),
}


def inputs(case: str, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D] and the gradient of the output, small whole numbers (sums of them are exact in BF16); ids, weights."""
    counts, how = CASES[case]
    num_tokens = counts[rank % len(counts)]
    generator = torch.Generator().manual_seed(100 * rank + len(case))
    x, grad = torch.randint(-4, 5, (2, num_tokens, HIDDEN), generator=generator).bfloat16()
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    if how == "unused":
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
        ids[0] = -1
    elif how == "first":
        ids = torch.arange(TOP_K).repeat(num_tokens, 1)
    return x, ids, torch.rand(ids.shape, generator=generator), grad


def round_trip(dispatcher: Any, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> dict[str, Any]:
    arrived = dispatcher.dispatch(x, ids, weights).wait()
    out = dispatcher.combine(arrived.rows_RD, arrived.handle).wait()
    again = dispatcher.dispatch(grad, handle=arrived.handle).wait()
    back = dispatcher.combine(again.rows_RD, arrived.handle, arrived.weights_R).wait()
    assert out.weights_TK is None
    return {
        "rows": arrived.rows_RD, "weights": arrived.weights_R, "counts": arrived.counts, "sum": out.sum_TD,
        "grad_rows": again.rows_RD, "grad": back.sum_TD, "returned": back.weights_TK,
    }  # fmt: skip


def one_rank(generation: int, wire: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group: Any = dist.group.WORLD
    library = checked_library(fake_deepep.library(generation), nccl=NCCL)
    assert library.generation == generation
    dispatcher = DeepEPDispatcher(
        group, EXPERTS, hidden=HIDDEN, max_tokens=MAX_TOKENS, top_k=TOP_K, num_sms=20, wire=wire, gradient_wire=wire,
        library=library, device="cpu",
    )  # fmt: skip
    flat = FlatDispatcher(group, EXPERTS)
    results = {}
    for case in CASES:
        given = inputs(case, dist.get_rank())
        results[case] = round_trip(dispatcher, *given), round_trip(flat, *given)
    dispatcher.close()
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize(("generation", "wire", "ranks"), [(1, "bf16", 4), (2, "fp8", 2)])
def test_the_same_as_the_flat_all_to_all(generation: int, wire: str, ranks: int) -> None:
    for results in run_distributed(ranks, one_rank, generation, wire):
        for case, (found, expected) in results.items():
            for name, value in expected.items():
                if isinstance(value, Tensor):
                    assert torch.equal(found[name], value), (case, name)
                else:
                    assert found[name] == value, (case, name)


def one_error() -> list[str]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    library, group = checked_library(fake_deepep.library(2), nccl=NCCL), dist.group.WORLD
    deepep.V1_GROUP_SIZES = (4, 8)  # in this process alone: one of 2 ranks is refused

    def build(**changes: Any) -> DeepEPDispatcher:
        arguments: dict[str, Any] = {
            "hidden": HIDDEN, "max_tokens": MAX_TOKENS, "top_k": TOP_K, "num_sms": 20, "library": library,
            "device": "cpu", "num_experts": EXPERTS,
        }  # fmt: skip
        return DeepEPDispatcher(group, **(arguments | changes))  # pyright: ignore[reportArgumentType]

    x, ids, weights, _ = inputs("uneven", dist.get_rank())
    dispatcher = build()
    handle = dispatcher.dispatch(x, ids, weights).wait().handle
    calls = [
        lambda: build(num_experts=7),
        lambda: build(num_sms=21),
        lambda: build(wire="fp4"),
        lambda: build(wire="fp8", hidden=100),
        lambda: build(library=checked_library(fake_deepep.library(1), nccl=None)),
        lambda: dispatcher.dispatch(x),
        lambda: dispatcher.dispatch(x.float(), ids, weights),
        lambda: dispatcher.dispatch(x, ids[:, :2], weights[:, :2]),
        lambda: dispatcher.dispatch(x, ids + 1, weights),
        lambda: dispatcher.dispatch(x, ids, weights.bfloat16()),
        lambda: dispatcher.dispatch(x.repeat(3, 1), ids.repeat(3, 1), weights.repeat(3, 1)),
        lambda: dispatcher.dispatch(x[1:], handle=handle),
        lambda: dispatcher.combine(x.new_zeros(1, HIDDEN), handle),
        lambda: build(device="cuda").dispatch(x, ids, weights),
    ]
    messages = []
    for call in calls:
        with pytest.raises(DeepEPError) as caught:
            call()
        messages.append(str(caught.value))
    dist.destroy_process_group()
    return messages


def test_mistakes_name_the_rank_and_what_would_work() -> None:
    messages = run_distributed(2, one_error)[0]
    words = [
        "2 ranks do not divide 7 experts",
        "num_sms=21 must be even",
        "wire=fp4: use bf16 or fp8",
        "a hidden size that 128 divides, not 100",
        "V1 has no configuration for 2 ranks; it has for 4, 8",
        "needs ids_TK and weights_TK",
        "x_TD is float32 [9, 256]: needs bfloat16 [9, 256]",
        "ids_TK [9, 2], weights_TK [9, 2]: needs [9, top_k=3] each",
        "expert id 8: ids go from -1 (unused) to 7",
        "weights_TK is torch.bfloat16",
        "27 tokens; buffers were made for max_tokens=9",
        "x_TD is bfloat16 [8, 256]: needs bfloat16 [9, 256]",
        "rows_RD is bfloat16 [1, 256]: needs bfloat16 [",
        "x_TD is on cpu: DeepEP takes tensors on cuda",
    ]
    for message, expected in zip(messages, words, strict=True):
        assert message.startswith("deepep, rank 0: ") and expected in message, message


def test_without_deepep_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(DeepEPError, match=r"deep_ep is not installed; build it .* NCCL 2\.30\.4 or newer"):
        find_library()


@pytest.mark.parametrize("error", [ImportError("undefined symbol: ncclTeamRail"), AssertionError("Duplicate NCCL")])
def test_a_deepep_that_does_not_load_names_nccl(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(deepep, "nccl_version", lambda: (2, 29, 7))
    with pytest.raises(DeepEPError, match=rf"does not load \({error}\); V2 needs NCCL 2\.30\.4 .* torch has 2\.29\.7"):
        find_library()


def test_nccl_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 31, 2))
    assert deepep.nccl_version() == (2, 31, 2)


def test_versions() -> None:
    assert checked_library(fake_deepep.library(1), nccl=None).generation == 1  # V1 does not use NCCL
    assert checked_library(fake_deepep.library(2), nccl=(2, 31, 0)).generation == 2
    for nccl, shown in [((2, 30, 3), "2.30.3"), (None, "none"), ((2, 9, 9), "2.9.9")]:
        with pytest.raises(DeepEPError, match=rf"deep_ep 2\.1\.0 needs NCCL 2\.30\.4 or newer, torch has {shown}"):
            checked_library(fake_deepep.library(2), nccl=nccl)
    with pytest.raises(DeepEPError, match="another project's package"):
        checked_library(ModuleType("deep_ep"), nccl=NCCL)


def test_a_moved_signature_is_refused() -> None:
    class Moved(fake_deepep.ElasticBuffer):
        def combine(self, x: Tensor, handle: Any) -> None: ...  # type: ignore[override]

    module = fake_deepep.library(2)
    module.ElasticBuffer = Moved  # type: ignore[attr-defined]
    with pytest.raises(DeepEPError, match=r"Moved.combine of deep_ep 2\.1\.0 lacks async_with_compute_stream, num_sms"):
        checked_library(module, nccl=NCCL)
