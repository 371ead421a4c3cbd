"""Less kept around Transformer Engine, on the stand-in: same gradients, inputs computed again, gradients' rows gone."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model.dropping import project
from model.fp8.lean_engine import ColumnsOnly, LeanEngineLinear
from model.fp8.transformer_engine import TransformerEngineLinear
from model.linear import GroupedLinear, Linear
from model.weight_grad import main_grad
from tests.model.fp8.test_transformer_engine import STAND, StandGrouped, StandLinear


class Store:
    """As `WeightGradStore`."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def put(self, tensor_list: list[Any], func: Any) -> None:
        self.held.append((tensor_list, func))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Any:
    for kind in (StandLinear, StandGrouped):
        monkeypatch.setattr(kind, "wgrad_store", Store(), raising=False)
        monkeypatch.setattr(kind, "save_original_input", False, raising=False)
    return STAND


def lean(linear: Linear | GroupedLinear, stand: Any, *, shares_input: bool = False) -> LeanEngineLinear:
    plain = TransformerEngineLinear(stand, "recipe", linear.weight)
    return LeanEngineLinear.instead_of(plain, linear.weight, shares_input=shares_input)


def linears() -> tuple[Linear, Linear]:
    pair = Linear(48, 32), Linear(48, 32)
    nn.init.normal_(pair[0].weight)
    pair[1].weight.data = pair[0].weight.data.clone()
    return pair


@pytest.mark.parametrize("shares_input", [False, True])
@pytest.mark.parametrize("rows", [128, 200])
def test_gradients_are_those_of_the_plain_layer(stand: Any, rows: int, shares_input: bool) -> None:
    plain, ours = linears()
    engine = ours.fp8 = lean(ours, stand, shares_input=shares_input)
    x, y = (torch.randn(rows, 48, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    plain(x).sum().backward()
    ours(y).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(main_grad(ours.weight), main_grad(plain.weight))
    assert engine.module.save_original_input is (rows == 128 and shares_input)  # rows filled up are a copy


@pytest.mark.parametrize("counts", [None, (128, 0, 128), (70, 0, 130)])
@pytest.mark.parametrize("rows", [256, 200])
def test_an_input_that_comes_again_is_not_kept(stand: Any, rows: int, counts: tuple[int, ...] | None) -> None:
    if counts and sum(counts) != rows:
        return
    plain, ours = linears() if counts is None else (GroupedLinear(3, 48, 32), GroupedLinear(3, 48, 32))
    plain.weight.data.normal_()
    ours.weight.data.copy_(plain.weight.data)
    engine = ours.fp8 = lean(ours, stand)
    x = torch.randn(rows, 48, requires_grad=True)
    doubled, kept, calls = x * 2.0, x.detach(), []

    def again() -> torch.Tensor:
        calls.append(1)
        return kept * 2.0

    out = project(ours, doubled, again, counts)
    seen = weakref.ref(doubled.untyped_storage())
    del doubled
    gc.collect()
    assert seen() is None and not calls and engine.module.save_original_input
    out.sum().backward()
    project(plain, 2.0 * kept, None, counts).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(main_grad(ours.weight), main_grad(plain.weight))


class Rounded(SimpleNamespace):
    """As TE's blockwise tensor: either orientation may be dropped."""

    def update_usage(self, *, rowwise_usage: bool, columnwise_usage: bool) -> None:
        assert not rowwise_usage and columnwise_usage and self._columnwise_data is not None
        self._rowwise_data = None


def test_only_columns_of_a_gradient_wait() -> None:
    inner = Store()
    store = ColumnsOnly(inner)
    both, columns = Rounded(_rowwise_data=1, _columnwise_data=2), Rounded(_rowwise_data=None, _columnwise_data=3)
    wide, grads = torch.zeros(2), [Rounded(_rowwise_data=4, _columnwise_data=5)]
    store.put([both, [columns], grads, wide], "product")
    assert (both._rowwise_data, both._columnwise_data, columns._columnwise_data) == (None, 2, 3)
    assert grads[0]._rowwise_data is None
    assert store.held == inner.held == [([both, [columns], grads, wide], "product")]
