"""Resuming equals not having stopped, bitwise; what a checkpoint holds is found and read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.build import Progress, build
from launcher.checkpoint.state import (
    CheckpointError,
    Reader,
    checkpoints_dir,
    commit,
    find,
    latest,
    load,
    write_tensors,
)
from launcher.config import from_dict, to_dict
from launcher.inference import load_model
from launcher.runtime import process_group
from tests.distributed import run_distributed
from tests.launcher.checkpoint.states import VOCAB, Straight, assert_same, session, whole, whole_config


def test_a_whole_model_has_the_weights_of_all_ranks(straight: Straight) -> None:
    model = load_model(Path(straight.config.run_dir))  # the newest
    last = straight.states[3]
    assert last.progress == Progress(step=3, tokens=3 * 8 * 32, samples=24)
    named = dict(model.named_parameters())
    assert named.keys() == last.tensors["master"].keys()
    for name, weight in named.items():
        assert torch.equal(weight, last.tensors["master"][name]), name
        assert not weight.requires_grad
        assert not torch.equal(weight, straight.states[0].tensors["master"][name]), f"{name} was never trained"
    for block, router in model.routers().items():
        assert torch.equal(router.e_score_correction_bias, last.biases[block])
        assert router.e_score_correction_bias.any()
    assert load_model(straight.step(2), dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16  # type: ignore


def test_resuming_equals_not_stopping_bitwise(straight: Straight, tmp_path: Path) -> None:
    again = replace(straight.config, run_dir=str(tmp_path))
    ranks = run_distributed(4, session, again, 1, str(straight.step(2)))
    assert_same(whole([rank[0] for rank in ranks]), straight.states[2])
    resumed = whole([rank[1] for rank in ranks])
    assert_same(resumed, straight.states[3])
    assert resumed.loss == straight.states[3].loss
    # the files too: a checkpoint does not depend on how the run came there
    for file in sorted(straight.step(3).glob("*.safetensors")):
        assert file.read_bytes() == (checkpoints_dir(again) / "step-00000003" / file.name).read_bytes()


def test_the_newest_checkpoint_is_found_from_any_folder(straight: Straight) -> None:
    root = checkpoints_dir(straight.config)
    assert find(root.parent) == find(root) == find(straight.step(3)) == latest(root) == straight.step(3)
    assert find(straight.step(1)) == straight.step(1)
    assert (straight.step(1) / "tokenizer.json").read_bytes() == (
        Path(straight.config.data.prefix).with_name("tokenizer.json").read_bytes()
    )
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find(root.parent.parent / "nothing")


def test_stretches_may_start_and_end_anywhere(straight: Straight) -> None:
    reader = Reader(straight.step(3))
    for name in ("layers.1.mlp.experts.gate_up_proj.weight", "embed_tokens.weight"):
        expected = straight.states[3].tensors["master"][name].flatten()
        for start, stop in ((0, len(expected)), (1, 2), (len(expected) // 2 - 5, len(expected) // 2 + 700)):
            out = torch.full((stop - start,), float("nan"))
            reader.read("master", name, out, offset=start)
            assert torch.equal(out, expected[start:stop])
        with pytest.raises(CheckpointError, match=f"lacks element {len(expected)} of"):
            reader.read("master", name, torch.empty(2), offset=len(expected) - 1)


def test_stretches_that_overlap_do_not_hide_a_gap(tmp_path: Path) -> None:
    """Ten elements of which 2 to 5 are there twice and 8 is not."""
    (tmp_path / "temporary").mkdir()
    values = torch.arange(10.0)
    stretches = {0: values[:6], 2: values[2:8], 9: values[9:]}
    tensors = {f"master/x@{offset}": part.clone() for offset, part in stretches.items()}
    write_tensors(tmp_path / "temporary" / "rank-00000.safetensors", tensors)
    manifest = {"progress": vars(Progress()), "config": to_dict(whole_config(VOCAB, tmp_path))}
    commit(tmp_path / "temporary", tmp_path / "step-00000000", manifest)
    reader, out = Reader(tmp_path / "step-00000000"), torch.empty(8)
    reader.read("master", "x", out)
    assert torch.equal(out, values[:8])
    with pytest.raises(CheckpointError, match="lacks element 8 of 0 to 10"):
        reader.read("master", "x", torch.empty(10))


def test_latest_must_name_a_checkpoint_beside_it(straight: Straight, tmp_path: Path) -> None:
    for name in ("../elsewhere", "step-00000009", ""):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(CheckpointError, match="latest"):
            find(tmp_path)


def test_another_model_is_refused(straight: Straight, tmp_path: Path) -> None:
    """In one process, as the check comes before any tensor."""
    other = whole_config(replace(VOCAB, rope_theta=5e4), tmp_path)
    other = replace(other, data=straight.config.data)
    with process_group(other.train) as process:
        run = build(other, process)
        with pytest.raises(CheckpointError, match="another model"):
            load(run, straight.step(3))


def test_the_configuration_survives(straight: Straight) -> None:
    manifest = json.loads((straight.step(3) / "manifest.json").read_text())
    assert from_dict(manifest["config"]) == straight.config == Reader(straight.step(3)).config
