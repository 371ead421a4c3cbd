"""The adapter without a GPU: its logic on the stand-in, its calls against the wheel."""

import ast
import re
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model import backends
from model.fp8 import transformer_engine as adapter
from model.fp8.config import TRANSFORMER_ENGINE_FROM, TRANSFORMER_ENGINE_UNTIL, FP8Config
from model.fp8.formats import Scales, Tile
from model.fp8.linear import weights_changed
from model.fp8.quantise import Quantiser
from model.fp8.transformer_engine import MissingBackend, TransformerEngineLinear, load_engine, padded_rows
from model.fp8.weights import WeightBlocks, no_numbers
from model.linear import GroupedLinear, Linear
from model.weight_grad import forget, main_grad, set_sink
from parallel.pipeline.weight_grad import DeferredSink
from tests.model.fp8.data import relative_error
from tests.model.fp8.stand_engine import STAND
from tests.model.wheel import (
    VERSION,
    calls_of,
    class_of,
    fits,
    function_of,
    parameters,
    parsed,
    published_versions,
    transformer_engine_wheel,
)


def pair(*sizes: int) -> tuple[Any, Any]:
    """A plain layer and the same with the adapter over the stand-in."""
    plain, ours = (Linear(*sizes) if len(sizes) == 2 else GroupedLinear(*sizes) for _ in range(2))
    with torch.no_grad():
        plain.weight.normal_()
        ours.weight.copy_(plain.weight)
    ours.fp8 = TransformerEngineLinear(STAND, "recipe", ours.weight)
    return plain, ours


@pytest.mark.parametrize(("sizes", "arguments", "shape"), [
    ((48, 32), (), (2, 37, 48)),
    ((48, 32), (), (128, 48)),
    ((3, 48, 32), ((130, 0, 5),), (135, 48)),
])  # fmt: skip
def test_padding_and_put_off_gradients(sizes: Any, arguments: Any, shape: Any) -> None:
    plain, ours = pair(*sizes)
    sink = DeferredSink()
    set_sink(ours, sink)
    put_off: list[Any] = []
    for seed in range(2):
        x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_() for _ in range(2))
        grad = torch.randn(*shape[:-1], 32)
        plain(x, *arguments).backward(grad)
        with sink.collecting(put_off):
            ours(y, *arguments).backward(grad)
        torch.testing.assert_close(y.grad, x.grad)
    assert len(put_off) == 2 and not ours.weight.main_grad.any()
    sink.run(put_off)
    torch.testing.assert_close(ours.weight.main_grad, plain.weight.main_grad)
    assert ours.weight.grad is None


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize(("backwards", "weights"), [((0, 1, 2), (0, 1, 2)), ((1, 0, 2), (1, 0, 2)),
                                                    ((2, 1, 0), (0, 1, 2)), ((0, 1, 2), (2, 1, 0))])  # fmt: skip
@pytest.mark.parametrize(("sizes", "arguments"), [((48, 32), ()), ((3, 48, 32), ((130, 0, 5),))])
def test_gradients_add_up_in_any_order_of_micro_batches(
    sizes: Any, arguments: Any, backwards: tuple[int, ...], weights: tuple[int, ...], stale: bool
) -> None:
    """The forward that rounds the weight need not be the first to give a weight gradient, in a schedule from a file."""
    plain, ours = pair(*sizes)
    sink = DeferredSink()
    set_sink(ours, sink)
    for step in range(2):
        for layer in (plain, ours):
            main_grad(layer.weight).fill_(7.0)  # of the step before
            (forget if stale else lambda weight: main_grad(weight).zero_())(layer.weight)
        weights_changed(nn.ModuleList([ours]))
        inputs = [torch.randn(135, 48, generator=torch.Generator().manual_seed(10 * step + i)) for i in range(3)]
        outputs = [ours(x.requires_grad_(), *arguments) for x in inputs]
        put_off: dict[int, Any] = {number: [] for number in backwards}
        for number in backwards:
            plain(inputs[number].detach(), *arguments).square().sum().backward()
            with sink.collecting(put_off[number]):
                outputs[number].square().sum().backward()
        for number in weights:
            sink.run(put_off[number])
        torch.testing.assert_close(main_grad(ours.weight), main_grad(plain.weight))
    assert not ours.fp8.overwrites and ours.fp8.module.first == [True, False, False] * 2


