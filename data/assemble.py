"""From the workers' units to token files: duplicates out, documents into shards, each shard written by itself."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.encode import DOCUMENT, unit_path
from data.index import sha256_file, sibling
from data.tokens import FileRecord, TokenWriter

_PARTITION_DOCUMENTS = 1 << 22  # documents whose hashes are held at once: 120 MB
_PLACE = np.dtype([("unit", "<i4"), ("row", "<i8")])
_HASH = np.dtype([("name", "<u8"), ("rest", "<u8"), *((key, _PLACE[key]) for key in ("unit", "row"))])


@dataclass(frozen=True)
class Run:
    """Documents [begin, end) of one unit, in the order of the unit."""

    unit: int
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One token file to write; set_name is `train` or `heldout`, runs are where its documents come from."""

    name: str
    set_name: str
    runs: tuple[Run, ...]
    num_tokens: int


@dataclass(frozen=True)
class ShardResult:
    """What a shard holds. source_documents and source_bytes: by number of the input."""

    num_tokens: int
    num_documents: int
    max_token_id: int
    text_bytes: int
    num_turned: int
    num_split: int
    source_documents: dict[int, int]
    source_bytes: dict[int, int]
    content: str  # SHA-256 of .bin: the data's fingerprint
    files: dict[str, FileRecord]


def documents(work: Path, unit: int) -> np.ndarray:
    """Records [num_documents] of DOCUMENT of one unit, as a memory map."""
    path = unit_path(work, unit, "docs")
    if not path.stat().st_size:
        return np.empty(0, dtype=DOCUMENT)
    return np.memmap(path, dtype=DOCUMENT, mode="r")


def mark_duplicates(
    work: Path, num_units: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Writes WORK/unit-*.keep, a byte per document: 1 for the first of every group of equal ones. Returns the others.

    One pass puts the hashes into WORK/part-*, by the remainder of each; then every part is compared by itself. So
    memory does not grow with the corpus, and what is read grows no faster than it. on_progress: gets how far it is and
    the whole, in documents, each of which counts once in either.
    """
    sizes = [len(documents(work, unit)) for unit in range(num_units)]
    total = sum(sizes)
    partitions = max(1, -(-total // _PARTITION_DOCUMENTS))
    for unit, size in enumerate(sizes):
        np.ones(size, dtype=np.uint8).tofile(unit_path(work, unit, "keep"))
    for part in work.glob("part-*"):  # of a killed call
        part.unlink()
    on_progress(0, 2 * total)
    done = 0
    for hashes in _hashes(work, sizes):
        _append(work, hashes, partitions)
        done += len(hashes)
        on_progress(done, 2 * total)
    duplicates, held, num_held = 0, list[np.ndarray](), 0
    for partition in range(partitions):
        path = _part_path(work, partition)
        found = np.fromfile(path, dtype=_HASH) if path.exists() else np.empty(0, dtype=_HASH)
        path.unlink(missing_ok=True)
        again = _again(found)
        held, num_held, duplicates = [*held, again], num_held + len(again), duplicates + len(again)
        if num_held >= _PARTITION_DOCUMENTS or partition == partitions - 1:
            _drop(work, np.concatenate(held))
            held, num_held = [], 0
        done += len(found)
        on_progress(done, 2 * total)
    return duplicates


def _hashes(work: Path, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Every document's hash and place, [n] of _HASH, in the order of the input; one array is filled again and again."""
    buffer = np.empty(min(sum(sizes), _PARTITION_DOCUMENTS), dtype=_HASH)
    filled = 0
    for unit, size in enumerate(sizes):
        begin = 0
        while begin < size:
            end = min(size, begin + len(buffer) - filled)
            records, part = documents(work, unit)[begin:end], buffer[filled : filled + end - begin]
            part["name"], part["rest"] = records["name"], records["rest"]
            part["unit"], part["row"] = unit, np.arange(begin, end)
            begin, filled = end, filled + end - begin
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _append(work: Path, hashes: np.ndarray, partitions: int) -> None:
    """Each hash behind those that its part holds already."""
    numbers = hashes["name"] % np.uint64(partitions)
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(partitions, dtype=np.uint64), side="right").tolist()
    for partition, (begin, end) in enumerate(pairwise([0, *ends])):
        if begin < end:
            with open(_part_path(work, partition), "ab") as stream:
                stream.write(hashes[order[begin:end]].tobytes())


def _part_path(work: Path, partition: int) -> Path:
    return work / f"part-{partition:06d}"


def _again(found: np.ndarray) -> np.ndarray:
    """Places (unit, row) of those that have an equal one before them."""
    # stable: among equal hashes the first in the order of the input stays first
    ordered = found[np.lexsort((found["rest"], found["name"]))]
    again = np.zeros(len(ordered), dtype=bool)
    again[1:] = (ordered["name"][1:] == ordered["name"][:-1]) & (ordered["rest"][1:] == ordered["rest"][:-1])
    places = np.empty(np.count_nonzero(again), dtype=_PLACE)
    places["unit"], places["row"] = ordered["unit"][again], ordered["row"][again]
    return places


