"""The map has every parameter, every kept tensor and the formats of every back end."""

from dataclasses import replace
from typing import Any

import pytest

from model.config import ModelConfig
from model.counts import parameter_shapes
from model.fp8.config import FP8Config
from model.fp8.memory import bytes_kept, rounded_weight_bytes
from model.fp8.precision_map import BITS, Precision, Row, module_of, precision_map
from tests.launcher.spine import MODEL
from tests.model.fp8.test_memory import CASES, WIDER

ENGINE = FP8Config("transformer_engine")  # a run is asked to set what the back end has not: the map needs no asking
GEMM = FP8Config(grouped="deep_gemm", recompute_swiglu=False)
BACK_ENDS: list[tuple[str, dict[str, Any]]] = [
    *CASES,
    ("fp8", {"backend": "transformer_engine"}),
    ("fp8", {"backend": "transformer_engine", "grouped": "deep_gemm"}),
    ("fp8", {"grouped": "deep_gemm", "recompute_swiglu": False}),
]
MODELS = [MODEL, WIDER, replace(WIDER, q_lora_rank=None), replace(WIDER, n_shared_experts=0, aux_loss_alpha=0.0)]


def rows_of(model: ModelConfig, fp8: FP8Config, module: str, recompute: str = "none") -> list[Row]:
    rows = precision_map(model, Precision("fp8", fp8), recompute)
    return [row for row in rows if row.layer == "MoE layer" and row.module == module]


@pytest.mark.parametrize("level", ["none", "report"])
@pytest.mark.parametrize(("precision", "keys"), BACK_ENDS)
@pytest.mark.parametrize("model", MODELS)
def test_kept_rows_are_the_bytes_kept(model: ModelConfig, precision: str, keys: dict[str, Any], level: str) -> None:
    """What is measured of a layer (test_memory.py, test_recompute.py) is what its table shows."""
    kind, tokens, sequences = Precision(precision, FP8Config(**keys)), 384, 3
    times = {"token": tokens, "sequence": sequences}
    for layer, moe in (("dense layer", False), ("MoE layer", True)):
        rows = [r for r in precision_map(model, kind, level) if r.layer == layer and r.use == "kept"]
        formula = bytes_kept(model, kind, moe=moe, tokens=tokens, sequences=sequences, recompute=level)
        assert sum(row.bytes * times[row.per] for row in rows) == pytest.approx(formula, rel=1e-12)
        assert {f"{layer} {row.module} {row.tensor}" for row in rows} >= {
            f"{layer} {name} input" for name in ("input_layernorm", "kv_a_layernorm", "post_attention_layernorm")
        }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_every_parameter_of_the_model_is_there(precision: str) -> None:
    rows = precision_map(MODEL, Precision(precision, FP8Config()))
    shown = {(row.layer, row.module) for row in rows if row.tensor == "weight"}
    for name, _ in parameter_shapes(MODEL):
        part, _, rest = name.partition(".")
        if part == "layers":
            number, _, inner = rest.partition(".")
            layer = "MoE layer" if MODEL.is_moe(int(number)) else "dense layer"
        else:
            layer, inner = ("MTP", rest.partition(".")[2]) if part == "mtp" else ("around", name)
        assert (layer, module_of(inner.removeprefix("block."))) in shown, name


@pytest.mark.parametrize(("precision", "keys"), BACK_ENDS)
def test_bytes_are_those_of_the_format_that_is_shown(precision: str, keys: dict[str, Any]) -> None:
    for row in precision_map(WIDER, Precision(precision, FP8Config(**keys))):
        if row.module == "router" and row.tensor == "weight":
            assert row.bytes == WIDER.n_routed_experts * WIDER.hidden_size * BITS[row.format] / 8
        if row.module == "experts.gate_up_proj" and row.tensor == "output":
            assert row.bytes == 2 * 2 * WIDER.moe_intermediate_size * BITS[row.format] / 8


@pytest.mark.parametrize("level", ["none", "report"])
def test_transformer_engine_keeps_its_own_form(level: str) -> None:
    rows = precision_map(WIDER, Precision("fp8", ENGINE), level)
    assert "E5M6" not in {row.format for row in rows}
    tiled = [row for row in rows if row.format == "E4M3" and row.use in ("kept", "again") and row.tensor == "input"]
    assert tiled and all((row.tile, row.scale) == ("128x1", "FP32 2^n") for row in tiled)
    (swiglu,) = [r for r in rows_of(WIDER, ENGINE, "experts.down_proj", level) if r.tensor == "SwiGLU input"]
    assert (swiglu.format, swiglu.scale) == (("BF16", "-") if level == "none" else ("E4M3", "E8M0"))
    weights = [r.use for r in rows_of(WIDER, ENGINE, "o_proj", level) if r.tensor == "weight" and r.format == "E4M3"]
    assert weights == ["Fprop", "Dgrad"]  # both orientations are held


def test_deep_gemm_has_the_experts_alone() -> None:
    both = replace(ENGINE, grouped="deep_gemm", input_cache="fp8")
    (routed,) = [r for r in rows_of(WIDER, both, "experts.gate_up_proj") if r.use == "kept"]
    (shared,) = [r for r in rows_of(WIDER, both, "shared_experts.gate_up_proj") if r.use == "kept"]
    assert (routed.tile, routed.scale, shared.tile, shared.scale) == ("1x128", "E8M0", "128x1", "FP32 2^n")
    (attention,) = [r for r in rows_of(WIDER, GEMM, "o_proj") if r.use == "kept"]
    assert attention.format == "E5M6"  # the oracle's


@pytest.mark.parametrize(("fp8", "shared", "experts"), [
    (FP8Config(primary_weights="bf16"), 2, 2),
    (FP8Config("oracle_exact", primary_weights="bf16"), 1, 1),
    (FP8Config(weights_per_step=False, primary_weights="bf16"), 0, 0),
    (FP8Config(weights_per_step=False, grouped="deep_gemm", primary_weights="bf16"), 0, 1),
    (replace(ENGINE, primary_weights="bf16"), 2, 2),
    (replace(ENGINE, grouped="deep_gemm", primary_weights="bf16"), 2, 1),
    # beside one byte a weight that ZeRO-1 gathers
    (FP8Config(), 2, 2),
    (FP8Config("oracle_exact"), 0, 0),
    (FP8Config(weights_per_step=False), 0, 0),
    (ENGINE, 1, 1),
    (replace(ENGINE, grouped="deep_gemm"), 1, 0),
])  # fmt: skip
def test_rounded_weights_are_held_as_the_back_end_has_them(fp8: FP8Config, shared: int, experts: int) -> None:
    kind = Precision("fp8", fp8)
    assert rounded_weight_bytes(kind, "shared_experts.gate_up_proj") == shared
    assert rounded_weight_bytes(kind, "experts.gate_up_proj") == experts
    assert rounded_weight_bytes(replace(kind, precision="bf16"), "experts.gate_up_proj") == 0