def test_weights_are_rounded_once_a_step() -> None:
    _, ours = pair(16, 16)
    holder = nn.ModuleList([ours])
    for _ in range(2):
        ours(torch.randn(4, 16))
    weights_changed(holder)
    ours(torch.randn(4, 16))
    assert ours.fp8.module.first == [True, False, True]


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize(("sizes", "arguments", "rows"), [((200, 140), (), 37), ((3, 200, 140), ((130, 0, 5),), 135)])
def test_weights_in_fp8_alone_are_its_own_parameters(sizes: Any, arguments: Any, rows: int, scales: Scales) -> None:
    """Of our bytes, refreshed after every update; products and gradients are those of the rounded weight."""
    plain, ours = (Linear(*sizes) if len(sizes) == 2 else GroupedLinear(*sizes) for _ in range(2))
    blocks = WeightBlocks(tuple(plain.weight.shape), Quantiser(Tile.BLOCK, scales, 0.0))
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(plain.weight.shape, generator=generator) for _ in range(2)]
    tensor = blocks.quantise(masters[0])
    ours.weight.data = no_numbers(ours.weight, torch.float32)
    ours.fp8 = TransformerEngineLinear(STAND, "recipe", ours.weight, rounded=True)
    ours.fp8.take_weight(tensor)
    module = ours.fp8.module
    own = module.weights()
    assert module.made_for == "quantised" and module.weights()[0].parts["quantizer"].pow2 is tensor.power_of_two
    assert own[0].parts["rowwise_data"].data_ptr() == tensor.values.data_ptr()  # no copy
    for master in masters:
        fresh = blocks.quantise(master)
        tensor.values.copy_(fresh.values)
        tensor.scales.copy_(fresh.scales)
        weights_changed(nn.ModuleList([ours]))
        plain.weight.data = fresh.dequantise(torch.float32)
        x, y = (torch.randn(rows, 200, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        plain(x, *arguments).square().sum().backward()
        ours(y, *arguments).square().sum().backward()
        assert y.grad is not None and x.grad is not None
        assert relative_error(y.grad, x.grad) < 1e-6
        assert relative_error(main_grad(ours.weight), main_grad(plain.weight)) < 1e-6
    assert module.first == [True, True] and ours.weight.grad is None


def test_an_input_without_gradient_still_gives_the_weights() -> None:
    plain, ours = pair(16, 16)
    x = torch.randn(4, 16)
    for layer in (plain, ours):
        layer(x).sum().backward()
    torch.testing.assert_close(ours.weight.main_grad, plain.weight.main_grad)


def test_the_module_is_no_part_of_the_model() -> None:
    _, ours = pair(16, 16)
    assert [name for name, _ in ours.named_parameters()] == ["weight"] and list(ours.children()) == []


def test_padded_rows_go_back() -> None:
    x = torch.arange(10.0).view(5, 2)
    padded, index = padded_rows(x, (2, 0, 3))
    assert padded.shape == (256, 2) and torch.equal(padded[index], x) and padded.sum() == x.sum()


TE = FP8Config(backend="transformer_engine")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "Transformer Engine is not installed (2.20 or newer, below 2.21 is needed)"),
        ("1.13.0", "Transformer Engine 1.13.0 is installed, 2.20 or newer, below 2.21 is needed"),
        ("2.21", "Transformer Engine 2.21 is installed, 2.20 or newer, below 2.21 is needed"),
    ],
)
def test_no_version_or_the_wrong_one_is_one_line(monkeypatch: Any, found: str | None, words: str) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: found)
    with pytest.raises(MissingBackend) as caught:
        load_engine(TE)
    text = str(caught.value)
    assert text.startswith("fp8.backend=transformer_engine: ") and words in text
    assert "choose fp8.backend=oracle_fast" in text and "\n" not in text


def test_what_cannot_be_imported_is_one_line(monkeypatch: Any) -> None:
    if find_spec("transformer_engine"):
        pytest.skip("it is installed here")
    monkeypatch.setattr(backends, "installed", lambda package: VERSION)
    with pytest.raises(MissingBackend, match=rf"Transformer Engine {VERSION} cannot be imported \(No module named"):
        load_engine(TE)


