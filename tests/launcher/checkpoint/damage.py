"""Damage of a checkpoint that the tests do to it; each function gives what the error must say."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.checkpoint.state import signed
from launcher.checkpoint.tensor_file import file_record


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


def forget_the_index(folder: Path) -> str:
    edit(folder, lambda manifest: manifest["files"].pop("index.json"))
    return "manifest.json lacks index.json"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """With a manifest that vouches for it."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    edit(folder, lambda manifest: manifest["files"].update({path.name: asdict(file_record(path))}))


def an_index_that_leaves_the_folder(folder: Path) -> str:
    shutil.copyfile(folder / "rank-00000.safetensors", folder.parent / "x")
    edit_index(folder, lambda index: index["files"].__setitem__(0, "../x"))
    return "manifest.json lacks ../x, which index.json names"


def an_index_of_other_stretches(folder: Path) -> str:
    edit_index(folder, lambda index: index["stretches"]["master/norm.weight"][0].__setitem__(0, 1))
    return "master of norm.weight lacks element 0"


def an_index_of_other_shards(folder: Path) -> str:
    edit_index(folder, lambda index: index["files"].reverse())
    return r"rank-0000\d.safetensors is not the shard that index.json means"


def an_index_of_longer_stretches(folder: Path) -> str:
    edit_index(folder, lambda index: index["stretches"]["master/norm.weight"][0].__setitem__(1, 10**9))
    return r"master/norm.weight@0 has shape \[\d+\], not 1000000000"


def a_bit_of_the_index(folder: Path) -> str:
    path = folder / "index.json"
    path.write_text(path.read_text().replace("norm.weight", "norn.weight", 1))
    return "index.json: its checksum"


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


def an_older_format(folder: Path) -> str:
    edit(folder, lambda manifest: manifest.update(format=1))
    return "has format 1, this version reads 3"


DAMAGES = [
    truncate,
    flip_a_bit,
    delete,
    link,
    leave_the_folder,
    name_the_parent,
    forget_a_file,
    cut_the_manifest,
    list_in_the_manifest,
    unknown_key,
    newer_format,
    zeros_inside,
    a_shard_of_another_step,
    shards_and_records_of_another_step,
    a_bit_of_the_manifest,
    forget_the_index,
    an_index_that_leaves_the_folder,
    an_index_of_other_stretches,
    an_index_of_other_shards,
    an_index_of_longer_stretches,
    a_bit_of_the_index,
    another_tokenizer,
    a_pickle,
    a_pickle_for_a_shard,
    an_older_format,
]
# which only show when tensors are read; all others are found by `verify`, which a start asks before that
WHEN_READ = (
    forget_a_file, forget_the_index, unknown_key, shards_and_records_of_another_step, a_pickle_for_a_shard,
    an_index_that_leaves_the_folder, an_index_of_other_stretches, an_index_of_other_shards,
    an_index_of_longer_stretches,
)  # fmt: skip
