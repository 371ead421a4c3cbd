"""The map names every weight of a run, agrees with what the layers do, and fits a terminal."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from launcher.__main__ import main
from launcher.commands.precision import chosen
from launcher.config import compose
from model.config import ModelConfig
from model.counts import block_shapes
from model.fp8.apply import apply_fp8, fp8_linears
from model.fp8.config import FP8Config
from model.fp8.linear import FP8Layer
from model.fp8.memory import kept_by_layer
from model.fp8.precision_map import Precision, precision_map
from model.transformer import Transformer
from tests.launcher.spine import MODEL


def test_the_big_model_fits_a_terminal(capsys: Any) -> None:
    report = ["fp8.backend=oracle_fast", "fp8.input_cache=fp8", "fp8.attention_cache=e5m6", "fp8.recompute_swiglu=true"]
    assert main(["precision", "experiment=deepseek_v3_2048_h800", *report]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:4] == ["input", "kept", "E5M6", "1x128"] for line in lines)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from launcher.__main__ import main; main(['precision', 'experiment=tiny']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_json_has_every_row(capsys: Any) -> None:
    assert main(["precision", "experiment=tiny", "train.precision=fp8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = compose(["experiment=tiny", "train.precision=fp8"])
    assert len(found["rows"]) == len(precision_map(run.model, chosen(run)))
    assert {"layer", "module", "tensor", "use", "format", "tile", "scale", "per", "bytes"} <= found["rows"][0].keys()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("level", "kept"), [
    ("none", {"q_a_proj", "o_proj", "shared_experts.down_proj", "experts.gate_up_proj", "experts.down_proj"}),
    ("report", {"o_proj", "shared_experts.down_proj", "experts.gate_up_proj", "experts.down_proj"}),
    ("attend", {"shared_experts.down_proj", "experts.gate_up_proj", "experts.down_proj"}),
    ("layer", set()),
])  # fmt: skip
def test_what_is_recomputed_is_not_shown_as_kept(precision: str, level: str, kept: set[str]) -> None:
    rows = [r for r in precision_map(MODEL, Precision(precision, FP8Config()), level) if r.layer == "MoE layer"]
    stays, again = ({r.module for r in rows if r.use == use} for use in ("kept", "again"))
    assert kept <= stays and (level == "none") != bool(again)
    assert ("attention q, k, v" in {r.tensor for r in rows if r.use == "again"}) == (level != "none")
    assert not ({"q_a_proj", "kv_a_proj_with_mqa"} & stays and again)
    if level == "report":  # the SwiGLU's input stays, its output does not
        down = {(r.tensor, r.use) for r in rows if r.module == "experts.down_proj"}
        assert ("SwiGLU input", "kept") in down and ("input", "kept") not in down
        formula = {k.what: k.per_token for k in kept_by_layer(MODEL, Precision(precision, FP8Config()), moe=True,
                                                             recompute="report") if k.per_token}  # fmt: skip
        shown = {f"{r.module} {r.tensor}".strip(): r.bytes for r in rows if r.use == "kept" and r.per == "token"}
        assert formula == {what: size for what, size in shown.items() if size}


def test_the_table_says_what_is_computed_again(capsys: Any) -> None:
    assert main(["precision", "experiment=tiny", "train.precision=fp8", "parallel.recompute=report"]) == 0
    said = capsys.readouterr().out
    assert "parallel.recompute=report" in said and max(map(len, said.splitlines())) <= 80
    assert any(line.split()[:4] == ["input", "again", "E4M3", "1x128"] for line in said.splitlines())


def test_the_table_has_what_is_around_the_layers_and_its_notes(capsys: Any) -> None:
    assert main(["precision", "experiment=tiny", "train.precision=fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = {name: next(i for i, line in enumerate(lines) if line.split()[:1] == [name]) for name in ("MTP", "around")}
    mtp, around = lines[heads["MTP"] : heads["around"]], lines[heads["around"] :]
    assert {"  enorm", "  hnorm", "  eh_proj", "  norm"} <= set(mtp) and {"  norm", "  lm_head"} <= set(around)
    assert any(line.startswith("  as above: input_layernorm, ") for line in mtp)
    number = next(line.split()[0] for line in lines if line.endswith("products of the router are in FP32"))
    router = lines[lines.index("  router") + 1 :]
    (weight,) = [line for line in router[:3] if line.split()[:2] == ["weight", number]]
    assert "FP32" in weight
    marks = {word for line in lines for word in line.split() if word.startswith("[") and word.endswith("]")}
    assert marks == {line.split()[0] for line in lines if line.startswith("[")}


@pytest.mark.parametrize("level", ["none", "report", "attend", "layer"])
def test_back_ends_of_a_gpu_are_named_and_fit(capsys: Any, level: str) -> None:
    engine = ["fp8.backend=transformer_engine", "fp8.input_cache=wide", "fp8.attention_cache=wide"]
    given = ["fp8.recompute_swiglu=false", "fp8.grouped=deep_gemm", f"parallel.recompute={level}"]
    assert main(["precision", "experiment=deepseek_v3_2048_h800", *engine, *given]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "E5M6" not in said
    assert "fp8.backend=transformer_engine" in said and "fp8.grouped=deep_gemm" in said


def fp8_modules(model: ModelConfig, fp8: FP8Config) -> set[str]:
    rows = precision_map(model, Precision("fp8", fp8))
    return {row.module for row in rows if row.use == "Wgrad" and row.format == "E4M3"}


def test_the_map_and_the_model_agree_on_what_is_in_fp8() -> None:
    model = Transformer(MODEL)
    inside = {
        name.split(".", 2)[2].removeprefix("mlp.").removeprefix("self_attn.")
        for name in fp8_linears(model)
        if name.startswith("layers.")
    }
    assert fp8_modules(MODEL, FP8Config()) == inside | {"eh_proj"}


def test_every_parameter_of_a_layer_is_there() -> None:
    rows = precision_map(MODEL, Precision("bf16", FP8Config()))
    shown = {row.module or row.tensor for row in rows if row.layer == "MoE layer"}
    names = {n.removesuffix(".weight").removeprefix("mlp.").removeprefix("self_attn.") for n, _ in
             block_shapes(MODEL, moe=True)}  # fmt: skip
    assert {"router" if name == "gate.proj" else name for name in names} <= shown


@pytest.mark.parametrize("keys", [{}, {"input_cache": "wide", "attention_cache": "fp8"}, {"scales": "fp32"}])
def test_bytes_of_what_is_kept_are_those_of_the_tensors(keys: dict[str, Any]) -> None:
    fp8 = FP8Config(native=False, recompute_swiglu=False, **keys)
    model = Transformer(MODEL)
    apply_fp8(model, fp8)
    rows = {row.module: row for row in precision_map(MODEL, Precision("fp8", fp8))
            if row.layer == "dense layer" and row.use == "kept" and row.tensor == "input"
            and not row.module.endswith("norm")}  # fmt: skip
    assert len(rows) == 7
    for name, row in rows.items():
        linear = next(layer for full, layer in fp8_linears(model).items() if full.endswith(f"0.self_attn.{name}")
                      or full.endswith(f"0.mlp.{name}"))  # fmt: skip
        assert isinstance(linear.fp8, FP8Layer)
        tokens = 256  # whole tiles of 128x1
        kept, _ = linear.fp8.take_input(torch.randn(tokens, linear.weight.shape[1]), (tokens,))
        assert kept.num_bytes == tokens * row.bytes, name
