"""Resuming equals not having stopped, bitwise; another layout finds the same state; damage is named, never loaded."""

import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.corpus import Document
from data.prepare import prepare
from launcher.build import Progress, Run, build
from launcher.checkpoint.state import (
    CheckpointError,
    Reader,
    checkpoints_dir,
    commit,
    find,
    latest,
    load,
    save,
    signed,
    verify,
    write_tensors,
)
from launcher.checkpoint.tensor_file import file_record
from launcher.config import RunConfig, from_dict, to_dict
from launcher.inference import load_model
from launcher.runtime import process_group
from launcher.step import train_step
from model.config import ModelConfig
from model.counts import parameter_shapes
from model.transformer import Transformer
from tests.distributed import run_distributed
from tests.launcher.spine import MODEL, assemble, config

VOCAB = replace(MODEL, vocab_size=320, num_hidden_layers=4)
KINDS = ("master", "exp_avg", "exp_avg_sq")
WORDS = ["the", "router", "picks", "an", "expert", "für", "\n    return", "x_TD", "1024", "=", "(", "):"]


def prepared(folder: Path) -> str:
    """Prefix of a small prepared training set of at most 300 tokens; a tokenizer lies beside it."""
    draw = random.Random(0)
    documents = [Document("made up", f"{i}", " ".join(draw.choices(WORDS, k=draw.randint(30, 60)))) for i in range(99)]
    return prepare(corpus=documents, out_dir=folder, vocab_size=300, heldout_fraction=0.2).train_prefix


def whole_config(model: ModelConfig, run_dir: Path, precision: str = "fp32") -> RunConfig:
    """A run of one process, whose data need not be there."""
    found = config("nowhere/train", pipeline=1, expert=1, data=1, schedule="1f1b", model=model, run_dir=str(run_dir))
    return replace(found, train=replace(found.train, precision=precision))


def write_checkpoint(
    model: Transformer, run_dir: Path, *, precision: str = "fp32", tokenizer: Path | None = None
) -> Path:
    """A checkpoint of a whole model as a run of one process would write it, without moments."""
    run_config = whole_config(model.config, run_dir, precision)
    temporary = checkpoints_dir(run_config) / "temporary"
    temporary.mkdir(parents=True)
    tensors = {f"master/{name}@0": weight.detach().flatten().float() for name, weight in model.named_parameters()}
    tensors |= {f"router_bias/{block}@0": router.e_score_correction_bias for block, router in model.routers().items()}
    write_tensors(temporary / "rank-00000.safetensors", tensors)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
    final = temporary.with_name("step-00000007")
    commit(temporary, final, {"progress": vars(Progress(7)), "config": to_dict(run_config)})
    return final


@dataclass(frozen=True)
class State:
    """One rank's part of the training state. tensors: kind -> (name, offset) -> flat values."""

    tensors: dict[str, dict[tuple[str, int], Tensor]]
    biases: dict[int, Tensor]
    progress: Progress
    optimizer_steps: int
    loss: float | None


def state_of(run: Run, loss: float | None) -> State:
    tensors: dict[str, dict[tuple[str, int], Tensor]] = {kind: {} for kind in KINDS}
    for bucket, shard in zip(run.zero1.buckets, run.optimizer.shards, strict=True):
        for piece in bucket.pieces():
            for kind in KINDS:
                tensors[kind][piece.name, piece.offset] = getattr(shard, kind)[piece.start : piece.stop].clone()
    biases = {block: shared.router.e_score_correction_bias.clone() for block, shared in run.model.routers.items()}
    return State(tensors, biases, replace(run.progress), run.optimizer.steps, loss)


def session(run_config: RunConfig, steps: int, start: str | None) -> list[State]:
    """One rank: load `start` if given, then `steps` steps with a checkpoint after each; the state before and after."""
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        if start is not None:
            load(run, Path(start))
        states = [state_of(run, None)]
        for _ in range(steps):
            result = train_step(run)
            save(run)
            states.append(state_of(run, result.loss))
        return states


@dataclass(frozen=True)
class Whole:
    """The training state of all ranks put together."""

    tensors: dict[str, dict[str, Tensor]]
    biases: dict[int, Tensor]
    progress: Progress
    optimizer_steps: int
    loss: float | None


