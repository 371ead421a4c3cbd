"""Items spread over threads: each once, errors raised, torch's threads and the modes of the caller as before."""

import threading
from collections.abc import Iterator

import pytest
import torch

from model.linear import add_grouped_product, grouped_product
from model.threads import spread


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_item_once_on_two_threads_with_one_of_torchs_each() -> None:
    drawn: list[int] = []
    inside: list[tuple[int, bool]] = []
    meeting = threading.Barrier(2, timeout=10)

    def work(items: Iterator[int]) -> None:
        meeting.wait()  # fails unless two calls run at the same time
        inside.append((torch.get_num_threads(), torch.is_grad_enabled()))
        drawn.extend(items)

    spread(work, range(100))
    assert sorted(drawn) == list(range(100))
    assert inside == [(1, False)] * 2
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("in_worker", [True, False])
def test_error_of_either_thread_is_raised_and_threads_are_restored(in_worker: bool) -> None:
    main, meeting = threading.get_ident(), threading.Barrier(2, timeout=10)

    def work(items: Iterator[int]) -> None:
        meeting.wait()
        if (threading.get_ident() != main) == in_worker:
            raise ValueError("broken")
        list(items)

    with pytest.raises(ValueError, match="broken"):
        spread(work, range(4))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_those_of_one_thread(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = (70, 0, 3, 128, 9)
    x, grad, weight = torch.randn(210, 32).to(dtype), torch.randn(210, 48).to(dtype), torch.randn(5, 32, 48).to(dtype)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        acc = torch.ones(5, 48, 32)
        add_grouped_product(acc, grad, x, counts)
        results.append((grouped_product(x, weight, counts), acc))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
