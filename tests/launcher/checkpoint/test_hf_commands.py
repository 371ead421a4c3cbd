"""Published layout out and in: transformers reads what we write, we read what it writes, nothing is lost or guessed."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.config import DataConfig
from launcher.build import build as build_run
from launcher.checkpoint.hf_commands import export_hf, export_plan, import_hf
from launcher.checkpoint.published import INDEX, MAX_SHARD_BYTES, Planned, PublishedError, plan_shards, write_published
from launcher.checkpoint.state import Reader, checkpoints_dir, find, latest, load
from launcher.checkpoint.tensor_file import header_bytes
from launcher.config import compose
from launcher.inference import load_model
from launcher.runtime import process_group
from launcher.step import train_step
from model.config import ModelConfig
from model.convert import published_tensors
from tests.launcher.checkpoint.hf_files import contents, edit_config
from tests.launcher.checkpoint.states import prepared, whole_config, write_checkpoint
from tests.model.reference import TINY, YARN, build, reference_model

CASES: dict[str, ModelConfig] = {
    "groups": TINY,
    "yarn": replace(YARN, num_nextn_predict_layers=2),
    "no_mtp": replace(TINY, num_nextn_predict_layers=0, rope_theta=5e4),
    "no_query_latent": replace(TINY, q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1),
}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, TINY.vocab_size, (3, 129), generator=torch.Generator().manual_seed(1))


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert tensor.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_export_and_gives_our_logits(tmp_path: Path, tokens: Tensor, case: str) -> None:
    from transformers import DeepseekV3ForCausalLM

    model = build(CASES[case])
    checkpoint = write_checkpoint(model, tmp_path / "run")
    assert export_hf(checkpoint, tmp_path / "export") == 0
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["config.json", "model.safetensors"]
    theirs, report = DeepseekV3ForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path / "export", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    mtp = {name.split(".")[2] for name in report["unexpected_keys"]}
    first = model.config.num_hidden_layers
    assert mtp <= {str(first + k) for k in range(model.config.num_nextn_predict_layers)}
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (load_model(checkpoint).logits(tokens) - expected).abs().max() < 2e-5
    assert expected.std() > 0.1  # not a comparison of zeros


@pytest.mark.parametrize(("case", "precision"), [("groups", "fp32"), ("yarn", "bf16")])
def test_import_and_second_export_change_no_bit(tmp_path: Path, case: str, precision: str) -> None:
    model = build(CASES[case])
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    checkpoint = write_checkpoint(model, tmp_path / "run", precision=precision, tokenizer=tokenizer)
    export_hf(tmp_path / "run", tmp_path / "export")
    import_hf(tmp_path / "export", tmp_path / "again" / "checkpoints")
    assert find(tmp_path / "again").name == "step-00000000"
    export_hf(tmp_path / "again", tmp_path / "export2")
    first, second = contents(tmp_path / "export"), contents(tmp_path / "export2")
    assert_same_tensors(first, second)
    assert (tmp_path / "export" / "config.json").read_bytes() == (tmp_path / "export2" / "config.json").read_bytes()
    assert (tmp_path / "export2" / "tokenizer.json").read_text() == "{}"
    assert first.keys() == {item.name for item in published_tensors(model.config)}
    biases = {name for name in first if name.endswith("e_score_correction_bias")}
    assert len(biases) == len(model.routers())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {tensor.dtype for name, tensor in first.items() if name not in biases} == {dtype}
    assert {first[name].dtype for name in biases} == {torch.float32}
    if precision == "fp32":
        ours, theirs = load_model(checkpoint).state_dict(), load_model(tmp_path / "again").state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("case", ["no_mtp", "yarn"])
def test_what_transformers_saves_is_imported(
    tmp_path: Path, tokens: Tensor, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several shards, its own way of writing rope settings, and MTP layers that config.json names but it drops."""
    theirs = reference_model(build(CASES[case]))
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    if case == "yarn":
        edit_config(tmp_path / "saved", num_nextn_predict_layers=1)
    import_hf(tmp_path / "saved", tmp_path / "ours")
    assert ("without MTP" in capsys.readouterr().out) == (case == "yarn")
    config = Reader(find(tmp_path / "ours")).config
    assert config.model == replace(
        CASES[case], num_nextn_predict_layers=0, initializer_range=config.model.initializer_range
    )
    with torch.no_grad():
        assert (load_model(tmp_path / "ours").logits(tokens) - theirs(tokens).logits).abs().max() < 2e-5


