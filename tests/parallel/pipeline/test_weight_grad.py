"""Weight gradients put off to a later action equal those computed at once, bitwise."""

import pytest
import torch
from torch import Tensor

from model.transformer import Microbatch, StageLoss, Transformer
from model.weight_grad import set_sink
from parallel.pipeline.weight_grad import DeferredSink
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
    for seed in (1, 2):
        loss(plain, seed).backward()
        with sink.deferring(0, seed):
            loss(split, seed).backward()
    assert not any(grad.any() for grad in gradients(split).values())
    for seed in (1, 2):
        sink.flush(0, seed)
    theirs, ours = gradients(plain), gradients(split)
    for name, grad in theirs.items():
        assert grad.any(), name
        assert torch.equal(ours[name], grad), name


def test_outside_deferring_gradients_are_immediate() -> None:
    plain, other, sink = build(TINY), build(TINY), DeferredSink()
    set_sink(other, sink)
    loss(plain, 1).backward()
    loss(other, 1).backward()
    assert sink.num_waiting == 0
    assert all(torch.equal(gradients(other)[name], grad) for name, grad in gradients(plain).items())


def test_a_flush_runs_its_own_micro_batch_and_frees_it() -> None:
    sink, weight, ran = DeferredSink(), torch.zeros(1, requires_grad=True), list[int]()
    for number in (3, 4):
        with sink.deferring(1, number):
            sink.put(weight, lambda acc, number=number: ran.append(number))
    assert sink.num_waiting == 2 and not ran
    sink.flush(1, 4)
    assert sink.num_waiting == 1 and ran == [4]
    with pytest.raises(KeyError):
        sink.flush(1, 4)
    sink.flush(1, 3)
    assert sink.num_waiting == 0 and ran == [4, 3]


def test_two_actions_cannot_defer_at_once() -> None:
    sink = DeferredSink()
    with sink.deferring(0, 0), pytest.raises(AssertionError, match="one action at a time"), sink.deferring(0, 1):
        pass


def test_a_frozen_weight_is_not_queued() -> None:
    sink = DeferredSink()
    with sink.deferring(0, 0):
        sink.put(torch.zeros(1), lambda acc: pytest.fail("never"))
    sink.flush(0, 0)
