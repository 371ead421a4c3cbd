"""Transformer Engine's linears where less is kept: the same products, other tensors saved and held.

Left to itself it keeps its own rounded copy of every input, one byte a number, beside what our layers keep anyway, and
a weight gradient that waits holds the output's gradient rounded both ways. Here an input that `model.dropping` computes
again, or that the attention kernel keeps, is saved as it came (`save_original_input`) and rounded in the backward; of
the gradient that waits only the columns stay; and filling up keeps nothing of the rows. Nothing here has run on a GPU:
the attributes used are those of the sources in the pinned wheel, the logic is tested on a stand-in.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from model.dropping import Again, Dropped, dropping
from model.fp8.formats import TILE_SIZE
from model.fp8.transformer_engine import TransformerEngineLinear
from model.weight_grad import WeightGradSink


class ColumnsOnly:
    """Transformer Engine's store of put-off weight gradients; drops what only the input's gradient read."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, tensor_list: list[Any], func: Any) -> None:
        """See `WeightGradStore.put`; the input's gradient is computed by now."""
        for tensor in _flat(tensor_list):
            if (
                getattr(tensor, "_rowwise_data", None) is not None
                and getattr(tensor, "_columnwise_data", None) is not None
            ):
                tensor.update_usage(rowwise_usage=False, columnwise_usage=True)
        self._store.put(tensor_list, func)


def _flat(tensors: list[Any]) -> Iterator[Any]:
    for tensor in tensors:
        if isinstance(tensor, list | tuple):
            yield from tensor
        else:
            yield tensor


class _FillUp(torch.autograd.Function):
    """Rows x_RI at `index` of so many rows of zeros; keeps the index alone."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return _filled(x_RI, index, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grads[0].index_select(0, index), None, None


def _filled(x_RI: Tensor, index: Tensor | None, num_rows: int) -> Tensor:
    return x_RI if index is None else x_RI.new_zeros(num_rows, x_RI.shape[1]).index_copy_(0, index, x_RI)


class LeanEngineLinear(TransformerEngineLinear):
    """The adapter with its store and its saved input changed.

    shares_input: the input is a tensor that is kept anyway, as what an attention kernel gives; but rows that have to be
    filled up are a copy which nobody else has, of which Transformer Engine keeps its rounded columns.
    """

    def __init__(
        self, te: Any, recipe: Any, weight: nn.Parameter, *, rounded: bool = False, shares_input: bool = False
    ) -> None:
        super().__init__(te, recipe, weight, rounded=rounded)
        self._shares_input = shares_input
        self.module.wgrad_store = ColumnsOnly(self.module.wgrad_store)

    @classmethod
    def instead_of(
        cls, plain: TransformerEngineLinear, weight: nn.Parameter, *, shares_input: bool = False
    ) -> "LeanEngineLinear":
        """The same layer, keeping less; before it has computed anything."""
        lean = cls(plain._te, plain._recipe, weight, rounded=plain._rounded, shares_input=shares_input)
        if plain._given is not None:
            lean.take_weight(plain._given)
        return lean

    def __call__(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None = None
    ) -> Tensor:
        """See `model.linear.FP8Call`."""
        return self._product(x, weight, sink, counts, None)

    def call_again(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None, again: Again
    ) -> Tensor:
        """See `FP8Layer.call_again`."""
        return self._product(x, weight, sink, counts, again)

    def _product(
        self, x: Tensor, weight: Tensor, sink: WeightGradSink, counts: tuple[int, ...] | None, again: Again | None
    ) -> Tensor:
        rows: Any = self._rows(x, weight, sink)
        groups = counts or (len(rows),)
        splits, index = [-(-count // TILE_SIZE) * TILE_SIZE for count in groups], None
        if sum(splits) != len(rows):
            index = _places(groups, splits, x.device)
            rows = _FillUp.apply(rows, index, sum(splits))
        dropped = None if again is None else Dropped(lambda: (_filled(again().flatten(0, -2), index, sum(splits)),))
        self.module.save_original_input = again is not None or (index is None and self._shares_input)
        arguments = (rows,) if counts is None else (rows, splits)
        with dropping(dropped, rows), self._te.autocast(enabled=True, recipe=self._recipe):
            y = self.module(*arguments, is_first_microbatch=self._fresh)
        self._fresh = False
        y = y if index is None else y.index_select(0, index)
        return y.view(*x.shape[:-1], y.shape[-1])


def _places(counts: tuple[int, ...], splits: list[int], device: torch.device) -> Tensor:
    """Where every row goes when each group is filled up."""
    starts = [0, *accumulate(splits)]
    parts = [torch.arange(start, start + count, device=device) for start, count in zip(starts, counts, strict=False)]
    return torch.cat(parts)
