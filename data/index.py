"""The token files' format: Megatron's PREFIX.bin/PREFIX.idx as one flat memory map.

Layout of .idx, little endian, unpadded: 0 magic (9 bytes), 9 u64 version, 17 u8 dtype code, 18 u64 sequences S,
26 u64 D = documents + 1, 34 i32[S] lengths in tokens, i64[S] byte offsets into .bin, i64[D] document indices.
.bin holds the raw tokens. Source: the format written by Megatron-LM's indexed dataset builder.

Megatron's own reader checks the magic and the version only, so a truncated copy trains on whatever is there. This one
checks what the index implies before the first token is served.
"""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: Mapping[int, np.dtype] = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
CHUNK = 1 << 20  # entries handled at once, so that memory does not grow with the number of documents
SCAN_SEQUENCES = 1 << 22  # an index of up to 80 MB is checked entry by entry at start
_AGAIN = "copy the file again from its source or prepare the data again"


class TokenFileError(ValueError):
    """A token file or its manifest is missing, damaged or does not fit what is asked of it."""

    user_error = True  # the message alone says what to change


def sibling(prefix: str | Path, ending: str) -> Path:
    """PREFIX + `ending`; not Path.with_suffix, which would eat the last part of a prefix such as corpus.v2."""
    return Path(f"{prefix}{ending}")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in bounded memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class TokenFile:
    """PREFIX.bin as one flat array, validated against PREFIX.idx.

    tokens: read-only memory map [num_tokens] of `dtype`; documents lie in it one after another. scan: check every
    entry of the index; None: of up to SCAN_SEQUENCES sequences every entry, beyond that the header, the sizes and both
    ends of each array, so that a reader starts in constant time. Raises TokenFileError naming the file, the byte
    offset and what to do.
    """

    def __init__(self, prefix: str | Path, *, scan: bool | None = None) -> None:
        self.prefix = str(prefix)
        index_path, bin_path = sibling(prefix, ".idx"), sibling(prefix, ".bin")
        index_bytes, bin_bytes = file_size(index_path), file_size(bin_path)
        self.dtype, self.num_sequences, num_indices = _read_header(index_path, index_bytes)
        self.num_documents = num_indices - 1
        offsets_at = HEADER.size + 4 * self.num_sequences
        documents_at = offsets_at + 8 * self.num_sequences
        self._lengths_N = map_array(index_path, dtype="<i4", offset=HEADER.size, count=self.num_sequences)
        self._offsets_N = map_array(index_path, dtype="<i8", offset=offsets_at, count=self.num_sequences)
        self._document_indices = map_array(index_path, dtype="<i8", offset=documents_at, count=num_indices)
        check = _Check(index_path, self.dtype.itemsize, offsets_at, documents_at)
        whole = self.num_sequences <= SCAN_SEQUENCES if scan is None else scan
        if whole:
            end = check.sequences(self._lengths_N, self._offsets_N)
        else:
            end = check.last_sequence(self._lengths_N, self._offsets_N)
        if end != bin_bytes:
            state = "truncated" if bin_bytes < end else "longer than its index says"
            message = (
                f"{bin_path}: byte {min(end, bin_bytes)}: {state}: {bin_bytes} bytes where .idx needs {end}; {_AGAIN}"
            )
            raise TokenFileError(message)
        if whole:
            check.document_order(self._document_indices)
        check.document_ends(self._document_indices, num_sequences=self.num_sequences)
        self.num_tokens = bin_bytes // self.dtype.itemsize
        self.tokens = map_array(bin_path, dtype=self.dtype, offset=0, count=self.num_tokens)

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` as a view [length] of the memory map, end-of-sentence id included."""
        assert 0 <= index < self.num_documents, f"document {index} of {self.num_documents}"
        begin, end = (self._token_offset(int(self._document_indices[i])) for i in (index, index + 1))
        return self.tokens[begin:end]

    def documents(self) -> Iterator[np.ndarray]:
        """Every document in file order."""
        return (self.document(index) for index in range(self.num_documents))

    def documents_at(self, begin: int, end: int) -> tuple[int, np.ndarray]:
        """First document that overlaps tokens [begin, end), and where each one from it on begins: int64 [n + 1].

        The last entry is where the last of them ends, so document first + j holds tokens [starts[j], starts[j + 1]).
        Empty documents do not count as overlapping, but are listed between those that do. A binary search in the
        memory map. Raises TokenFileError if the entries it used contradict one another.
        """
        assert 0 <= begin < end <= self.num_tokens
        itemsize = self.dtype.itemsize
        # bisect and not np.searchsorted, which would first copy the whole index because its arrays are not aligned
        sequences = (bisect_right(self._offsets_N, token * itemsize) - 1 for token in (begin, end - 1))
        first, last = (bisect_right(self._document_indices, sequence) - 1 for sequence in sequences)
        indices = self._document_indices[first : last + 2]
        starts = self._offsets_N[np.minimum(indices, self.num_sequences - 1)] // itemsize
        starts[indices == self.num_sequences] = self.num_tokens
        if not (starts[0] <= begin < end <= starts[-1]) or np.any(np.diff(starts) < 0):
            raise TokenFileError(
                f"{self.prefix}.idx: documents {first} to {last} contradict the index's own order; {_AGAIN}"
            )
        return first, starts

    def first_outside(self, vocab_size: int) -> int | None:
        """Offset in tokens of the first id outside [0, vocab_size), None if there is none; reads all, in parts."""
        for begin in range(0, self.num_tokens, CHUNK):
            part = self.tokens[begin : begin + CHUNK]
            if part.min() < 0 or part.max() >= vocab_size:
                return begin + int(np.argmax((part < 0) | (part >= vocab_size)))
        return None

    def _token_offset(self, sequence: int) -> int:
        return (
            self.num_tokens if sequence == self.num_sequences else int(self._offsets_N[sequence]) // self.dtype.itemsize
        )


def file_size(path: Path) -> int:
    """Bytes of a file; TokenFileError if it is not there."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise TokenFileError(f"{path}: {error.strerror}; check the prefix or prepare the data") from error


def map_array(path: Path, *, dtype: str | np.dtype, offset: int, count: int) -> np.ndarray:
    """A read-only view [count] of a file from byte `offset` on."""
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


@dataclass(frozen=True)
class _Check:
    """What one index must satisfy for a flat view of .bin to be right; every error names the byte in .idx."""

    path: Path
    itemsize: int
    offsets_at: int
    documents_at: int

    def sequences(self, lengths_N: np.ndarray, offsets_N: np.ndarray) -> int:
        """Sequences must follow one another without gaps. Returns the bytes .bin must have."""
        end = 0
        for begin in range(0, len(lengths_N), CHUNK):
            sizes = lengths_N[begin : begin + CHUNK].astype(np.int64) * self.itemsize
            ends = end + np.cumsum(sizes)
            bad = np.flatnonzero((sizes < 0) | (offsets_N[begin : begin + CHUNK] != ends - sizes))
            if bad.size:
                i = begin + int(bad[0])
                self._refuse_sequence(i, int(lengths_N[i]), int(offsets_N[i]), int(ends[bad[0]] - sizes[bad[0]]))
            end = int(ends[-1])
        return end

    def last_sequence(self, lengths_N: np.ndarray, offsets_N: np.ndarray) -> int:
        """As `sequences`, from the two ends alone."""
        if not len(lengths_N):
            return 0
        length, offset = int(lengths_N[-1]), int(offsets_N[-1])
        if offsets_N[0] != 0 or lengths_N[0] < 0:
            self._refuse_sequence(0, int(lengths_N[0]), int(offsets_N[0]), 0)
        if length < 0 or offset < 0:
            self._refuse_sequence(len(lengths_N) - 1, length, offset, max(0, offset))
        return offset + length * self.itemsize

    def _refuse_sequence(self, i: int, length: int, offset: int, expected: int) -> NoReturn:
        raise TokenFileError(
            f"{self.path}: byte {self.offsets_at + 8 * i}: sequence {i} (length {length}) starts at byte "
            f"{offset} of .bin, expected {expected} and a length of at least 0; {_AGAIN}"
        )

    def document_order(self, indices: np.ndarray) -> None:
        """Document indices must not go back."""
        previous = 0
        for begin in range(0, len(indices), CHUNK):
            chunk = indices[begin : begin + CHUNK]
            bad = np.flatnonzero(np.diff(chunk, prepend=previous) < 0)
            if bad.size:
                i = begin + int(bad[0])
                raise TokenFileError(
                    f"{self.path}: byte {self.documents_at + 8 * i}: document index {i} goes back to {indices[i]}; "
                    f"{_AGAIN}"
                )
            previous = int(chunk[-1])

    def document_ends(self, indices: np.ndarray, *, num_sequences: int) -> None:
        """Document indices run from the first sequence to the last."""
        if indices[0] != 0 or indices[-1] != num_sequences:
            raise TokenFileError(
                f"{self.path}: byte {self.documents_at}: document indices run from {indices[0]} to {indices[-1]}, "
                f"expected 0 to {num_sequences}; {_AGAIN}"
            )