def _drop(work: Path, places: np.ndarray) -> None:
    """Takes documents out of what is kept."""
    places = places[np.argsort(places["unit"], kind="stable")]
    units, begins = np.unique(places["unit"], return_index=True)
    for unit, rows in zip(units.tolist(), np.split(places["row"], begins[1:]), strict=False):
        keep = np.memmap(unit_path(work, unit, "keep"), dtype=np.uint8, mode="r+")
        keep[rows] = 0
        keep.flush()


def kept(work: Path, unit: int) -> np.ndarray:
    """Bool [num_documents] of one unit, after `mark_duplicates`."""
    return np.fromfile(unit_path(work, unit, "keep"), dtype=np.uint8).astype(bool)


def plan_shards(work: Path, num_units: int, shard_tokens: int) -> list[Shard]:
    """Shards of about shard_tokens, whole documents in the order of the input; a pure function of the units."""
    shards = []
    for set_name, heldout in (("train", 0), ("heldout", 1)):
        groups: list[list[Run]] = [[]]
        totals = [0]
        for unit in range(num_units):
            records = documents(work, unit)
            chosen = np.flatnonzero(kept(work, unit) & (records["heldout"] == heldout))
            lengths = np.asarray(records["length"])[chosen].astype(np.int64)
            begin = 0
            while begin < len(chosen):
                room = shard_tokens - totals[-1]
                count = int(np.searchsorted(np.cumsum(lengths[begin:]), room, side="right"))
                count = max(count, 0 if totals[-1] else 1)  # a document longer than a shard gets its own
                if count:
                    end = begin + count
                    groups[-1].append(Run(unit, int(chosen[begin]), int(chosen[end - 1]) + 1))
                    totals[-1] += int(lengths[begin:end].sum())
                    begin = end
                if begin < len(chosen):
                    groups.append([])
                    totals.append(0)
        if groups == [[]]:
            continue
        names = [set_name] if len(groups) == 1 else [f"{set_name}-{number:05d}" for number in range(len(groups))]
        shards += [Shard(name, set_name, tuple(r), n) for name, r, n in zip(names, groups, totals, strict=True)]
    return shards


def write_shard(shard: Shard, out: Path, work: Path, dtype: str, sources: Sequence[int]) -> ShardResult:
    """OUT/NAME.bin, .idx and .ids, unless a complete result is there already. sources: input number of each unit."""
    marker = work / f"shard-{shard.name}.json"
    if marker.exists():
        return _result(json.loads(marker.read_text(encoding="utf-8")))
    turned = split = text_bytes = 0
    source_documents: dict[int, int] = {}
    source_bytes: dict[int, int] = {}
    prefix = out / shard.name
    with TokenWriter(prefix, dtype, with_ids=True) as writer:
        for run in shard.runs:
            source = sources[run.unit]
            for record, ids in _documents_of(run, shard.set_name, work, writer.dtype):
                writer.add(ids, name=int(record["name"]))
                turned, split = turned + int(record["turned"]), split + int(record["num_split"])
                size = int(record["text_bytes"])
                text_bytes += size
                source_documents[source] = source_documents.get(source, 0) + 1
                source_bytes[source] = source_bytes.get(source, 0) + size
    paths = [sibling(prefix, ending) for ending in (".bin", ".idx", ".ids")]
    files = {path.name: FileRecord(path.stat().st_size, sha256_file(path)) for path in paths}
    result = ShardResult(
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        max_token_id=writer.max_token_id,
        text_bytes=text_bytes,
        num_turned=turned,
        num_split=split,
        source_documents=source_documents,
        source_bytes=source_bytes,
        content=files[paths[0].name].sha256,
        files=files,
    )
    temporary = marker.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(temporary, marker)
    return result


def _documents_of(run: Run, set_name: str, work: Path, dtype: np.dtype) -> Iterator[tuple[np.void, np.ndarray]]:
    records = documents(work, run.unit)
    lengths = np.asarray(records["length"]).astype(np.int64)
    ends = np.cumsum(lengths)
    tokens = np.memmap(unit_path(work, run.unit, "tokens"), dtype=dtype, mode="r").view(np.ndarray)
    chosen = kept(work, run.unit) & (records["heldout"] == (set_name == "heldout"))
    for row in np.flatnonzero(chosen[run.begin : run.end]) + run.begin:
        yield records[row], tokens[ends[row] - lengths[row] : ends[row]]


def _result(value: dict) -> ShardResult:
    numbered = {
        key: {int(number): count for number, count in value[key].items()}
        for key in ("source_documents", "source_bytes")
    }
    files = {name: FileRecord(**record) for name, record in value["files"].items()}
    return ShardResult(**{**value, **numbered, "files": files})
