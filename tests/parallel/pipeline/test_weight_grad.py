"""Weight gradients put off to a later action equal those computed at once, bitwise."""

import pytest
import torch
from torch import Tensor

from model.transformer import Microbatch, StageLoss, Transformer
from model.weight_grad import set_sink
from parallel.pipeline.weight_grad import Contributions, DeferredSink
from tests.model.reference import TINY, build


def loss(model: Transformer, seed: int) -> Tensor:
    tokens = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
    result = model(None, Microbatch(tokens, share=0.5))
    assert isinstance(result, StageLoss)
    return result.loss


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: getattr(weight, "main_grad", torch.zeros(0)).clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferred_gradients_equal_immediate_ones_bitwise(dtype: torch.dtype) -> None:
    """Two micro-batches whose backwards both run before either weight gradient."""
    plain, split, sink = build(TINY), build(TINY), DeferredSink()
    for model in (plain, split):
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    set_sink(split, sink)
    put_off: dict[int, Contributions] = {1: [], 2: []}
    for seed in (1, 2):
        loss(plain, seed).backward()
        with sink.collecting(put_off[seed]):
            loss(split, seed).backward()
    assert not any(grad.any() for grad in gradients(split).values())
    for seed in (1, 2):
        sink.run(put_off[seed])
    assert not any(put_off.values())
    theirs, ours = gradients(plain), gradients(split)
    for name, grad in theirs.items():
        assert grad.any(), name
        assert torch.equal(ours[name], grad), name


def test_outside_collecting_gradients_are_immediate() -> None:
    plain, other, sink = build(TINY), build(TINY), DeferredSink()
    set_sink(other, sink)
    loss(plain, 1).backward()
    loss(other, 1).backward()
    assert all(torch.equal(gradients(other)[name], grad) for name, grad in gradients(plain).items())


def test_contributions_run_in_their_order_and_are_freed() -> None:
    sink, weight, ran = DeferredSink(), torch.zeros(1, requires_grad=True), list[int]()
    put_off: Contributions = []
    with sink.collecting(put_off):
        for number in (3, 4, 5):
            sink.put(weight, lambda acc, number=number: ran.append(number))
    assert len(put_off) == 3 and not ran
    sink.run(put_off)
    assert not put_off and ran == [3, 4, 5]


def test_two_backwards_cannot_collect_at_once() -> None:
    sink = DeferredSink()
    with sink.collecting([]), pytest.raises(AssertionError, match="one backward at a time"), sink.collecting([]):
        pass


def test_a_frozen_weight_is_not_queued() -> None:
    sink, put_off = DeferredSink(), []
    with sink.collecting(put_off):
        sink.put(torch.zeros(1), lambda acc: pytest.fail("never"))
    assert not put_off
