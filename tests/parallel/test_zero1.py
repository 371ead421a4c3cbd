"""Shards: every element on one rank, sums and gathered weights equal to the plain ones, on gloo processes."""

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.weight_grad import accumulate
from parallel.bucket import ALIGN_ELEMENTS, LocalParameter
from parallel.zero1 import Zero1
from tests.distributed import run_distributed

# Odd sizes, one larger than a shard, one of a single element; vectors are not decayed.
SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (7, 13), "a.norm": (5,), "b.weight": (3, 129), "b.norm": (1,),
    "c.weight": (2, 3, 11), "d.weight": (1, 1),
}  # fmt: skip
STEPS = 2


def initial(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(SHAPES[name], generator=generator)


def gradient(name: str, rank: int, step: int) -> torch.Tensor:
    """Whole numbers, so that sums in any order are exact."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + sum(map(ord, name)))
    return torch.randint(-9, 9, SHAPES[name], generator=generator).float()


def one_rank() -> dict[str, Any]:
    """What each case gave: three ranks, and the first two of them."""
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", timeout=timeout)
    two = dist.new_group([0, 1], timeout=timeout)
    results = {"bf16x3": steps(dist.group.WORLD, torch.bfloat16, 600)}
    if dist.get_rank() < 2:
        results["fp32x2"] = steps(two, torch.float32, 1 << 30)
    dist.destroy_process_group()
    return results


def steps(group: Any, dtype: torch.dtype, bucket_bytes: int) -> dict[str, Any]:
    """Two steps of `master -= gradient`, and what the rank held on the way."""
    rank = dist.get_rank(group)
    weights = {name: nn.Parameter(initial(name).to(dtype)) for name in SHAPES}
    parameters = [
        LocalParameter(name, weight, SHAPES[name], 0, group, decay=weight.ndim > 1) for name, weight in weights.items()
    ]
    zero = Zero1(parameters, dtype=dtype, bucket_bytes=bucket_bytes)
    result: dict[str, Any] = {"weights": [], "grads": [], "masters": [], "pieces": [], "buckets": []}
    for step in range(STEPS):
        for name, weight in weights.items():
            accumulate(weight, partial(torch.Tensor.add_, other=gradient(name, rank, step)))
        zero.reduce_gradients()
        found = {}
        for bucket in zero.buckets:
            for piece in bucket.pieces():
                found[piece.name, piece.offset] = bucket.grad[piece.start : piece.stop].clone()
            bucket.master.sub_(bucket.grad, alpha=2**-10)
        zero.publish_weights()
        zero.zero_gradients()
        for bucket in zero.buckets:
            if step < STEPS - 1:
                bucket.grads.copy_(torch.where(bucket.grads != 0, float("nan"), 0.0))  # forgotten: nobody may read it
        result["grads"].append(found)
        result["weights"].append({name: weight.detach().clone() for name, weight in weights.items()})
    for bucket in zero.buckets:
        assert bucket.master.dtype == bucket.grads.dtype == torch.float32 and bucket.weights.dtype == dtype
        assert bucket.shard.start % ALIGN_ELEMENTS == 0 and len(bucket.master) % ALIGN_ELEMENTS == 0
        result["buckets"].append(([p.name for p in bucket.parameters], bucket.decay))
        for piece in bucket.pieces():
            assert piece.shape == SHAPES[piece.name]
            result["pieces"].append((piece.name, piece.offset, piece.stop - piece.start))
            result["masters"].append((piece.name, piece.offset, bucket.master[piece.start : piece.stop].clone()))
    return result


@pytest.fixture(scope="module")
def everything() -> list[dict[str, Any]]:
    return run_distributed(3, one_rank)


@pytest.fixture(params=["fp32x2", "bf16x3"])
def ranks(request: pytest.FixtureRequest, everything: Any) -> tuple[list[dict[str, Any]], torch.dtype]:
    results = [result[request.param] for result in everything if request.param in result]
    assert len(results) == int(request.param[-1])
    return results, torch.float32 if request.param == "fp32x2" else torch.bfloat16


def test_pieces_tile_every_parameter_exactly_once(ranks: Any) -> None:
    for name, shape in SHAPES.items():
        end = 0
        for _, offset, length in sorted(piece for rank in ranks[0] for piece in rank["pieces"] if piece[0] == name):
            assert offset == end, name
            end += length
        assert end == torch.Size(shape).numel(), name


def test_each_shard_gets_the_sum_over_ranks(ranks: Any) -> None:
    results, _ = ranks
    for step in range(STEPS):
        for rank in results:
            for (name, offset), grad in rank["grads"][step].items():
                total = torch.stack([gradient(name, r, step) for r in range(len(results))]).sum(0).flatten()
                assert torch.equal(grad, total[offset : offset + len(grad)]), name


def masters(num_ranks: int, dtype: torch.dtype, name: str, num_steps: int) -> torch.Tensor:
    """FP32 masters of a plain run; in BF16 they start from the rounded weights and keep what rounding drops."""
    master = initial(name).to(dtype).float()
    for step in range(num_steps):
        master.sub_(torch.stack([gradient(name, r, step) for r in range(num_ranks)]).sum(0), alpha=2**-10)
    return master


def test_every_rank_gets_all_weights_rounded_from_the_masters(ranks: Any) -> None:
    results, dtype = ranks
    for step in range(STEPS):
        for name in SHAPES:
            expected = masters(len(results), dtype, name, step + 1).to(dtype)
            for rank in results:
                assert torch.equal(rank["weights"][step][name], expected), name


def test_masters_are_never_rounded(ranks: Any) -> None:
    results, dtype = ranks
    rounded = 0
    for rank in results:
        for name, offset, master in rank["masters"]:
            expected = masters(len(results), dtype, name, STEPS).flatten()[offset : offset + len(master)]
            assert torch.equal(master, expected), name
            rounded += int((master.to(dtype).float() != master).sum())
    assert (rounded > 0) == (dtype == torch.bfloat16)


def test_buckets_keep_decay_apart_and_their_size(ranks: Any) -> None:
    results, dtype = ranks
    names = [name for names, _ in results[0]["buckets"] for name in names]
    assert sorted(names) == sorted(SHAPES)
    assert all(rank["buckets"] == results[0]["buckets"] for rank in results)
    for names, decay in results[0]["buckets"]:
        assert {len(SHAPES[name]) > 1 for name in names} == {decay}
        if dtype == torch.bfloat16:  # at most 600 bytes of FP32, unless a single one is larger
            sizes = [4 * torch.Size(SHAPES[name]).numel() for name in names]
            assert sum(sizes) <= 600 or len(sizes) == 1
    assert len(results[0]["buckets"]) == (2 if dtype == torch.float32 else 4)
