"""Text in files, cut into units that workers read one by one: JSON lines, parquet and folders of text.

Every line, row or file is either a document or a reject with its reason; nothing is left out in silence. The cut into
units does not change what is read, nor in which order: it only decides what one worker does at a time.
"""

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_NO_PYARROW = "parquet needs pyarrow, which is not installed; run `pip install 'expertpipe[data]'`"
JSON_LINES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"
_EXCERPT = 120  # bytes of a reject that are kept to recognise it
MIN_UNIT_BYTES = 4 << 20
MAX_UNITS = 20_000


class InputError(ValueError):
    """Inputs that cannot be read at all; one line each in `errors`."""

    user_error = True

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


class PrepareError(ValueError):
    """What was read cannot give the token files that are asked for."""

    user_error = True


@contextmanager
def named_os_errors(path: str | Path) -> Iterator[None]:
    """Turns what the system refuses inside the block into a PrepareError that names its file, or `path` if it has none.

    Writing to a full disk is one that names none.
    """
    try:
        yield
    except OSError as error:
        where = path if error.filename is None else error.filename
        raise PrepareError(
            f"{where}: {error.strerror or error}; when that is put right, the same command continues"
        ) from error


@dataclass(frozen=True)
class Source:
    """An input and what the manifest says of it: its name, its terms, and where it comes from."""

    path: str
    name: str
    licence: str
    origin: str


@dataclass(frozen=True)
class Unit:
    """Part of the input: bytes [begin, end) of a JSON-lines file, row group `begin` of a parquet file, or text files.

    source: number of the input it belongs to. size_bytes: what it weighs in the progress.
    """

    kind: str
    source: int
    paths: tuple[str, ...]
    begin: int
    end: int
    size_bytes: int


@dataclass(frozen=True)
class Text:
    """A document as UTF-8 bytes that are known to decode, and as text."""

    raw: bytes
    text: str


@dataclass(frozen=True)
class Reject:
    """What is set aside: line counts from 1 in the file (row in parquet, 0 for whole files), byte_offset from 0.

    byte_offset is None where a format has no such thing. In one unit lines count from the unit's own first line.
    """

    file: str
    line: int
    byte_offset: int | None
    reason: str
    detail: str
    excerpt: str


Item = Text | Reject


