"""Weights that ranks hold in FP8 alone: on every rank the bytes of the whole masters' rounding, however cut."""

from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.fp8.formats import AMAX_FLOOR, QuantisedTensor, Scales, Tile
from model.fp8.quantise import Quantiser
from model.fp8.watch import TensorStats, tensor_stats
from model.fp8.weights import WeightBlocks
from model.weight_grad import accumulate
from parallel.bucket import LocalParameter
from parallel.rounded_bucket import RoundedBucket
from parallel.zero1 import Zero1
from tests.distributed import run_distributed

# Shards cut rows, blocks and matrices; `norm` and `router` are in no blocks.
SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (130, 200), "norm.weight": (5,), "b.weight": (3, 129), "experts.weight": (2, 140, 11),
    "router.weight": (4, 9),
}  # fmt: skip
ROUNDED = ("a.weight", "b.weight", "experts.weight")
STEPS = 2


def blocks_of(name: str, scales: Scales) -> WeightBlocks | None:
    return WeightBlocks(SHAPES[name], Quantiser(Tile.BLOCK, scales, AMAX_FLOOR)) if name in ROUNDED else None


def initial(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(SHAPES[name], generator=generator) * torch.randn(SHAPES[name], generator=generator).exp()


def gradient(name: str, rank: int, step: int) -> torch.Tensor:
    """Whole numbers, so that sums in any order are exact."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + sum(map(ord, name)))
    return torch.randint(-9, 9, SHAPES[name], generator=generator).float()


def masters(num_ranks: int, name: str, num_steps: int) -> torch.Tensor:
    """Of a plain run: the weights as they were given, never rounded."""
    master = initial(name)
    for step in range(num_steps):
        master.sub_(torch.stack([gradient(name, r, step) for r in range(num_ranks)]).sum(0), alpha=2**-6)
    return master


def copied(zero: Zero1) -> dict[str, QuantisedTensor]:
    """With their values as bytes, which go from process to process."""
    return {
        name: replace(tensor, values=tensor.values.view(torch.uint8).clone(), scales=tensor.scales.clone())
        for name, tensor in zero.rounded_weights().items()
    }


def one_rank(scales: Scales, offload: bool = False) -> dict[int, Any]:
    """What three ranks, and the first two of them, held after each update, and the figures of their weights."""
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", timeout=timeout)
    two = dist.new_group([0, 1], timeout=timeout)
    results = {3: steps(dist.group.WORLD, scales, 8 << 10, offload)}
    if dist.get_rank() < 2:
        results[2] = steps(two, scales, 1 << 30, offload)
    dist.destroy_process_group()
    return results


def steps(group: Any, scales: Scales, bucket_bytes: int, offload: bool) -> dict[str, Any]:
    rank = dist.get_rank(group)
    weights = {name: nn.Parameter(initial(name)) for name in SHAPES}
    parameters = [
        LocalParameter(name, weight, SHAPES[name], 0, group, weight.ndim > 1, blocks_of(name, scales))
        for name, weight in weights.items()
    ]
    zero = Zero1(parameters, dtype=torch.bfloat16, bucket_bytes=bucket_bytes, offload=offload)
    held, where = [copied(zero)], {name: t.values.data_ptr() for name, t in zero.rounded_weights().items()}
    for step in range(STEPS):
        for name, weight in weights.items():
            accumulate(weight, partial(torch.Tensor.add_, other=gradient(name, rank, step)))
        zero.reduce_gradients()
        for bucket in zero.buckets:
            bucket.master.sub_(bucket.grad, alpha=2**-6)
        zero.publish_weights()
        zero.zero_gradients()
        held.append(copied(zero))
    assert where == {name: t.values.data_ptr() for name, t in zero.rounded_weights().items()}
    for name, weight in weights.items():  # nothing wide is left of them
        if name in ROUNDED:
            assert weight.isnan().all() and weight.shape == SHAPES[name] and weight.untyped_storage().nbytes() == 2
    with pytest.raises(TypeError, match="primary_weights=bf16"):
        next(b for b in zero.buckets if isinstance(b, RoundedBucket)).lay_weights(torch.zeros(1))
    wide = {name: weight.detach().clone() for name, weight in weights.items() if name not in ROUNDED}
    return {"held": held, "wide": wide, "stats": zero.weight_stats(), "buckets": len(zero.buckets)}


@pytest.fixture(scope="module", params=[Scales.POWER_OF_TWO, Scales.FP32])
def ranks(request: pytest.FixtureRequest) -> tuple[Scales, list[dict[int, Any]]]:
    return request.param, run_distributed(3, one_rank, request.param)


@pytest.mark.parametrize("number", [2, 3])
def test_bytes_are_those_of_the_whole_masters(ranks: Any, number: int) -> None:
    scales, results = ranks
    for rank in range(number):
        found = results[rank][number]
        for step, held in enumerate(found["held"]):
            assert set(held) == set(ROUNDED)
            for name, tensor in held.items():
                blocks = blocks_of(name, scales)
                assert blocks is not None
                expected = blocks.quantise(masters(number, name, step))
                assert torch.equal(tensor.values, expected.values.view(torch.uint8)), (name, step)
                assert torch.equal(tensor.scales, expected.scales) and tensor.shape == SHAPES[name]
        for name, weight in found["wide"].items():
            assert torch.equal(weight, masters(number, name, STEPS).bfloat16()), name
    assert results[0][3]["buckets"] > results[0][2]["buckets"] == 3  # wide matrices, vectors, those in blocks


@pytest.mark.parametrize("number", [2, 3])
def test_figures_are_of_whole_weights_on_every_rank(ranks: Any, number: int) -> None:
    scales, results = ranks
    for rank in range(number):
        found: dict[str, TensorStats] = {row.layer: row for row in results[rank][number]["stats"]}
        assert set(found) == {name.removesuffix(".weight") for name in ROUNDED}
        for name in ROUNDED:
            blocks, master = blocks_of(name, scales), masters(number, name, STEPS)
            assert blocks is not None
            expected = tensor_stats(name.removesuffix(".weight"), "weight", master, blocks.quantise(master))
            for field, value in vars(expected).items():
                same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                assert getattr(found[expected.layer], field) == same, (name, field)


def test_masters_in_host_memory_are_rounded_to_the_same() -> None:
    plain, offloaded = (run_distributed(3, one_rank, Scales.POWER_OF_TWO, on)[2] for on in (False, True))
    for one, other in zip(plain[3]["held"], offloaded[3]["held"], strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor.values, other[name].values)
