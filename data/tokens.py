"""Token files: Megatron's PREFIX.bin/PREFIX.idx as one flat memory map, and PREFIX.json that says what they hold.

Layout of .idx, little endian, unpadded: 0 magic (9 bytes), 9 u64 version, 17 u8 dtype code, 18 u64 sequences S,
26 u64 D = documents + 1, 34 i32[S] lengths in tokens, i64[S] byte offsets into .bin, i64[D] document indices.
.bin holds the raw tokens. Source: the format written by Megatron-LM's indexed dataset builder.

Megatron's own reader checks the magic and the version only, so a truncated copy trains on whatever is there. This one
checks everything the index implies (20 bytes read per document) before the first token is served.
"""

import hashlib
import json
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: Mapping[int, np.dtype] = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
MANIFEST_FORMAT = 1
T = TypeVar("T")
_CHUNK = 1 << 20  # entries handled at once, so that memory does not grow with the number of documents
_AGAIN = "copy the file again from its source or prepare the data again"


class TokenFileError(ValueError):
    """A token file or its manifest is missing, damaged or does not fit what is asked of it."""


def sibling(prefix: str | Path, ending: str) -> Path:
    """PREFIX + `ending`; not Path.with_suffix, which would eat the last part of a prefix such as corpus.v2."""
    return Path(f"{prefix}{ending}")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in bounded memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class TokenFile:
    """PREFIX.bin as one flat array, validated against PREFIX.idx.

    tokens: read-only memory map [num_tokens] of `dtype`; documents lie in it one after another.
    Raises TokenFileError naming the file, the byte offset and what to do.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index_path, bin_path = sibling(prefix, ".idx"), sibling(prefix, ".bin")
        index_bytes, bin_bytes = _size(index_path), _size(bin_path)
        self.dtype, self.num_sequences, num_indices = _read_header(index_path, index_bytes)
        self.num_documents = num_indices - 1
        offsets_at = HEADER.size + 4 * self.num_sequences
        documents_at = offsets_at + 8 * self.num_sequences
        lengths_N = _map(index_path, dtype="<i4", offset=HEADER.size, count=self.num_sequences)
        self._offsets_N = _map(index_path, dtype="<i8", offset=offsets_at, count=self.num_sequences)
        self._document_indices = _map(index_path, dtype="<i8", offset=documents_at, count=num_indices)
        end = _check_sequences(index_path, lengths_N, self._offsets_N, offsets_at, itemsize=self.dtype.itemsize)
        if end != bin_bytes:
            state = "truncated" if bin_bytes < end else "longer than its index says"
            message = (
                f"{bin_path}: byte {min(end, bin_bytes)}: {state}: {bin_bytes} bytes where .idx needs {end}; {_AGAIN}"
            )
            raise TokenFileError(message)
        _check_documents(index_path, self._document_indices, documents_at, num_sequences=self.num_sequences)
        self.num_tokens = bin_bytes // self.dtype.itemsize
        self.tokens = _map(bin_path, dtype=self.dtype, offset=0, count=self.num_tokens)

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` as a view [length] of the memory map, end-of-sentence id included."""
        assert 0 <= index < self.num_documents, f"document {index} of {self.num_documents}"
        begin, end = (self._token_offset(int(self._document_indices[i])) for i in (index, index + 1))
        return self.tokens[begin:end]

    def documents(self) -> Iterator[np.ndarray]:
        """Every document in file order."""
        return (self.document(index) for index in range(self.num_documents))

    def _token_offset(self, sequence: int) -> int:
        return (
            self.num_tokens if sequence == self.num_sequences else int(self._offsets_N[sequence]) // self.dtype.itemsize
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise TokenFileError(f"{path}: {error.strerror}; check the prefix or prepare the data") from error


def _map(path: Path, *, dtype: str | np.dtype, offset: int, count: int) -> np.ndarray:
    if count == 0:  # an empty region cannot be mapped
        return np.empty(0, dtype=dtype)
    # a plain ndarray view: np.memmap's own indexing costs a Python-level hook per access
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def _read_header(path: Path, size: int) -> tuple[np.dtype, int, int]:
    """Returns the dtype of the tokens, the number of sequences and the number of document indices."""
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise TokenFileError(
            f"{path}: byte 0: magic is {header[:9]!r}, not {MAGIC!r}: no Megatron index; check the prefix"
        )
    if len(header) < HEADER.size:
        raise TokenFileError(f"{path}: byte {size}: truncated inside the {HEADER.size}-byte header; {_AGAIN}")
    _, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if version != VERSION:
        raise TokenFileError(
            f"{path}: byte 9: version {version}, only {VERSION} is known; convert it with the tool that made it"
        )
    if code not in DTYPES:
        known = ", ".join(f"{key} {value.name}" for key, value in DTYPES.items())
        raise TokenFileError(f"{path}: byte 17: dtype code {code} is no integer type ({known}); prepare the data again")
    if num_indices < 1:
        raise TokenFileError(f"{path}: byte 26: 0 document indices, the first must be there; prepare the data again")
    expected = HEADER.size + 12 * num_sequences + 8 * num_indices
    if size == expected + num_sequences and num_sequences:
        raise TokenFileError(
            f"{path}: byte {expected}: holds multimodal modes, which are not supported; use a text-only file"
        )
    if size != expected:
        raise TokenFileError(
            f"{path}: byte {min(size, expected)}: {size} bytes where the counts at byte 18 ({num_sequences} sequences, "
            f"{num_indices} document indices) need {expected}; {_AGAIN}"
        )
    return DTYPES[code], num_sequences, num_indices


def _check_sequences(
    path: Path, lengths_N: np.ndarray, offsets_N: np.ndarray, offsets_at: int, *, itemsize: int
) -> int:
    """Sequences must follow one another without gaps, or a flat view is wrong. Returns the bytes .bin must have."""
    end = 0
    for begin in range(0, len(lengths_N), _CHUNK):
        sizes = lengths_N[begin : begin + _CHUNK].astype(np.int64) * itemsize
        ends = end + np.cumsum(sizes)
        bad = np.flatnonzero((sizes < 0) | (offsets_N[begin : begin + _CHUNK] != ends - sizes))
        if bad.size:
            i = begin + int(bad[0])
            raise TokenFileError(
                f"{path}: byte {offsets_at + 8 * i}: sequence {i} (length {lengths_N[i]}) starts at byte "
                f"{offsets_N[i]} of .bin, expected {ends[bad[0]] - sizes[bad[0]]} and a length of at least 0; {_AGAIN}"
            )
        end = int(ends[-1])
    return end


def _check_documents(path: Path, indices: np.ndarray, at: int, *, num_sequences: int) -> None:
    previous = 0
    for begin in range(0, len(indices), _CHUNK):
        chunk = indices[begin : begin + _CHUNK]
        bad = np.flatnonzero(np.diff(chunk, prepend=previous) < 0)
        if bad.size:
            i = begin + int(bad[0])
            raise TokenFileError(f"{path}: byte {at + 8 * i}: document index {i} goes back to {indices[i]}; {_AGAIN}")
        previous = int(chunk[-1])
    if indices[0] != 0 or indices[-1] != num_sequences:
        raise TokenFileError(
            f"{path}: byte {at}: document indices run from {indices[0]} to {indices[-1]}, "
            f"expected 0 to {num_sequences}; {_AGAIN}"
        )


class TokenWriter:
    """Streams documents into PREFIX.bin and PREFIX.idx, one sequence per document, in memory that does not grow.

    A context manager: the two files appear under their names only when the block ends without an error, so a killed
    run leaves no half file behind a good name. `num_tokens`, `num_documents`, `max_token_id` count as it goes.
    """

    def __init__(self, prefix: str | Path, dtype: str | np.dtype | type) -> None:
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
        self._temporary = {name: sibling(prefix, f".{name}.{temporary}") for name in ("bin", "lengths", "idx")}
        self._streams: dict[str, BinaryIO] = {}

    def __enter__(self) -> "TokenWriter":
        self._temporary["bin"].parent.mkdir(parents=True, exist_ok=True)
        self._streams = {name: self._temporary[name].open("xb") for name in ("bin", "lengths")}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for stream in self._streams.values():
                stream.close()
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def add(self, document_ids: np.ndarray) -> None:
        """Appends one document, ids [length] of any integer type; raises TokenFileError for ids `dtype` cannot hold."""
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
        self.num_tokens += ids.size
        self.num_documents += 1
        self.max_token_id = max(self.max_token_id, high)

    def _finish(self) -> None:
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        lengths_N = _map(self._temporary["lengths"], dtype="<i4", offset=0, count=self.num_documents)
        with open(self._temporary["idx"], "xb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, self._code, self.num_documents, self.num_documents + 1))
            chunks = range(0, self.num_documents, _CHUNK)
            for begin in chunks:
                stream.write(lengths_N[begin : begin + _CHUNK].tobytes())
            end = 0
            for begin in chunks:
                sizes = lengths_N[begin : begin + _CHUNK].astype("<i8") * self.dtype.itemsize
                ends = end + np.cumsum(sizes)
                stream.write((ends - sizes).astype("<i8").tobytes())
                end = int(ends[-1])
            for begin in range(0, self.num_documents + 1, _CHUNK):
                stream.write(np.arange(begin, min(begin + _CHUNK, self.num_documents + 1), dtype="<i8").tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        for name in ("bin", "idx"):
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
            raise TokenFileError(f"{path}: {error.strerror}; check the prefix or prepare the data") from error
        except ValueError as error:
            raise TokenFileError(f"{path}: no JSON ({error}); prepare the data again") from error
        if isinstance(value, dict) and value.get("format", MANIFEST_FORMAT) != MANIFEST_FORMAT:
            raise TokenFileError(
                f"{path}: format {value['format']}, only {MANIFEST_FORMAT} is known; prepare the data again"
            )
        manifest = _typed(Manifest, value, f"{path}: manifest")
        if not all(isinstance(part, dict) for part in (manifest.files, manifest.arguments)):
            raise TokenFileError(f"{path}: 'files' and 'arguments' must be objects; prepare the data again")
        if not isinstance(manifest.sources, list):
            raise TokenFileError(f"{path}: 'sources' must be a list; prepare the data again")
        files = {name: _typed(FileRecord, record, f"{path}: file {name!r}") for name, record in manifest.files.items()}
        if any(Path(name).name != name for name in (*files, manifest.tokenizer_file)):
            raise TokenFileError(f"{path}: a file name holds a folder; files lie beside their manifest")
        sources = (_typed(SourceRecord, record, f"{path}: source {i}") for i, record in enumerate(manifest.sources))
        return Manifest(**{**vars(manifest), "files": files, "sources": tuple(sources)})


def _typed(kind: type[T], value: Any, where: str) -> T:
    """A JSON object as the dataclass `kind`: its keys exactly, whole numbers not negative, text as text."""
    expected = {field.name: field.type for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    if not isinstance(value, dict) or value.keys() != expected.keys():
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise TokenFileError(f"{where}: keys {keys}, expected {sorted(expected)}; prepare the data again")
    for key, wanted in expected.items():
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
        found.append(
            f"{path}: the largest token id is {manifest.max_token_id}, the model's vocab_size is {vocab_size}; "
            f"set vocab_size to at least {manifest.max_token_id + 1} or prepare the data with a smaller vocabulary"
        )
    if manifest.num_tokens < sequence_length + 1:
        found.append(
            f"{path}: {manifest.num_tokens} tokens, one window needs {sequence_length + 1}; "
            "use a shorter sequence_length or more data"
        )
    return found


def file_problems(prefix: str | Path, manifest: Manifest, *, hashes: bool = False) -> list[str]:
    """Files that are missing, cut, changed or at odds with the manifest, one message each; see `problems`."""
    found = []
    folder = sibling(prefix, ".json").parent
    for name, record in manifest.files.items():
        try:
            size = _size(folder / name)
            if size != record.bytes:
                found.append(f"{folder / name}: {size} bytes, its manifest says {record.bytes}; {_AGAIN}")
            elif hashes and sha256_file(folder / name) != record.sha256:
                found.append(f"{folder / name}: SHA-256 differs from its manifest; {_AGAIN}")
        except (TokenFileError, OSError) as error:
            found.append(str(error))
    if found:
        return found
    try:
        token_file = TokenFile(prefix)
    except (TokenFileError, OSError) as error:
        return [str(error)]
    counts = (token_file.num_tokens, token_file.num_documents, token_file.dtype.name)
    if counts != (manifest.num_tokens, manifest.num_documents, manifest.dtype):
        found.append(
            f"{prefix}.idx: {counts[0]} tokens, {counts[1]} documents of {counts[2]}, its manifest says "
            f"{manifest.num_tokens}, {manifest.num_documents} of {manifest.dtype}; prepare the data again"
        )
    return found
