"""Checkpoints without pickle: every rank writes its shards as safetensors, a JSON manifest says what is where.

A tensor in a file is a flat stretch of one global tensor, under the key `kind/name@offset` (kind: master, exp_avg,
exp_avg_sq, router_bias; offset: its first element in the flattened global tensor). So a reader with any other layout
takes the stretches it needs, and nothing has to hold the whole model. A checkpoint is a directory `step-N`, complete
or absent: it is written under another name, flushed, renamed, and only then named in `latest`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.tokens import Manifest
from launcher.build import Progress, Run
from launcher.config import RunConfig, from_dict, to_dict

FORMAT = 1
TOKENIZER = "tokenizer.json"
OPTIMIZER_KINDS = ("exp_avg", "exp_avg_sq")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model; the message names the file or tensor."""

    user_error = True


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file of a checkpoint."""

    bytes: int
    sha256: str


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one flushed safetensors file and beside it its record (`.json`)."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    _flush(path)
    record = FileRecord(path.stat().st_size, _sha256(path))
    path.with_suffix(".json").write_text(json.dumps(asdict(record)))


def commit(temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Gather the records into the manifest, flush, rename to `final` (which must not exist), point `latest` at it."""
    files = {}
    for path in sorted(temporary.glob("*.safetensors")):
        record = path.with_suffix(".json")
        files[path.name] = json.loads(record.read_text())
        record.unlink()
    text = json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1)
    (temporary / "manifest.json").write_text(text)
    _flush(temporary / "manifest.json")
    _flush(temporary)
    temporary.rename(final)
    _flush(final.parent)
    pointer = final.parent / "latest.tmp"
    pointer.write_text(final.name + "\n")
    _flush(pointer)
    pointer.replace(final.parent / "latest")
    _flush(final.parent)


def _rank_tensors(run: Run) -> Iterator[tuple[str, Tensor]]:
    for bucket, shard in zip(run.zero1.buckets, run.optimizer.shards, strict=True):
        for piece in bucket.pieces():
            for kind in ("master", *OPTIMIZER_KINDS):
                flat: Tensor = getattr(shard, kind)
                yield f"{kind}/{piece.name}@{piece.offset}", flat[piece.start : piece.stop].detach().cpu()
    for block, shared in run.model.routers.items():
        # A router is the same on all its holders: the first one writes it.
        if run.mesh.data_rank == 0 and run.mesh.pipeline_rank == shared.holders[0]:
            yield f"router_bias/{block}@0", shared.router.e_score_correction_bias.detach().cpu()


def checkpoints_dir(config: RunConfig) -> Path:
    """Folder of a run's checkpoints."""
    return Path(config.run_dir) / "checkpoints"


def save(run: Run) -> Path:
    """Write the state after `run.progress.step` steps; all ranks call it together. Gives the checkpoint's folder."""
    root = checkpoints_dir(run.config)
    final = root / f"step-{run.progress.step:08d}"
    temporary = root / f".tmp-{final.name}"
    if run.process.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # left behind by a save that was cut off
        temporary.mkdir(parents=True)
    dist.barrier(group=run.groups.world)
    write_tensors(temporary / f"rank-{run.process.rank:05d}.safetensors", dict(_rank_tensors(run)))
    dist.barrier(group=run.groups.world)
    if run.process.rank == 0:
        manifest = {
            "progress": asdict(run.progress),
            "optimizer_steps": run.optimizer.steps,
            "config": to_dict(run.config),
            "torch": torch.__version__,
        }
        _copy_tokenizer(run.config, temporary)
        commit(temporary, final, manifest)
        _prune(root, keep=run.config.train.keep_checkpoints)
    dist.barrier(group=run.groups.world)
    return final


def _copy_tokenizer(config: RunConfig, folder: Path) -> None:
    """Put the tokenizer of the data beside the weights: a checkpoint then generates text wherever it is taken."""
    prefix = Path(config.data.prefix)
    source = prefix.parent / Manifest.read(prefix).tokenizer_file
    shutil.copyfile(source, folder / TOKENIZER)
    _flush(folder / TOKENIZER)