@dataclass(frozen=True)
class FileState:
    """Size and time of an input file, by which a change is seen."""

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Plan:
    """Everything that will be read, in order, and what is left out already."""

    units: tuple[Unit, ...]
    files: tuple[FileState, ...]
    rejects: tuple[Reject, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all units."""
        return sum(unit.size_bytes for unit in self.units)


def plan(inputs: Sequence[str | Path], *, text_key: str) -> Plan:
    """The units of files and folders, in the order given, folders sorted.

    Raises InputError with all that cannot be read: missing paths, files and folders that may not be read, parquet files
    without the column, zstd.
    """
    errors: list[str] = []
    rejects: list[Reject] = []
    found = [(number, path) for number, root in enumerate(inputs) for path in _files(Path(root), errors, rejects)]
    closed = [path for _, path in found if not os.access(path, os.R_OK)]
    if closed:
        raise InputError([*errors, *(f"{path}: may not be read (permission denied)" for path in closed)])
    states = []
    for _, path in found:
        status = path.stat()
        states.append(FileState(str(path), status.st_size, status.st_mtime_ns))
    unit_bytes = max(MIN_UNIT_BYTES, sum(state.bytes for state in states) // MAX_UNITS)
    units: list[Unit] = []
    for (source, path), state in zip(found, states, strict=True):
        units += _units_of(path, source, state.bytes, unit_bytes, text_key, errors)
    if not errors and not found:
        errors.append(f"{', '.join(map(str, inputs))}: no file to read; give JSON lines, parquet or text files")
    if errors:
        raise InputError(errors)
    return Plan(tuple(_joined(units, unit_bytes)), tuple(states), tuple(rejects))


def _files(root: Path, errors: list[str], rejects: list[Reject]) -> Iterator[Path]:
    """Regular files at or below root; links and hidden files below it are set aside: aliases, and version control."""
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        errors.append(f"{root}: no such file or folder")
        return
    for folder, subfolders, names in os.walk(
        root, followlinks=False, onerror=lambda error: errors.append(f"{error.filename}: {error.strerror}")
    ):
        subfolders.sort()
        for name in [name for name in subfolders if name.startswith(".") or Path(folder, name).is_symlink()]:
            subfolders.remove(name)
            reason = "symbolic link" if Path(folder, name).is_symlink() else "hidden folder"
            rejects.append(Reject(str(Path(folder, name)), 0, None, reason, "not followed", ""))
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or name.startswith(".") or not path.is_file():
                reason = "symbolic link" if path.is_symlink() else "hidden or special file"
                rejects.append(Reject(str(path), 0, None, reason, "not read", ""))
            else:
                yield path


def _units_of(path: Path, source: int, size: int, unit_bytes: int, key: str, errors: list[str]) -> list[Unit]:
    name = path.name.lower()
    if name.endswith((".zst", ".zstd")):
        errors.append(f"{path}: compressed with zstd; unpack it, or compress it with gzip")
        return []
    if name.endswith(tuple(f"{ending}.gz" for ending in JSON_LINES)):
        return [Unit("jsonl.gz", source, (str(path),), 0, size, size)]
    if name.endswith(JSON_LINES):
        cuts = [*range(0, max(size, 1), unit_bytes), size]
        return [Unit("jsonl", source, (str(path),), begin, end, end - begin) for begin, end in itertools.pairwise(cuts)]
    if name.endswith(".parquet"):
        return _parquet_units(path, source, key, errors)
    return [Unit("text", source, (str(path),), 0, size, size)]


def _joined(units: Sequence[Unit], unit_bytes: int) -> Iterator[Unit]:
    """Neighbouring text files of one source together, up to unit_bytes: a unit per file would be too many."""
    held: list[Unit] = []
    for unit in [*units, None]:
        fits = (
            held and unit and unit.kind == "text" and unit.source == held[0].source
            and sum(part.size_bytes for part in held) + unit.size_bytes <= unit_bytes
        )  # fmt: skip
        if held and not fits:
            size = sum(part.size_bytes for part in held)
            yield Unit("text", held[0].source, tuple(part.paths[0] for part in held), 0, size, size)
            held = []
        if unit and unit.kind == "text":
            held.append(unit)
        elif unit:
            yield unit


def read(unit: Unit, *, text_key: str, count_line: Callable[[], None]) -> Iterator[Item]:
    """The documents and rejects of one unit, in order; count_line is called for every line of a JSON-lines unit.

    Raises PrepareError for a file that the system will not give.
    """
    for path in unit.paths:  # several of a text unit alone
        with named_os_errors(path):
            if unit.kind == "parquet":
                yield from _read_parquet(unit, text_key)
            elif unit.kind == "text":
                yield text_or_reject(Path(path).read_bytes(), path, 0, 0)
            else:
                yield from _read_lines(unit, text_key, count_line)


def text_or_reject(raw: bytes, file: str, line: int, offset: int | None) -> Item:
    """A document, unless its bytes are no UTF-8 or blanks alone; where they were found goes into the reject."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = None if offset is None else offset + error.start
        return _reject(file, line, at, "invalid UTF-8", f"{error.reason} at byte {error.start}", raw)
    if not text.strip():
        return _reject(file, line, offset, "empty document", f"{len(raw)} bytes of blanks" if raw else "", raw)
    return Text(raw, text)


def _reject(file: str, line: int, offset: int | None, reason: str, detail: str, raw: bytes) -> Reject:
    return Reject(file, line, offset, reason, detail, raw[:_EXCERPT].decode("utf-8", "backslashreplace"))


def _read_lines(unit: Unit, key: str, count_line: Callable[[], None]) -> Iterator[Item]:
    """A line belongs to the unit in which it starts."""
    file = unit.paths[0]
    with closing(gzip.open(file, "rb") if unit.kind == "jsonl.gz" else open(file, "rb")) as stream:
        if unit.kind == "jsonl" and unit.begin > 0:
            stream.seek(unit.begin - 1)
            stream.readline()
        offset, line = stream.tell(), 0
        while unit.kind == "jsonl.gz" or offset < unit.end:
            try:
                raw = stream.readline()
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                yield _reject(file, line + 1, None, "damaged gzip", f"{error}: nothing after this was read", b"")
                return
            if not raw:
                return
            line += 1
            count_line()
            yield _json_document(raw, file, line, offset, key)
            offset += len(raw)


def _json_document(raw: bytes, file: str, line: int, offset: int, key: str) -> Item:
    body = raw.removeprefix(_BOM).strip() if offset == 0 else raw.strip()
    if not body:
        return _reject(file, line, offset, "empty line", "", raw)
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = offset + raw.index(body) + error.start
        return _reject(file, line, at, "invalid UTF-8", f"{error.reason} at byte {error.start} of the line", raw)
    except (ValueError, RecursionError) as error:
        return _reject(file, line, offset, "corrupt JSON", str(error).splitlines()[0], raw)
    if not isinstance(value, dict) or key not in value:
        keys = ", ".join(sorted(value)[:8]) if isinstance(value, dict) else type(value).__name__
        return _reject(file, line, offset, "no text key", f"no {key!r}, there is {keys or 'nothing'}", raw)
    if not isinstance(value[key], str):
        return _reject(file, line, offset, "text is no string", f"{key!r} is {type(value[key]).__name__}", raw)
    try:
        return text_or_reject(value[key].encode("utf-8"), file, line, offset)
    except UnicodeEncodeError as error:
        detail = f"character {error.start} is half of a surrogate pair"
        return _reject(file, line, offset, "invalid Unicode", detail, raw)


def _pyarrow(path: str | Path) -> Any:
    """The package, its parquet module loaded; InputError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError([f"{path}: {_NO_PYARROW}"]) from error
    return pyarrow


def _parquet_units(path: Path, source: int, key: str, errors: list[str]) -> list[Unit]:
    if any(_NO_PYARROW in error for error in errors):
        return []  # said once, with the first of them
    try:
        arrow = _pyarrow(path)
    except InputError as error:
        errors += error.errors
        return []
    try:
        with arrow.parquet.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (arrow.ArrowException, OSError) as error:
        errors.append(f"{path}: no parquet file ({str(error).splitlines()[0]})")
        return []
    if key not in schema.names:
        errors.append(f"{path}: no column {key!r}, there are {', '.join(schema.names)}; give --text-key")
        return []
    kind = schema.field(key).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        errors.append(f"{path}: column {key!r} is {kind}, not text; give --text-key")
        return []
    first, units = 0, []
    for number, (rows, size) in enumerate(sizes):
        units.append(Unit("parquet", source, (str(path),), number, first, size))
        first += rows
    return units


def _read_parquet(unit: Unit, key: str) -> Iterator[Item]:
    """Row group `unit.begin`; `unit.end` rows come before it."""
    file = unit.paths[0]
    row, arrow = unit.end, _pyarrow(file)
    try:
        with arrow.parquet.ParquetFile(file) as source:
            table = source.read_row_group(unit.begin, columns=[key])
            # as bytes: one bad string must not take the others of its row group with it
            values = table.column(0).cast(arrow.large_binary()).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # of the system; damage has no number
            raise
        reason = f"row group {unit.begin}: {str(error).splitlines()[0]}"
        yield _reject(file, row + 1, None, "damaged row group", reason, b"")
        return
    for value in values:
        row += 1
        if value is None:
            yield _reject(file, row, None, "empty document", "null", b"")
        else:
            yield text_or_reject(value, file, row, None)


def reject_json(reject: Reject) -> str:
    """One line of the rejects file."""
    return json.dumps(asdict(reject), ensure_ascii=False) + "\n"