def engine_that(monkeypatch: Any, *, able: bool, pow2: bool, capability: tuple[int, int] = (9, 0)) -> None:
    """Let the package look installed: whether it can do blocks here, and the scales of its recipe."""
    recipe = SimpleNamespace(fp8_quant_fwd_inp=SimpleNamespace(power_2_scale=pow2))
    modules = {
        "transformer_engine.pytorch": SimpleNamespace(
            is_fp8_block_scaling_available=lambda return_reason: (able, "" if able else "Hopper or newer is needed")
        ),
        "transformer_engine.common.recipe": SimpleNamespace(Float8BlockScaling=lambda: recipe),
    }
    monkeypatch.setattr(backends, "installed", lambda package: VERSION)
    monkeypatch.setattr(backends.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(adapter.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(adapter.torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(("able", "capability"), [(False, (8, 0)), (True, (10, 0))])
def test_a_gpu_that_cannot_is_one_line(monkeypatch: Any, able: bool, capability: tuple[int, int]) -> None:
    engine_that(monkeypatch, able=able, pow2=True, capability=capability)
    here = f"here: compute capability {capability[0]}.{capability[1]}, torch for CUDA"
    with pytest.raises(MissingBackend, match=f"of compute capability 9.0 and CUDA 12.9 or newer, {here} .*: choose"):
        load_engine(TE)


@pytest.mark.parametrize("scales", ["pow2", "fp32"])
def test_scales_are_the_environment_s_at_import(monkeypatch: Any, scales: str) -> None:
    config = FP8Config(backend="transformer_engine", scales=scales)
    value = {"pow2": "0", "fp32": "1"}[scales]
    assert backends.transformer_engine_environment(config) == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": value}
    engine_that(monkeypatch, able=True, pow2=scales == "pow2")
    load_engine(config)
    engine_that(monkeypatch, able=True, pow2=scales != "pow2")
    with pytest.raises(MissingBackend, match=f"fp8.scales={scales}: .* before {backends.FP32_SCALES}={value} was"):
        load_engine(config)


# --- against the wheel -------------------------------------------------------------------------------------------


def calls(name: str) -> list[ast.Call]:
    return calls_of(Path(adapter.__file__), name)


def options() -> set[str]:
    """The keys of the adapter's `options`, which te.Linear and te.GroupedLinear are given."""
    tree = ast.parse(Path(adapter.__file__).read_text())
    (found,) = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "options"]
    assert isinstance(found, ast.Dict)
    return {str(key.value) for key in found.keys if isinstance(key, ast.Constant)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    yield from transformer_engine_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_every_published_version_that_is_taken_was_looked_at() -> None:
    since, until = (backends.numbers(text) for text in (TRANSFORMER_ENGINE_FROM, TRANSFORMER_ENGINE_UNTIL))
    taken = [version for version in published_versions() if since <= backends.numbers(version) < until]
    assert taken == [VERSION], "hold the adapter to the new version too"


@pytest.mark.slow
def test_every_call_fits_the_wheel(wheel: zipfile.ZipFile) -> None:
    linear, grouped = parsed(wheel, "pytorch/module/linear.py"), parsed(wheel, "pytorch/module/grouped_linear.py")
    base, quantization = parsed(wheel, "pytorch/module/base.py"), parsed(wheel, "pytorch/quantization.py")
    given = options()
    assert {"delay_wgrad_compute", "fuse_wgrad_accumulation"} <= given
    checked = [
        *((c, function_of(linear, "Linear", "__init__"), given) for c in calls("te.Linear")),
        *((c, function_of(grouped, "GroupedLinear", "__init__"), given) for c in calls("te.GroupedLinear")),
        *((c, function_of(quantization, "autocast", "__init__"), set()) for c in calls("self._te.autocast")),
        *((c, function_of(quantization, None, "is_fp8_block_scaling_available"), set())
          for c in calls("te.is_fp8_block_scaling_available")),
    ]  # fmt: skip
    tensors = parsed(wheel, "pytorch/tensor/float8_blockwise_tensor.py")
    checked += [
        *((c, function_of(tensors, "Float8BlockQuantizer", "__init__"), set())
          for c in calls("te.Float8BlockQuantizer")),
        *((c, function_of(tensors, "Float8BlockQuantizer", "get_scale_shape"), set())
          for c in calls("quantizer.get_scale_shape")),
        *((c, function_of(quantization, None, "quantized_model_init"), set())
          for c in calls("te.quantized_model_init")),
    ]  # fmt: skip
    modules = calls("self.module")
    checked += [(c, function_of(linear, "Linear", "forward"), set()) for c in modules if len(c.args) == 1]
    checked += [(c, function_of(grouped, "GroupedLinear", "forward"), set()) for c in modules if len(c.args) == 2]
    assert len(checked) == 9
    for call, function, extra in checked:
        assert fits(call, function, extra), f"{ast.unparse(call)} does not fit {parameters(function)}"
    assert calls("self._layer.module.backward_dw") and not parameters(
        function_of(base, "TransformerEngineBaseModule", "backward_dw")
    )
    assert parameters(function_of(grouped, "GroupedLinear", "forward"))[:2] == ["inp", "m_splits"]


@pytest.mark.slow
def test_a_first_micro_batch_overwrites_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    """The manners of the stand-in, and of which the adapter knows: first in, first out; written or added."""
    for file, places in (("linear", 1), ("grouped_linear", 2)):
        statements = ast.unparse(parsed(wheel, f"pytorch/module/{file}.py"))
        assert len(re.findall(r"fuse_wgrad_accumulation and \(?not \w+\.is_first_microbatch", statements)) == places
        assert re.search(r"accumulate'?[=:] ?\(?accumulate_wgrad_into_param_main_grad if", statements)
    store = class_of(parsed(wheel, "pytorch/module/_common.py"), "WeightGradStore")
    assert "self.context = queue.Queue()" in ast.unparse(store)


@pytest.mark.slow
def test_names_that_the_adapter_relies_on(wheel: zipfile.ZipFile) -> None:
    imports = [n for n in ast.walk(parsed(wheel, "pytorch/__init__.py")) if isinstance(n, ast.ImportFrom)]
    exported = {alias.name for statement in imports for alias in statement.names}
    names = ("Linear", "GroupedLinear", "autocast", "is_fp8_block_scaling_available", "Float8BlockQuantizer", "DType")
    for name in (*names, "quantized_model_init", "Float8BlockwiseQTensor"):
        assert name in exported, name
    grouped = ast.unparse(function_of(parsed(wheel, "pytorch/module/grouped_linear.py"), "GroupedLinear", "__init__"))
    assert "f'weight{i}'" in grouped
    recipes = parsed(wheel, "common/recipe/__init__.py")
    recipe = class_of(recipes, "Float8BlockScaling")
    fields = {ast.unparse(n.targets[0]) if isinstance(n, ast.Assign) else ast.unparse(n.target)
              for n in recipe.body if isinstance(n, ast.Assign | ast.AnnAssign)}  # fmt: skip
    assert {"fp8_quant_fwd_inp", "use_f32_scales"} <= fields
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES" in ast.unparse(recipe)
    quantizer = function_of(
        parsed(wheel, "pytorch/tensor/float8_blockwise_tensor.py"), "Float8BlockQuantizer", "__init__"
    )
    contract = ast.parse((Path(__file__).parents[2] / "gpu" / "test_te_contract.py").read_text())
    (made,) = [n for n in ast.walk(contract) if isinstance(n, ast.Call) and "BlockQuantizer" in ast.unparse(n.func)]
    assert fits(made, quantizer)
    assert "power_2_scale" in ast.unparse(class_of(recipes, "QParams"))


@pytest.mark.slow
def test_quantised_parameters_are_made_as_the_wheel_makes_them(wheel: zipfile.ZipFile) -> None:
    """Its class takes what is given; the transposed half comes of the rows; a quantised weight is left alone."""
    tensors = parsed(wheel, "pytorch/tensor/float8_blockwise_tensor.py")
    base = parsed(wheel, "pytorch/quantized_tensor.py")
    own = parameters(function_of(tensors, "Float8BlockwiseQTensor", "__new__"))
    (made,) = calls("te.Float8BlockwiseQTensor")
    given = {keyword.arg for keyword in made.keywords}
    wrapper = parameters(function_of(base, "QuantizedTensor", "__new__"))
    assert not made.args and given <= {*own, *wrapper} and {name for name in own if name != "cls"} <= given
    storage = parsed(wheel, "pytorch/tensor/storage/float8_blockwise_tensor_storage.py")
    transposed = ast.unparse(function_of(storage, "Float8BlockwiseQTensorStorage", "_create_columnwise"))
    assert "tex.fp8_transpose(rowwise_data" in transposed and "assert self._is_2D_scaled" in transposed
    quantize = ast.unparse(function_of(parsed(wheel, "pytorch/module/base.py"), None, "quantize_weight"))
    kept, _, made_anew = quantize.partition("if workspace is not None and quantizer is not None")
    assert "if isinstance(tensor, QuantizedTensor):" in kept and "return (tensor, None)" in kept and made_anew
    constants = ast.unparse(class_of(parsed(wheel, "pytorch/constants.py"), "DType"))
    assert "kFloat8E4M3" in constants


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["te.Linear(1, 2, biased=False)", "te.Linear(1, 2, out_features=3)"])
def test_a_wrong_argument_would_be_seen(wheel: zipfile.ZipFile, wrong: str) -> None:
    call = ast.parse(wrong, mode="eval").body
    assert isinstance(call, ast.Call)
    assert not fits(call, function_of(parsed(wheel, "pytorch/module/linear.py"), "Linear", "__init__"))
