"""Read access to a checkpoint: nothing of it is believed before it is checked, and no file of it can run code."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from launcher.build import Progress
from launcher.checkpoint.files import FORMAT, INDEX, MANIFEST, CheckpointError, signed, step_name
from launcher.checkpoint.tensor_file import FileRecord, file_record
from launcher.config import ConfigError, RunConfig, from_dict

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".distcp", ".metadata")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder as plain JSON, its format and digest verified."""
    file = path / MANIFEST
    if file.is_symlink():
        raise CheckpointError(f"{file} is a link: a checkpoint holds its own files")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT}")
    if manifest.get("digest") != signed(manifest)["digest"]:
        raise CheckpointError(f"{file}: its content is not what its own digest says: the file is damaged")
    return manifest


def records_of(path: Path, manifest: dict[str, Any]) -> dict[str, FileRecord]:
    """Files that the manifest names, each a plain file in the checkpoint's own folder or CheckpointError."""
    try:
        files = {str(name): FileRecord(**record) for name, record in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from None
    for name in files:
        file = path / name
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name or file.is_symlink():
            raise CheckpointError(f"{path / MANIFEST} names {name!r}, which is not a file in its own folder")
        if file.suffix in PICKLES or name in PICKLES:
            raise CheckpointError(f"{file} looks like a pickle, which can run code when it is opened: it is not read")
    return files


def require_whole(path: Path, name: str, record: FileRecord, *, hashes: bool = True, from_disk: bool = False) -> None:
    """Raise CheckpointError unless the file is there with the manifest's size and (hashes) checksum."""
    file = path / name
    try:
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            found = "no" if size is None else size
            raise CheckpointError(
                f"{file}: {found} bytes where the manifest says {record.bytes}: the file is damaged{_step_of(file)}"
            )
        if hashes and file_record(file, from_disk=from_disk) != record:
            raise CheckpointError(
                f"{file}: its checksum is not the manifest's: the file is damaged or another step's{_step_of(file)}"
            )
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None


def _step_of(file: Path) -> str:
    """What a shard says of itself, as far as its header is whole."""
    try:
        with safe_open(file, framework="pt") as content:
            step = (content.metadata() or {}).get("step")
    except (SafetensorError, OSError):
        return ""
    return f" (it says that it is of step {step})" if step is not None else ""


def verify(path: Path, *, share: int = 0, shares: int = 1) -> int:
    """Check manifest, names, sizes and checksums; files number share, share + shares, ... are read. Bytes read.

    Raises CheckpointError that names the file. With shares > 1 every process takes one share of the files, and looks at
    no other.
    """
    manifest = read_manifest(path)
    files = sorted(records_of(path, manifest).items())
    step = manifest.get("progress", {}).get("step")
    if path.name.startswith("step-") and path.name != step_name(step if isinstance(step, int) else -1):
        raise CheckpointError(f"{path} is of step {step}, its name of step {path.name[5:].lstrip('0') or 0}")
    for name, record in files[share::shares]:
        require_whole(path, name, record)
    return sum(record.bytes for _, record in files[share::shares])


class Reader:
    """Read access to one checkpoint, by global name and range; a shard is opened when something of it is needed.

    verify: read every file's checksum at once. Without it each shard's size is compared when it is opened.
    bytes_read: of all that `read` has given. Raises CheckpointError.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path, self.bytes_read = path, 0
        self.manifest: dict[str, Any] = read_manifest(path)
        self._records = records_of(path, self.manifest)
        try:
            self.config: RunConfig = from_dict(self.manifest["config"])
            self.progress = Progress(**self.manifest["progress"])
        except ConfigError as error:
            said = "; ".join(error.errors)
            raise CheckpointError(f"{path / MANIFEST}: its configuration is not of this version: {said}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from None
        for name, record in self._records.items() if verify else ():
            require_whole(path, name, record)
        self._stretches = self._read_index(verified=verify)
        self._open: dict[str, Any] = {}

    @property
    def files_opened(self) -> list[str]:
        """Shards that were needed so far."""
        return list(self._open)

    def _read_index(self, *, verified: bool) -> dict[str, list[tuple[int, int, str]]]:
        """Offset, length and shard of every stretch, by `kind/name` and in order of the offset."""
        file = self.path / INDEX
        if INDEX not in self._records:
            raise CheckpointError(f"{self.path / MANIFEST} lacks {INDEX}, which says what lies where")
        if not verified:
            require_whole(self.path, INDEX, self._records[INDEX])
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
            shards = [str(name) for name in index["files"]]
            found = {
                str(tensor): sorted((int(offset), int(length), shards[number]) for offset, length, number in stretches)
                for tensor, stretches in index["stretches"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error!r}") from None
        if lacking := sorted(set(shards) - set(self._records)):
            raise CheckpointError(f"{self.path / MANIFEST} lacks {lacking[0]}, which {INDEX} names")
        return found

    def _shard(self, name: str) -> Any:
        """A map of the file, for as long as the reader lives."""
        if name not in self._open:
            file = self.path / name
            require_whole(self.path, name, self._records[name], hashes=False)
            try:
                content: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is not a shard of a checkpoint: {error}") from None
            step = (content.metadata() or {}).get("step")
            if step is not None and step != str(self.progress.step):
                raise CheckpointError(f"{file} is of step {step}, the manifest of step {self.progress.step}")
            self._open[name] = content
        return self._open[name]

    def has(self, kind: str, name: str) -> bool:
        """Whether anything of a tensor is stored."""
        return f"{kind}/{name}" in self._stretches

    def names(self, kind: str) -> Iterable[str]:
        """Tensors of which something of this kind is stored."""
        return [tensor.removeprefix(f"{kind}/") for tensor in self._stretches if tensor.startswith(f"{kind}/")]

    def read(self, kind: str, name: str, out: Tensor, *, offset: int = 0) -> None:
        """Fill the flat tensor `out` with the elements of a global tensor from `offset` on."""
        reached, end = offset, offset + out.numel()
        # in order, so that stretches that overlap cannot make up for a gap
        for start, length, file in self._stretches.get(f"{kind}/{name}", ()):
            stop = min(start + length, end)
            if start <= reached < stop:
                content = self._shard(file)
                key = f"{kind}/{name}@{start}"
                try:
                    stretch = content.get_slice(key)
                    if stretch.get_shape() != [length]:
                        raise CheckpointError(
                            f"{self.path / file}: {key} has shape {stretch.get_shape()}, not {length}"
                        )
                    part: Tensor = stretch[reached - start : stop - start]
                except SafetensorError as error:
                    raise CheckpointError(f"{self.path / file} is not the shard that {INDEX} means: {error}") from None
                out[reached - offset : stop - offset] = part
                self.bytes_read += part.nbytes
                reached = stop
        if reached < end:
            raise CheckpointError(f"{self.path}: {kind} of {name} lacks element {reached} of {offset} to {end}")
