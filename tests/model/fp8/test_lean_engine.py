"""Less kept around Transformer Engine, on the stand-in: same gradients, inputs computed again, gradients' rows gone."""

import ast
import gc
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model.dropping import project
from model.fp8 import lean_engine
from model.fp8.lean_engine import ColumnsOnly, LeanEngineLinear
from model.fp8.transformer_engine import TransformerEngineLinear
from model.linear import GroupedLinear, Linear
from model.weight_grad import main_grad
from tests.model.fp8.stand_engine import STAND, StandGrouped, StandLinear
from tests.model.wheel import (
    call_of,
    calls_of,
    class_of,
    fits,
    function_of,
    parameters,
    parsed,
    transformer_engine_wheel,
)

BLOCKWISE = "pytorch/tensor/float8_blockwise_tensor.py"


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


@pytest.mark.parametrize(("rows", "counts"), [(256, None), (200, None), (256, (128, 0, 128)), (200, (70, 0, 130))])
def test_an_input_that_comes_again_is_not_kept(stand: Any, rows: int, counts: tuple[int, ...] | None) -> None:
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


# --- against the wheel -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    yield from transformer_engine_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_what_is_changed_is_there_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Both attributes are set when a layer is made and read again in every forward: `replaced` names them."""
    ours = Path(lean_engine.__file__)
    assigned = [n.targets[0] for n in ast.walk(ast.parse(ours.read_text())) if isinstance(n, ast.Assign)]
    replaced = {n.attr for n in assigned if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self.module"}
    assert replaced == {"wgrad_store", "save_original_input"}
    for file, owner in (("linear", "Linear"), ("grouped_linear", "GroupedLinear")):
        tree = parsed(wheel, f"pytorch/module/{file}.py")
        made = ast.unparse(function_of(tree, owner, "__init__"))
        assert "self.wgrad_store = WeightGradStore(delay_wgrad_compute" in made
        assert "self.save_original_input = save_original_input" in made
        forward = ast.unparse(function_of(tree, owner, "forward"))
        assert all(f"self.{name}" in forward for name in replaced)
        assert "wgrad_store.put([" in ast.unparse(tree)
    safe = function_of(parsed(wheel, BLOCKWISE), "Float8BlockQuantizer", "is_requantization_safe")
    assert "return True" in ast.unparse(safe), "else save_original_input would be ignored"


@pytest.mark.slow
def test_the_store_and_its_tensors_are_as_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    ours = Path(lean_engine.__file__)
    source = ast.parse(ours.read_text())
    common = parsed(wheel, "pytorch/module/_common.py")
    put = function_of(common, "WeightGradStore", "put")
    assert parameters(function_of(source, "ColumnsOnly", "put")) == parameters(put) == ["tensor_list", "func"]
    assert fits(call_of(ours, "self._store.put"), put)
    asked = set()  # everything else that the wheel wants of a store is passed on
    for file in ("base", "linear", "grouped_linear"):
        tree = ast.walk(parsed(wheel, f"pytorch/module/{file}.py"))
        asked |= {n.attr for n in tree if isinstance(n, ast.Attribute) and ast.unparse(n.value).endswith("wgrad_store")}
    text = ast.unparse(class_of(common, "WeightGradStore"))
    assert {"put", "pop", "delay_wgrad_compute"} <= asked
    assert all(f"def {name}(" in text or f"self.{name} = " in text for name in asked)

    storage = parsed(wheel, "pytorch/tensor/storage/float8_blockwise_tensor_storage.py")
    update = function_of(storage, "Float8BlockwiseQTensorStorage", "update_usage")
    call = call_of(ours, "tensor.update_usage")
    assert fits(call, update) and {k.arg for k in call.keywords} == {"rowwise_usage", "columnwise_usage"}
    read = {str(ast.literal_eval(found.args[1])) for found in calls_of(ours, "getattr") if len(found.args) == 3}
    assert read == {"_rowwise_data", "_columnwise_data"}
    fields = {ast.unparse(n.target) for n in class_of(storage, "Float8BlockwiseQTensorStorage").body
              if isinstance(n, ast.AnnAssign)}  # fmt: skip
    assert read <= fields and "self._rowwise_data = None" in ast.unparse(update)