def test_an_import_holds_no_moments_and_starts_at_zero(tmp_path: Path) -> None:
    write_checkpoint(build(TINY), tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "export")
    import_hf(tmp_path / "export", tmp_path / "new" / "checkpoints")
    reader = Reader(find(tmp_path / "new"))
    assert vars(reader.progress) == {"step": 0, "tokens": 0, "samples": 0}
    assert "optimizer_steps" not in reader.manifest
    assert not reader.has("exp_avg", "norm.weight") and reader.has("master", "norm.weight")
    assert reader.config.run_dir == str(tmp_path / "new") and reader.config.parallel.world_size == 1


def test_training_goes_on_from_an_import(tmp_path: Path) -> None:
    model = build(TINY)
    write_checkpoint(model, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "export")
    import_hf(tmp_path / "export", tmp_path / "new" / "checkpoints")
    run_config = whole_config(TINY, tmp_path / "new")
    run_config = replace(run_config, data=DataConfig(prepared(tmp_path / "data"), sequence_length=32))
    with process_group(run_config.train) as process:
        run = build_run(run_config, process)
        newest = latest(checkpoints_dir(run_config))
        assert newest is not None
        load(run, newest)
        (stage,) = run.model.stages.values()
        assert all(torch.equal(weight, stage.state_dict()[name]) for name, weight in model.state_dict().items())
        assert not any(shard.exp_avg.any() or shard.exp_avg_sq.any() for shard in run.optimizer.shards)
        first, second = train_step(run), train_step(run)
        assert run.progress.step == run.optimizer.steps == 2 and second.loss < first.loss < 10


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path, tokens: Tensor) -> None:
    from transformers import DeepseekV3ForCausalLM

    write_checkpoint(build(CASES["no_mtp"]), tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "whole")
    tensors = contents(tmp_path / "whole")
    planned = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "parts").mkdir()

    def read(tensor: Planned) -> list[tuple[str, Tensor]]:
        return [(tensor.name, tensors[tensor.name])]

    write_published(tmp_path / "parts", config, planned, read, max_shard_bytes=300_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3 and files[1] == f"model-00002-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys() and set(index["weight_map"].values()) == set(files)
    assert_same_tensors(contents(tmp_path / "parts"), tensors)
    import_hf(tmp_path / "parts", tmp_path / "ours")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "parts")
    with torch.no_grad():
        assert (load_model(tmp_path / "ours").logits(tokens) - theirs(tokens).logits).abs().max() < 2e-5


