"""A checkpoint as files: what its manifest says, how a folder becomes one, which of several is the newest.

A checkpoint is a folder `step-N`, complete or absent: it is written under another name, flushed, renamed, and only then
named in `latest`. An existing folder is never written into: one that stands in the way is set aside, not deleted.
"""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from torch import Tensor

from launcher.checkpoint.tensor_file import (
    FileRecord,
    Planned,
    file_record,
    in_file_order,
    planned_of,
    write_tensor_file,
)

FORMAT = 3
MANIFEST, LATEST, TOKENIZER, CONFIG = "manifest.json", "latest", "tokenizer.json", "config.json"
INDEX = "index.json"
TEMPORARY = ".tmp-"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another run or that cannot be written; the message names the file."""

    user_error = True


@dataclass(frozen=True)
class Found:
    """A complete-looking checkpoint of a folder: it has a manifest, whatever that says."""

    step: int
    path: Path


def flush(path: Path) -> None:
    """A file's or folder's content reaches the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_flushed(path: Path, text: str) -> FileRecord:
    """Write a new file and flush it; its record."""
    data = text.encode()
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), xxhash.xxh3_128(data).hexdigest())


def digest_of(value: Any) -> str:
    """XXH3-128 of a JSON value, independent of how it is laid out."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def step_name(step: int) -> str:
    """Folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, step: int | None = None) -> None:
    """Write one flushed safetensors file and beside it its record (`.json`), which `commit` gathers.

    step: goes into the file, so that a shard among those of another step can be told from a damaged one.
    """
    planned = in_file_order(planned_of(tensors))
    write_stream(path, planned, (tensors[item.name] for item in planned), step=step)


def write_stream(path: Path, planned: Sequence[Planned], values: Iterable[Tensor], *, step: int | None = None) -> None:
    """As `write_tensors`, the values coming one by one in file order."""
    metadata = None if step is None else {"step": str(step)}
    record = write_tensor_file(path, planned, values, metadata=metadata)
    stretches = [[item.name, torch.Size(item.shape).numel()] for item in planned]
    write_flushed(path.with_suffix(".json"), json.dumps({"record": asdict(record), "stretches": stretches}))


def split_key(key: str) -> tuple[str, int]:
    """`kind/name` and offset of a stretch's key `kind/name@offset`; ValueError where it is none."""
    tensor, at, offset = key.rpartition("@")
    if not at or "/" not in tensor or not offset.isdecimal():
        raise ValueError(f"{key!r} is not of the form kind/name@offset")
    return tensor, int(offset)


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return {**rest, "digest": digest_of(rest)}


def commit(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> Path | None:
    """Gather the shards' records into manifest and index, flush, rename to `final`, point `latest` at it.

    The index says for every tensor in which file each stretch of it lies, `kind/name` -> [[offset, length, number of
    the file among the shards in the order of their names], ...], so that a reader opens only what it needs.
    Where `final` exists it is set aside first, under the name that is returned.
    """
    files: dict[str, dict[str, Any]] = {}
    stretches: dict[str, list[tuple[int, int, int]]] = {}
    for number, path in enumerate(sorted(temporary.glob("*.safetensors"))):
        record = path.with_suffix(".json")
        said = json.loads(record.read_text())
        files[path.name] = said["record"]
        for key, length in said["stretches"]:
            tensor, offset = split_key(key)
            stretches.setdefault(tensor, []).append((offset, length, number))
        record.unlink()
    index = {"files": list(files), "stretches": {tensor: sorted(found) for tensor, found in stretches.items()}}
    files[INDEX] = asdict(write_flushed(temporary / INDEX, json.dumps(index, separators=(",", ":"))))
    if "config" in manifest:
        files[CONFIG] = asdict(write_flushed(temporary / CONFIG, json.dumps(manifest["config"], indent=1)))
    if (temporary / TOKENIZER).is_file():
        flush(temporary / TOKENIZER)
        files[TOKENIZER] = asdict(file_record(temporary / TOKENIZER))
    whole = signed({"format": FORMAT, "versions": versions(), **manifest, "files": files})
    write_flushed(temporary / MANIFEST, json.dumps(whole, indent=1))
    flush(temporary)
    aside = _set_aside(final) if final.exists() else None
    temporary.rename(final)
    flush(final.parent)
    point_latest(final)
    return aside


def point_latest(final: Path) -> None:
    """Replace `latest` at once by one that names `final`."""
    pointer = final.parent / "latest.tmp"
    pointer.unlink(missing_ok=True)
    write_flushed(pointer, final.name + "\n")
    pointer.replace(final.parent / LATEST)
    flush(final.parent)


def _set_aside(final: Path) -> Path:
    number = 1
    while (aside := final.with_name(f"aside-{final.name}-{number}")).exists():
        number += 1
    final.rename(aside)
    return aside


def versions() -> dict[str, str]:
    """Of what wrote the files."""
    return {"torch": torch.__version__, "safetensors": safetensors.__version__, "python": platform.python_version()}


def checkpoints_in(root: Path) -> list[Found]:
    """The checkpoints of a folder, newest first; temporary folders and those set aside are none."""
    if not root.is_dir():
        return []
    found = [
        Found(int(match[1]), path)
        for path in root.iterdir()
        if (match := _STEP.fullmatch(path.name)) and (path / MANIFEST).exists() and not path.is_symlink()
    ]
    return sorted(found, key=lambda item: item.step, reverse=True)


def latest(root: Path) -> Path | None:
    """The checkpoint that `latest` of a run's checkpoint folder names; None if there is none."""
    pointer = root / LATEST
    if not pointer.exists():
        return None
    found = root / pointer.read_text().strip()
    if found.parent != root or found.is_symlink() or not (found / MANIFEST).exists():
        raise CheckpointError(
            f"{pointer} names {found.name}, which is not a checkpoint in {root}: write the name of one"
        )
    return found


def find(path: Path) -> Path:
    """The checkpoint that a user means: one itself, or the newest of a run's folder."""
    for candidate in (path, latest(path), latest(path / "checkpoints")):
        if candidate is not None and (candidate / MANIFEST).exists():
            return candidate
    raise CheckpointError(f"{path}: no checkpoint here (neither a {MANIFEST} nor a `{LATEST}` file)")


def to_delete(root: Path, *, keep: int, keep_every: int) -> list[Path]:
    """Checkpoints that are neither among the newest `keep` nor at a multiple of `keep_every` steps (0: none is)."""
    return [
        item.path for item in checkpoints_in(root)[keep:] if not keep_every or item.step % keep_every or not item.step
    ]
