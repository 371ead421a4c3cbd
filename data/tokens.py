"""Token files as they are written and vouched for: a streaming writer, and PREFIX.json that says what they hold.

The format and its reader are in data/index.py. `problems` is what a run asks before it starts.
"""

import contextlib
import json
import logging
import os
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import numpy as np

from data.index import (
    CHUNK,
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    TokenFile,
    TokenFileError,
    file_size,
    map_array,
    sha256_file,
    sibling,
)

MANIFEST_FORMAT = 1
WORK_FOLDER = ".work"  # of a preparation under way, in the folder that it writes to
VERIFY_BYTES = 256 << 20  # of newer files that a start reads by itself: a quarter of a second
T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_AGAIN = "copy the file again from its source or prepare the data again"


class TokenWriter:
    """Streams documents into PREFIX.bin and PREFIX.idx, one sequence per document, in memory that does not grow.

    with_ids: also PREFIX.ids, the u64 of every document that `add` was given.

    A context manager: the files appear under their names only when the block ends without an error, so a killed
    run leaves no half file behind a good name. `num_tokens`, `num_documents`, `max_token_id` count as it goes.
    """

    def __init__(self, prefix: str | Path, dtype: str | np.dtype | type, *, with_ids: bool = False) -> None:
        self.dtype: np.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {value: code for code, value in DTYPES.items()}
        if self.dtype not in codes:
            raise TokenFileError(f"{prefix}: tokens cannot be stored as {self.dtype}; use uint16 or int32")
        self._code = codes[self.dtype]
        self._prefix = prefix
        self.num_tokens = self.num_documents = 0
        self.max_token_id = -1
        # a unique ending: two writers of one prefix may not write into each other's temporary file
        temporary = f"tmp-{uuid.uuid4().hex[:12]}"
        self._temporary = {name: sibling(prefix, f".{name}.{temporary}") for name in ("bin", "lengths", "idx", "ids")}
        self._streamed = ("bin", "lengths", "ids") if with_ids else ("bin", "lengths")
        self._streams: dict[str, BinaryIO] = {}

    def __enter__(self) -> "TokenWriter":
        self._temporary["bin"].parent.mkdir(parents=True, exist_ok=True)
        self._streams = {name: self._temporary[name].open("xb") for name in self._streamed}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for stream in self._streams.values():
                # a full disk says so again where there is something left to write: an error is under way then
                with contextlib.suppress(OSError):
                    stream.close()
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def add(self, document_ids: np.ndarray, *, name: int = 0) -> None:
        """Appends one document, token ids [length] of any integer type; name: its entry in PREFIX.ids.

        Raises TokenFileError for ids `dtype` cannot hold.
        """
        assert self._streams, "use TokenWriter in a with block"
        ids = np.asarray(document_ids)
        where = f"{self._prefix}: document {self.num_documents}"
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise TokenFileError(f"{where}: expected integers [length >= 1], got {ids.dtype} {list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > np.iinfo(self.dtype).max:
            raise TokenFileError(
                f"{where}: id {low if low < 0 else high} does not fit {self.dtype.name}; use a wider dtype"
            )
        if ids.size > np.iinfo(np.int32).max:
            raise TokenFileError(f"{where}: {ids.size} tokens, the format holds 2**31 - 1 per document; split it")
        self._streams["bin"].write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._streams["lengths"].write(struct.pack("<i", ids.size))
        if "ids" in self._streams:
            self._streams["ids"].write(struct.pack("<Q", name))
        self.num_tokens += ids.size
        self.num_documents += 1
        self.max_token_id = max(self.max_token_id, high)

    def _finish(self) -> None:
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        lengths_N = map_array(self._temporary["lengths"], dtype="<i4", offset=0, count=self.num_documents)
        with open(self._temporary["idx"], "xb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, self._code, self.num_documents, self.num_documents + 1))
            chunks = range(0, self.num_documents, CHUNK)
            for begin in chunks:
                stream.write(lengths_N[begin : begin + CHUNK].tobytes())
            end = 0
            for begin in chunks:
                sizes = lengths_N[begin : begin + CHUNK].astype("<i8") * self.dtype.itemsize
                ends = end + np.cumsum(sizes)
                stream.write((ends - sizes).astype("<i8").tobytes())
                end = int(ends[-1])
            for begin in range(0, self.num_documents + 1, CHUNK):
                stream.write(np.arange(begin, min(begin + CHUNK, self.num_documents + 1), dtype="<i8").tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        for name in ("bin", "idx", *(["ids"] if "ids" in self._streams else [])):
            os.replace(self._temporary[name], sibling(self._prefix, f".{name}"))


@dataclass(frozen=True)
class FileRecord:
    """Size and content of one file beside the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """What one source gave to these tokens: documents and UTF-8 bytes kept, and the terms they come under."""

    name: str
    documents: int
    bytes: int
    licence: str
    origin: str


@dataclass(frozen=True)
class Manifest:
    """What PREFIX.bin/.idx hold, as JSON in PREFIX.json; file names are relative to its folder.

    text_bytes: UTF-8 bytes of the text the tokens came from (end-of-sentence ids stand for no text).
    arguments, corpus_sha256: what the data was made from, so that a second preparation can tell it is already there.
    shards: names of the token files that follow one another, without ending; none: one, named as the manifest.
    counts: of everything that was read and what became of it.
    """

    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    num_tokens: int
    num_documents: int
    max_token_id: int
    text_bytes: int
    files: Mapping[str, FileRecord]
    sources: tuple[SourceRecord, ...]
    arguments: Mapping[str, Any]
    corpus_sha256: str
    format: int = MANIFEST_FORMAT
    shards: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def shard_prefixes(self, prefix: str | Path) -> list[Path]:
        """Where the token files lie, in the order of their tokens."""
        folder = sibling(prefix, ".json").parent
        return [folder / name for name in self.shards] or [Path(prefix)]

    def write(self, prefix: str | Path) -> None:
        """Writes PREFIX.json in one step (temporary file, then rename)."""
        path = sibling(prefix, ".json")
        temporary = sibling(prefix, f".json.tmp-{uuid.uuid4().hex[:12]}")
        temporary.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @staticmethod
    def read(prefix: str | Path) -> "Manifest":
        """Reads PREFIX.json; raises TokenFileError naming the file, the key and what to do."""
        path = sibling(prefix, ".json")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TokenFileError(f"{path}: {error.strerror}{_without_manifest(prefix)}") from error
        except ValueError as error:
            raise TokenFileError(f"{path}: no JSON ({error}); prepare the data again") from error
        if isinstance(value, dict) and value.get("format", MANIFEST_FORMAT) != MANIFEST_FORMAT:
            raise TokenFileError(
                f"{path}: format {value['format']}, only {MANIFEST_FORMAT} is known; prepare the data again"
            )
        manifest = _typed(Manifest, value, f"{path}: manifest")
        if not all(isinstance(part, dict) for part in (manifest.files, manifest.arguments, manifest.counts)):
            raise TokenFileError(f"{path}: 'files', 'arguments' and 'counts' must be objects; prepare the data again")
        for key in ("sources", "shards"):
            if not isinstance(getattr(manifest, key), list | tuple):
                raise TokenFileError(f"{path}: {key!r} must be a list; prepare the data again")
        files = {name: _typed(FileRecord, record, f"{path}: file {name!r}") for name, record in manifest.files.items()}
        if any(Path(name).name != name for name in (*files, *manifest.shards, manifest.tokenizer_file)):
            raise TokenFileError(f"{path}: a file name holds a folder; files lie beside their manifest")
        sources = (_typed(SourceRecord, record, f"{path}: source {i}") for i, record in enumerate(manifest.sources))
        return replace(manifest, files=files, sources=tuple(sources), shards=tuple(manifest.shards))


def _without_manifest(prefix: str | Path) -> str:
    """What to do where PREFIX.json cannot be read, by what lies beside it."""
    if not sibling(prefix, ".idx").exists():
        return "; check the prefix or prepare the data"
    if (sibling(prefix, ".json").parent / WORK_FOLDER).exists():
        return "; its preparation was stopped: the same `expertpipe prepare` command continues it"
    return (
        f"; {prefix}.idx is there: token files without a manifest, as Megatron's are: `expertpipe prepare --adopt "
        f"{prefix} --tokenizer TOKENIZER` checks them and writes one"
    )


def _typed(kind: type[T], value: Any, where: str) -> T:
    """A JSON object as the dataclass `kind`: its keys, those with a default optional; whole numbers, text as text."""
    known = fields(kind)  # pyright: ignore[reportArgumentType]
    expected = {part.name: part.type for part in known}
    needed = {part.name for part in known if part.default is MISSING and part.default_factory is MISSING}
    if not isinstance(value, dict) or not needed <= value.keys() <= expected.keys():
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise TokenFileError(f"{where}: keys {keys}, expected {sorted(expected)}; prepare the data again")
    for key in value:
        wanted = expected[key]
        if wanted in (int, str) and (type(value[key]) is not wanted or (wanted is int and value[key] < 0)):
            name = "a whole number of at least 0" if wanted is int else "text"
            raise TokenFileError(f"{where}: {key!r} is {value[key]!r}, expected {name}; prepare the data again")
    return kind(**value)


def problems(prefix: str | Path, vocab_size: int, sequence_length: int, *, hashes: bool = False) -> list[str]:
    """All that would stop a run on this data, one message each (empty: fine). Never raises for bad data.

    vocab_size is the model's; sizes are checked, and with `hashes` every byte (slow: reads all files once).
    """
    try:
        manifest = Manifest.read(prefix)
    except TokenFileError as error:
        return [str(error)]
    path = sibling(prefix, ".json")
    found = file_problems(prefix, manifest, hashes=hashes)
    if manifest.max_token_id >= vocab_size:
        where = "" if found else _first_beyond(prefix, manifest, vocab_size)
        found.append(
            f"{path}: the largest token id is {manifest.max_token_id}{where}, the model's vocab_size is {vocab_size}; "
            f"set vocab_size to at least {manifest.max_token_id + 1} or prepare the data with a smaller vocabulary"
        )
    if manifest.num_tokens < sequence_length + 1:
        found.append(
            f"{path}: {manifest.num_tokens} tokens, one window needs {sequence_length + 1}; "
            "use a shorter sequence_length or more data"
        )
    return found


def _first_beyond(prefix: str | Path, manifest: Manifest, vocab_size: int) -> str:
    """Where the first id outside the vocabulary lies, in words; nothing for files too large to read at start."""
    if sum(record.bytes for record in manifest.files.values()) > VERIFY_BYTES:
        return ""
    for file in open_shards(prefix, manifest).files:
        at = file.first_outside(vocab_size)
        if at is not None:
            return f" (first beyond: {int(file.tokens[at])} at byte {at * file.dtype.itemsize} of {file.prefix}.bin)"
    return ""


def file_problems(prefix: str | Path, manifest: Manifest, *, hashes: bool = False) -> list[str]:
    """Files that are missing, cut, changed or at odds with the manifest, one message each; see `problems`."""
    return changed_files(prefix, manifest, hashes=hashes) or open_shards(prefix, manifest, scan=hashes).problems


def changed_files(prefix: str | Path, manifest: Manifest, *, hashes: bool = False) -> list[str]:
    """Files whose size, time or (with hashes) content is not what PREFIX.json vouches for, one message each.

    Newer files of the right size, as a copy without times leaves them, are read at once if they are small, VERIFY_BYTES
    together, and accepted with one line in the log where their content is right.
    """
    found, newer = [], []
    path = sibling(prefix, ".json")
    written_ns = path.stat().st_mtime_ns
    for name, record in manifest.files.items():
        file = path.parent / name
        try:
            size = file_size(file)
            if size != record.bytes:
                found.append(
                    f"{file}: byte {min(size, record.bytes)}: {size} bytes, its manifest says {record.bytes}; {_AGAIN}"
                )
            elif hashes and sha256_file(file) != record.sha256:
                found.append(f"{file}: SHA-256 differs from its manifest; {_AGAIN}")
            elif not hashes and file.stat().st_mtime_ns > written_ns:
                newer.append((file, record))
        except (TokenFileError, OSError) as error:
            found.append(str(error))
    return found + _newer_files(path, prefix, newer, accepts=not found)


def _newer_files(
    path: Path, prefix: str | Path, newer: Sequence[tuple[Path, FileRecord]], *, accepts: bool
) -> list[str]:
    """See `changed_files`; accepts: nothing else is wrong, so the manifest at `path` may get a new time."""
    total = sum(record.bytes for _, record in newer)
    if total > VERIFY_BYTES:
        return [
            f"{file}: changed after its manifest was written; `expertpipe prepare --verify {prefix}` reads every byte "
            "and accepts the files if they still agree"
            for file, _ in newer
        ]
    found = [
        f"{file}: changed after its manifest was written, and its SHA-256 differs; {_AGAIN}"
        for file, record in newer
        if sha256_file(file) != record.sha256
    ]
    if newer and accepts and not found:
        _LOG.warning(
            "%s: %d files newer than it, as after a copy: read and found equal (%d bytes)", path, len(newer), total
        )
        with contextlib.suppress(OSError):  # on storage that cannot be written they are read again at every start
            os.utime(path)
    return found


@dataclass(frozen=True)
class Shards:
    """The token files of one manifest, and what their own indices say against themselves and it."""

    files: tuple[TokenFile, ...]
    problems: list[str]


def open_shards(prefix: str | Path, manifest: Manifest, *, scan: bool = False) -> Shards:
    """Opens every shard; scan: every entry of every index, and every token against the manifest's largest."""
    found, files = [], []
    for shard in manifest.shard_prefixes(prefix):
        try:
            token_file = TokenFile(shard, scan=scan or None)
        except (TokenFileError, OSError) as error:
            found.append(str(error))
            continue
        files.append(token_file)
        largest = int(token_file.tokens.max()) if scan and token_file.num_tokens else -1
        if largest > manifest.max_token_id:
            at = int(np.argmax(token_file.tokens == largest)) * token_file.dtype.itemsize
            found.append(
                f"{shard}.bin: byte {at}: id {largest}, its manifest says at most {manifest.max_token_id}; {_AGAIN}"
            )
    tokens, documents = (sum(getattr(file, key) for file in files) for key in ("num_tokens", "num_documents"))
    dtypes = {file.dtype.name for file in files}
    if not found and (tokens, documents, dtypes) != (manifest.num_tokens, manifest.num_documents, {manifest.dtype}):
        found.append(
            f"{prefix}.idx: {tokens} tokens, {documents} documents of {', '.join(sorted(dtypes))}, its manifest "
            f"says {manifest.num_tokens}, {manifest.num_documents} of {manifest.dtype}; prepare the data again"
        )
    return Shards(tuple(files), found)


def accept(prefix: str | Path) -> list[str]:
    """Reads every byte that PREFIX.json vouches for; where all agree, the quick check accepts the files from now on.

    Returns the problems, none if the manifest's time was renewed.
    """
    manifest = Manifest.read(prefix)
    found = file_problems(prefix, manifest, hashes=True)
    if not found:
        path = sibling(prefix, ".json")
        try:
            os.utime(path)
        except OSError as error:
            found.append(f"{path}: {error.strerror}: every file is as it says, but its time could not be renewed")
    return found