def whole(states: list[State], model: ModelConfig = VOCAB) -> Whole:
    """Puts the ranks' states together; fails unless each element is there once and all ranks agree on the rest."""
    like = {name: torch.empty(shape) for name, shape in parameter_shapes(model)}
    tensors = {kind: assemble([state.tensors[kind] for state in states], like) for kind in KINDS}
    biases: dict[int, Tensor] = {}
    for state in states:
        for block, bias in state.biases.items():
            assert torch.equal(biases.setdefault(block, bias), bias), f"copies of router {block} differ"
    first = states[0]
    assert all(
        (s.progress, s.optimizer_steps, s.loss) == (first.progress, first.optimizer_steps, first.loss) for s in states
    )
    return Whole(tensors, biases, first.progress, first.optimizer_steps, first.loss)


def assert_same(ours: Whole, theirs: Whole) -> None:
    for kind in KINDS:
        for name, tensor in ours.tensors[kind].items():
            assert torch.equal(tensor, theirs.tensors[kind][name]), f"{kind} of {name}"
    assert ours.biases.keys() == theirs.biases.keys() and len(ours.biases) == VOCAB.num_moe_layers + 1
    for block, bias in ours.biases.items():
        assert torch.equal(bias, theirs.biases[block]), f"bias of block {block}"
    assert (ours.progress, ours.optimizer_steps) == (theirs.progress, theirs.optimizer_steps)


@dataclass(frozen=True)
class Straight:
    """Three steps without a stop on 4 ranks: DualPipe, 2 pipeline x 2 data ranks, experts over both data ranks."""

    config: RunConfig
    states: list[Whole]

    def step(self, number: int) -> Path:
        return checkpoints_dir(self.config) / f"step-{number:08d}"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    run_config = config(
        prepared(folder / "data"), pipeline=2, expert=2, data=2, schedule="dualpipe", layers=(1, 3), microbatches=4,
        model=VOCAB, run_dir=str(folder / "run"),
    )  # fmt: skip
    run_config = replace(run_config, train=replace(run_config.train, keep_checkpoints=5))
    ranks = run_distributed(4, session, run_config, 3, None)
    return Straight(run_config, [whole([rank[i] for rank in ranks]) for i in range(4)])


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


def test_another_layout_finds_the_same_state_and_trains_alike(straight: Straight, tmp_path: Path) -> None:
    other = config(
        straight.config.data.prefix, pipeline=2, expert=1, data=1, schedule="1f1b", layers=(3, 1), microbatches=8,
        model=VOCAB, run_dir=str(tmp_path),
    )  # fmt: skip
    ranks = run_distributed(2, session, other, 1, str(straight.step(2)))
    assert_same(whole([rank[0] for rank in ranks]), straight.states[2])
    ours, theirs = whole([rank[1] for rank in ranks]), straight.states[3]
    assert ours.loss is not None and theirs.loss is not None
    assert abs(ours.loss / theirs.loss - 1) < 2e-6
    for name, weight in ours.tensors["master"].items():
        expected = theirs.tensors["master"][name]
        assert (weight - expected).norm() / expected.norm() < 1e-5, name
    assert all(torch.equal(bias, theirs.biases[block]) for block, bias in ours.biases.items())


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


def truncate(folder: Path) -> str:
    file = folder / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def flip_a_bit(folder: Path) -> str:
    file = folder / "rank-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    return file.name


def delete(folder: Path) -> str:
    (folder / "rank-00003.safetensors").unlink()
    return "rank-00003.safetensors"


def link(folder: Path) -> str:
    file = folder / "rank-00000.safetensors"
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to(folder.parent / "elsewhere.safetensors")
    return file.name


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(signed(manifest)))  # as somebody would who means it, and not by accident


def leave_the_folder(folder: Path) -> str:
    shutil.copyfile(folder / "rank-00000.safetensors", folder.parent / "x")
    edit(folder, lambda manifest: manifest["files"].update({"../x": manifest["files"]["rank-00000.safetensors"]}))
    return "'../x'"


def name_the_parent(folder: Path) -> str:
    record = {"bytes": folder.parent.stat().st_size, "xxh3_128": ""}
    edit(folder, lambda manifest: manifest["files"].update({"..": record}))
    return "manifest.json names '..'"