def _prune(root: Path, *, keep: int) -> None:
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def latest(root: Path) -> Path | None:
    """Newest complete checkpoint of a run's checkpoint folder; None if there is none."""
    pointer = root / "latest"
    if not pointer.exists():
        return None
    found = root / pointer.read_text().strip()
    if found.parent != root or not (found / "manifest.json").exists():
        raise CheckpointError(
            f"{pointer} names {found.name}, which is not a checkpoint in {root}: write the name of one"
        )
    return found


def find(path: Path) -> Path:
    """The checkpoint that a user means: one itself, or the newest of a run's folder."""
    for candidate in (path, latest(path), latest(path / "checkpoints")):
        if candidate is not None and (candidate / "manifest.json").exists():
            return candidate
    raise CheckpointError(f"{path}: no checkpoint here (neither a manifest.json nor a `latest` file)")


class Reader:
    """Read access to one checkpoint, by global name and range; sizes and checksums are verified on opening."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path = path
        try:
            self.manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
            self.config = from_dict(self.manifest["config"])
            self.progress = Progress(**self.manifest["progress"])
            files = {name: FileRecord(**record) for name, record in self.manifest["files"].items()}
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path / 'manifest.json'} cannot be read: {error!r}") from None
        if self.manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {self.manifest.get('format')}, this version reads {FORMAT}")
        self._stretches: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for name, record in files.items():
            self._index(name, record, verify=verify)

    def _index(self, name: str, record: FileRecord, *, verify: bool) -> None:
        file = self.path / name
        if file.parent != self.path or file.is_symlink():
            raise CheckpointError(
                f"{self.path / 'manifest.json'} names {name!r}, which is not a file in its own folder"
            )
        if not file.is_file() or file.stat().st_size != record.bytes:
            found = file.stat().st_size if file.is_file() else "no"
            raise CheckpointError(f"{file}: {found} bytes where the manifest says {record.bytes}: the file is damaged")
        if verify and _sha256(file) != record.sha256:
            raise CheckpointError(f"{file}: its checksum is not the manifest's: the file is damaged")
        try:
            with safe_open(file, framework="pt") as content:
                for key in content.keys():  # noqa: SIM118 (not a dict)
                    kind, _, rest = key.partition("/")
                    tensor, _, offset = rest.rpartition("@")
                    (length,) = content.get_slice(key).get_shape()
                    self._stretches.setdefault((kind, tensor), []).append((int(offset), length, file, key))
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} is not a shard of a checkpoint: {error}") from None

    def has(self, kind: str, name: str) -> bool:
        """Whether anything of a tensor is stored."""
        return (kind, name) in self._stretches

    def read(self, kind: str, name: str, out: Tensor, *, offset: int = 0) -> None:
        """Fill the flat tensor `out` with the elements of a global tensor from `offset` on."""
        reached, end = offset, offset + out.numel()
        # in order, so that stretches that overlap cannot make up for a gap
        for start, length, file, key in sorted(self._stretches.get((kind, name), ())):
            stop = min(start + length, end)
            if start <= reached < stop:
                with safe_open(file, framework="pt") as content:
                    out[reached - offset : stop - offset] = content.get_slice(key)[reached - start : stop - start]
                reached = stop
        if reached < end:
            raise CheckpointError(f"{self.path}: {kind} of {name} lacks element {reached} of {offset} to {end}")


def load(run: Run, path: Path) -> None:
    """Continue `run` from a checkpoint of any layout of the same model."""
    reader = Reader(path)
    if reader.config.model != run.config.model:
        raise CheckpointError(f"{path} is of another model: compare its manifest.json with the model section")
    for bucket, shard in zip(run.zero1.buckets, run.optimizer.shards, strict=True):
        for piece in bucket.pieces():
            part = slice(piece.start, piece.stop)
            reader.read("master", piece.name, shard.master[part], offset=piece.offset)
            for kind in OPTIMIZER_KINDS:
                if "optimizer_steps" in reader.manifest:
                    reader.read(kind, piece.name, getattr(shard, kind)[part], offset=piece.offset)
    for block, shared in run.model.routers.items():
        reader.read("router_bias", str(block), shared.router.e_score_correction_bias)
    run.optimizer.steps = reader.manifest.get("optimizer_steps", 0)
    progress = reader.progress
    run.progress.step, run.progress.tokens, run.progress.samples = progress.step, progress.tokens, progress.samples
    run.zero1.publish_weights()