def block_by_block(values: Tensor, scales: Tensor) -> Tensor:
    """The released weight_dequant, as its documentation says it: every 128 x 128 block times its scale."""
    out = values.to(torch.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            out[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j]
    return out


def test_block_fp8_is_written_and_read_back(tmp_path: Path, tokens: Tensor) -> None:
    model = build(replace(TINY, num_nextn_predict_layers=1, hidden_size=192, moe_intermediate_size=160))
    write_checkpoint(model, tmp_path / "run", precision="bf16")
    export_hf(tmp_path / "run", tmp_path / "fp8", "fp8")
    export_hf(tmp_path / "run", tmp_path / "fp32", "fp32")
    quantised, plain = contents(tmp_path / "fp8"), contents(tmp_path / "fp32")
    in_fp8 = {name for name, tensor in quantised.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantised.keys() == plain.keys() | {name + "_scale_inv" for name in in_fp8}
    assert len(in_fp8) > 100 and not any("eh_proj" in name or ".gate.weight" in name for name in in_fp8)
    wide = {}
    for name, tensor in plain.items():
        if name in in_fp8:
            scales = quantised[name + "_scale_inv"]
            assert scales.shape == tuple(-(-size // 128) for size in tensor.shape) and scales.dtype == torch.float32
            wide[name] = block_by_block(quantised[name], scales)
            # half a unit of a 4-bit significand, or of the smallest number below the normal ones
            bound = torch.maximum(tensor.abs() / 16, scales.max() * 2**-10)
            assert ((wide[name] - tensor).abs() <= bound * 1.0001).all(), name
            assert quantised[name].float().abs().max() == 448
    assert not torch.equal(wide["model.layers.1.mlp.experts.0.up_proj.weight"], plain[next(iter(in_fp8))])
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    published = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert config["quantization_config"] == published
    import_hf(tmp_path / "fp8", tmp_path / "back")
    export_hf(tmp_path / "back", tmp_path / "back32", "fp32")
    back = contents(tmp_path / "back32")
    assert all(torch.equal(back[name], values) for name, values in wide.items())
    assert Reader(find(tmp_path / "back")).config.train.precision == "bf16"


def test_a_weight_that_is_not_finite_is_not_quantised(tmp_path: Path) -> None:
    model = build(TINY)
    with torch.no_grad():
        model.get_parameter("layers.0.self_attn.o_proj.weight")[3, 3] = torch.nan
    write_checkpoint(model, tmp_path / "run")
    with pytest.raises(PublishedError, match=r"layers\.0\.self_attn\.o_proj\.weight cannot be quantised.*NaN"):
        export_hf(tmp_path / "run", tmp_path / "fp8", "fp8")


def test_the_export_of_671b_is_the_published_checkpoint() -> None:
    """Names, dtypes, shapes and bytes without a weight, against the published figures and names."""
    model = compose(["model=671b"]).model
    planned = export_plan(model, "fp8")
    assert len({tensor.name for tensor in planned}) == len(planned) == 91_991
    layer_61 = [tensor for tensor in planned if tensor.name.startswith("model.layers.61.")]
    assert len(layer_61) == 1_564
    elements = Counter[torch.dtype]()
    for tensor in planned:
        elements[tensor.dtype] += torch.Size(tensor.shape).numel()
    assert elements == {
        torch.float8_e4m3fn: 680_571_043_840, torch.bfloat16: 3_918_786_560, torch.float32: 41_555_600,
    }  # fmt: skip
    assert sum(tensor.num_bytes for tensor in planned) == 688_574_839_360
    shapes = {tensor.name: (tensor.shape, tensor.dtype) for tensor in planned}
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == ((576, 7168), torch.float8_e4m3fn)
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ((5, 56), torch.float32)
    assert shapes["model.layers.61.mlp.experts.255.down_proj.weight"] == ((7168, 2048), torch.float8_e4m3fn)
    assert shapes["model.layers.61.eh_proj.weight"] == ((7168, 14336), torch.bfloat16)
    assert shapes["model.layers.60.mlp.gate.e_score_correction_bias"] == ((256,), torch.float32)
    assert {name.split(".layers.61.")[1] for name in shapes if ".layers.61." in name and ".mlp." not in name} == {
        "embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
        "shared_head.head.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
        *(f"self_attn.{norm}.weight" for norm in ("q_a_layernorm", "kv_a_layernorm")),
        *(f"self_attn.{linear}.weight{end}" for end in ("", "_scale_inv")
          for linear in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    }  # fmt: skip
    # the files: every shard's header is one that safetensors reads, whatever follows it
    for shard in plan_shards(planned, MAX_SHARD_BYTES)[:2]:
        header = header_bytes(shard)
        parsed = json.loads(header[8:])
        assert max(end for item in parsed.values() for end in item["data_offsets"]) == sum(t.num_bytes for t in shard)


def test_an_export_needs_memory_for_one_tensor(tmp_path: Path) -> None:
    """Of a file of 160 MB in 20 tensors; the peak is the process's own."""
    program = """
import resource, sys
from pathlib import Path
import torch
from launcher.checkpoint.published import Planned, write_published
planned = [Planned(f"layer.{i}.weight", (2048, 1024), torch.float32) for i in range(20)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_published(Path(sys.argv[1]), {}, planned, lambda t: [(t.name, torch.full(t.shape, 1.5))])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (tmp_path / "model.safetensors").stat().st_size > 160 * 2**20
    assert int(done.stdout) < 40, "MiB beyond the imports"


def test_shards_keep_order_and_size() -> None:
    sizes = [3, 4, 5, 20, 1, 9, 1]
    tensors = [Planned(str(i), (size,), torch.uint8) for i, size in enumerate(sizes)]
    shards = plan_shards(tensors, 10)
    assert [[tensor.num_bytes for tensor in shard] for shard in shards] == [[3, 4], [5], [20], [1, 9], [1]]
