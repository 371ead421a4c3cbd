"""What cannot be imported is refused in one message, and nothing is overwritten or left half done."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launcher.__main__ import main
from launcher.checkpoint.hf_commands import export_hf, import_hf
from launcher.checkpoint.published import INDEX, PublishedError
from launcher.checkpoint.state import Reader, find
from tests.launcher.checkpoint.hf_files import edit_config, edit_tensors
from tests.launcher.checkpoint.states import write_checkpoint
from tests.model.reference import TINY, build


def drop_many(folder: Path) -> str:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.2.mlp.experts" in name]:
            del tensors[name]

    edit_tensors(folder, change)
    return r"24 tensors do not fit.* model\.layers\.2\.mlp\.experts\.0\.gate_proj\.weight is missing;.*; \.\.\.$"


def misfit(folder: Path) -> str:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.9.extra"] = torch.zeros(1)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
        tensors["model.layers.4.eh_proj.weight"] = tensors["model.layers.4.eh_proj.weight"].to(torch.float8_e4m3fn)

    edit_tensors(folder, change)
    return (
        r"4 tensors do not fit.*model\.norm\.weight is missing; model\.layers\.4\.eh_proj\.weight_scale_inv is "
        r"missing; model\.layers\.9\.extra is not part.*"
        r"lm_head\.weight has shape \[511, 64\], config.json means \[512, 64\]"
    )


def other_copy(folder: Path) -> str:
    edit_tensors(folder, lambda tensors: tensors["model.layers.4.shared_head.head.weight"][3, 5].add_(1))
    return "shared_head.head.weight differs from lm_head.weight"


def cut(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors is not a whole safetensors file"


def pickles(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin is a pickle"


def nothing(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no model.*safetensors here"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json cannot be read"


def no_json(folder: Path) -> str:
    (folder / "config.json").write_text("[1, 2")
    return "config.json cannot be read"


def quantised(folder: Path) -> str:
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    return "dequantise"


def other_architecture(folder: Path) -> str:
    edit_config(folder, scoring_func="softmax", tie_word_embeddings=True)
    return "tie_word_embeddings.*scoring_func|scoring_func.*tie_word_embeddings"


def lacking_key(folder: Path) -> str:
    edit_config(folder, hidden_size="REMOVE")
    return "config.json.*hidden_size"


def wrong_type(folder: Path) -> str:
    edit_config(folder, num_attention_heads="many")
    return "config.json.*num_attention_heads=many"


def impossible(folder: Path) -> str:
    edit_config(folder, n_group=3)
    return r"config.json.*n_group=3 does not divide"


def odd_rope(folder: Path) -> str:
    edit_config(folder, rope_scaling={"type": "yarn"})
    return "config.json.*factor"


def index_elsewhere(folder: Path) -> str:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    return "not a file in its own folder"


def index_of_nothing(folder: Path) -> str:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    return "model-00002-of-00002.safetensors, which is not a file"


BAD = [
    drop_many, misfit, other_copy, cut, pickles, nothing, no_config, no_json, quantised, other_architecture,
    lacking_key, wrong_type, impossible, odd_rope, index_elsewhere, index_of_nothing,
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(build(TINY), folder / "run")
    export_hf(folder / "run", folder / "export")
    return folder / "export"


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_sources_are_refused_in_one_message(good: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    shutil.copytree(good, tmp_path / "source")
    said = spoil(tmp_path / "source")
    with pytest.raises(PublishedError, match=said) as error:
        import_hf(tmp_path / "source", tmp_path / "ours")
    assert error.value.user_error and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # nothing half done is left


def test_rotary_tables_in_the_files_are_ignored(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "source")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path / "source", lambda tensors: tensors.update({name: torch.ones(4)}))
    assert import_hf(tmp_path / "source", tmp_path / "ours") == 0


def test_config_without_the_mtp_key_means_none(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "source")
    edit_config(tmp_path / "source", num_nextn_predict_layers="REMOVE")
    with pytest.raises(PublishedError, match=r"model\.layers\.4.* is not part of this architecture"):
        import_hf(tmp_path / "source", tmp_path / "ours")
    edit_tensors(
        tmp_path / "source",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("model.layers.4.")],
    )
    import_hf(tmp_path / "source", tmp_path / "ours")
    assert Reader(find(tmp_path / "ours")).config.model == replace(TINY, num_nextn_predict_layers=0)


@pytest.mark.parametrize("action", ["import-hf", "export-hf"])
def test_nothing_is_overwritten(good: Path, tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = good if action == "import-hf" else good.parent / "run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    for taken in ("full", "file"):
        assert main(["checkpoint", action, str(source), str(tmp_path / taken)]) == 2
        assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "kept"
    assert main(["checkpoint", action, str(source), str(tmp_path / "empty")]) == 0
    assert main(["checkpoint", action, str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".tmp*"))