def forget_a_file(folder: Path) -> str:
    edit(folder, lambda manifest: manifest["files"].pop("rank-00001.safetensors"))
    return "lacks"


def zeros_inside(folder: Path) -> str:
    file = folder / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    assert any(data[middle : middle + 4096])
    data[middle : middle + 4096] = bytes(4096)
    file.write_bytes(data)
    return f"{file.name}: its checksum"


def a_shard_of_another_step(folder: Path) -> str:
    """Of the same size; the manifest is the newer one's."""
    file = folder / "rank-00002.safetensors"
    other = folder.with_name("step-00000002") / file.name
    assert other.stat().st_size == file.stat().st_size
    shutil.copyfile(other, file)
    return rf"{file.name}: its checksum .*it says that it is of step 2"


def shards_and_records_of_another_step(folder: Path) -> str:
    """All of them, with a manifest that vouches for them and still says the newer step."""
    older = folder.with_name("step-00000002")
    for file in folder.glob("*.safetensors"):
        shutil.copyfile(older / file.name, file)
    files = json.loads((older / "manifest.json").read_text())["files"]
    edit(folder, lambda manifest: manifest.update(files=files))
    return "is of step 2, the manifest of step 3"


def a_bit_of_the_manifest(folder: Path) -> str:
    """Still JSON, still a number where a number is meant."""
    path = folder / "manifest.json"
    text = path.read_text()
    assert '"samples": 24' in text
    path.write_text(text.replace('"samples": 24', '"samples": 25'))
    return "manifest.json: its content is not what its own digest says"


def another_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return "tokenizer.json: 2 bytes"


def a_pickle(folder: Path) -> str:
    (folder / "rank-00009.pt").write_bytes(crafted_pickle(folder.parent / "canary"))
    record = {"bytes": (folder / "rank-00009.pt").stat().st_size, "xxh3_128": ""}
    edit(folder, lambda manifest: manifest["files"].update({"rank-00009.pt": record}))
    return "rank-00009.pt looks like a pickle"


def a_pickle_for_a_shard(folder: Path) -> str:
    """Under a shard's name and vouched for: it is no safetensors file, and nothing unpickles it."""
    file = folder / "rank-00001.safetensors"
    file.write_bytes(crafted_pickle(folder.parent / "canary"))
    record = {"bytes": file.stat().st_size, "xxh3_128": file_record(file).xxh3_128}
    edit(folder, lambda manifest: manifest["files"].update({file.name: record}))
    return f"{file.name} is not a shard"


class _Crafted:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.write_text, (self.canary, "this code ran")


def crafted_pickle(canary: Path) -> bytes:
    """Writes the canary when it is loaded, which the test of it shows."""
    return pickle.dumps(_Crafted(canary))


def test_the_crafted_pickle_would_run(tmp_path: Path) -> None:
    pickle.loads(crafted_pickle(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def cut_the_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-40])
    return "manifest.json"


def list_in_the_manifest(folder: Path) -> str:
    edit(folder, lambda manifest: manifest.update(files=[]))
    return "manifest.json"


def unknown_key(folder: Path) -> str:
    edit(folder, lambda manifest: manifest["config"]["model"].update(num_wings=2))
    return "manifest.json.*num_wings"


def newer_format(folder: Path) -> str:
    edit(folder, lambda manifest: manifest.update(format=99))
    return "format 99"


DAMAGES = [
    truncate, flip_a_bit, delete, link, leave_the_folder, name_the_parent, forget_a_file, cut_the_manifest,
    list_in_the_manifest, unknown_key, newer_format, zeros_inside, a_shard_of_another_step,
    shards_and_records_of_another_step, a_bit_of_the_manifest, another_tokenizer, a_pickle, a_pickle_for_a_shard,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named(straight: Straight, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    shutil.copytree(straight.step(2), tmp_path / "step-00000002")
    folder = tmp_path / "step-00000003"
    shutil.copytree(straight.step(3), folder)
    load_model(folder)
    said = damage(folder)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)
    if damage not in (forget_a_file, unknown_key, shards_and_records_of_another_step, a_pickle_for_a_shard):
        with pytest.raises(CheckpointError, match=said):  # what the start of a run and `verify` ask; no tensor is read
            verify(folder)
    assert not (tmp_path / "canary").exists()


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
