"""`expertpipe bench data`: readers of token files side by side, in turns, each in a process of its own.

Rows: reader, tokens_per_second (median of the rounds), ratio_to_memmap (median over rounds of the ratio to the bare
memory map in the same round) with its lowest and highest, startup_seconds to the first batch (imports not counted) and
rss_bytes then. `ours, 14.8T tokens` starts on sparse files of that size. Readers that are not installed are named with
the command that installs them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.index import HEADER, MAGIC, VERSION, sha256_file, sibling
from data.tokens import FileRecord, Manifest, TokenWriter
from launcher.bench.readers import MODULES, READERS, Task

INSTALL = {
    "grain": "pip install -c constraints.txt grain",
    "torchdata": "pip install -c constraints.txt torchdata",
    "megatron": "pip install -c constraints.txt 'expertpipe[megatron]'",
}
REPORT_TOKENS = 14_800_000_000_000
_ROOT = Path(__file__).parents[2]
_ROUND_SECONDS = 0.4
_SHARDS, _DOCUMENT_TOKENS = 64, 1000


class BenchError(RuntimeError):
    """A reader stopped before it answered."""

    user_error = True


@dataclass(frozen=True)
class Row:
    """One reader's figures; None where it has none. note: how to install it, or what was not measured."""

    reader: str
    tokens_per_second: float | None
    ratio_to_memmap: float | None
    ratio_lowest: float | None
    ratio_highest: float | None
    startup_seconds: float | None
    rss_bytes: int | None
    note: str = ""


class Child:
    """A reader in its own process, which waits between rounds. A context manager, which ends it."""

    def __init__(self, name: str, task: Path, python: str) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [python, "-m", "launcher.bench.readers", name, str(task)],
            cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started = self._answer()

    def run(self, batches: int) -> float:
        """Seconds for a number of batches."""
        assert self._process.stdin is not None
        print(batches, file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = (self._process.communicate()[1].strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"bench data: reader {self._name} stopped: {last}")
        return json.loads(line)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()  # waits, and closes the pipes


def bench_data(argv: Sequence[str]) -> int:
    """Runs `expertpipe bench data` with its arguments; the exit code."""
    parser = ArgumentParser(prog="expertpipe bench data", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON line a reader instead of a table")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64_000_000, help="size of the generated file (default 64e6)")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the other readers")
    args = parser.parse_args(argv)
    least = args.batch_size * (args.sequence_length + 1)
    if min(args.rounds, args.batch_size, args.sequence_length) < 1 or args.tokens < 2 * least:
        raise BenchError(
            "bench data: --rounds, --batch-size and --sequence-length must be at least 1, "
            f"--tokens at least {2 * least} for two batches"
        )
    with tempfile.TemporaryDirectory(prefix="expertpipe-bench-") as folder:
        task = Task(generate(Path(folder), args.tokens), args.sequence_length, args.batch_size, f"{folder}/cache")
        rows = measure(task, Path(folder), rounds=args.rounds, peer_python=args.peer_python)
        rows.append(start_at_report_size(task, Path(folder)))
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return 0
    print(f"{'reader':<20}{'Mtokens/s':>10}{'ratio to memmap':>24}{'start s':>10}{'MB':>8}")
    for row in rows:
        print(_line(row))
    return 0


def _line(row: Row) -> str:
    if row.startup_seconds is None or row.rss_bytes is None:
        return f"{row.reader:<20}{row.note}"
    speed, ratio = "-", "-"
    if row.tokens_per_second is not None and row.ratio_to_memmap is not None:
        speed = f"{row.tokens_per_second / 1e6:.1f}"
        ratio = f"{row.ratio_to_memmap:.2f} ({row.ratio_lowest:.2f} to {row.ratio_highest:.2f})"
    return f"{row.reader:<20}{speed:>10}{ratio:>24}{row.startup_seconds:>10.3f}{row.rss_bytes / 1e6:>8.0f}"


def generate(folder: Path, num_tokens: int) -> str:
    """A file of random int32 tokens in documents of a thousand; gives its prefix."""
    draw = np.random.default_rng(0)
    with TokenWriter(folder / "tokens", "int32") as writer:
        for begin in range(0, num_tokens, _DOCUMENT_TOKENS):
            writer.add(draw.integers(6, 128_000, size=min(_DOCUMENT_TOKENS, num_tokens - begin)))
    return str(folder / "tokens")


def measure(task: Task, folder: Path, *, rounds: int, peer_python: str) -> list[Row]:
    """Every reader in turn, `rounds` times, while the others wait."""
    path = folder / "task.json"
    path.write_text(json.dumps(asdict(task)))
    children: dict[str, Child] = {}
    missing = [name for name in MODULES if not _installed(name, peer_python)]
    with ExitStack() as stack:
        for name in READERS:
            if name not in missing:
                python = peer_python if name in MODULES else sys.executable
                children[name] = stack.enter_context(Child(name, path, python))
        batches = {name: _calibrate(child) for name, child in children.items()}
        seconds: dict[str, list[float]] = {name: [] for name in children}
        for _ in range(rounds):
            for name, child in children.items():
                seconds[name].append(child.run(batches[name]) / batches[name])
    tokens = task.batch_size * task.sequence_length
    rows = []
    for name, child in children.items():
        ratios = [bar / own for bar, own in zip(seconds["memmap"], seconds[name], strict=True)]
        rows.append(
            Row(
                reader=name,
                tokens_per_second=tokens / statistics.median(seconds[name]),
                ratio_to_memmap=statistics.median(ratios),
                ratio_lowest=min(ratios),
                ratio_highest=max(ratios),
                startup_seconds=child.started["startup_seconds"],
                rss_bytes=child.started["rss_bytes"],
            )
        )
    none = (None,) * 6
    return rows + [Row(name, *none, note=f"not installed: {INSTALL[name]}") for name in missing]


def _installed(name: str, python: str) -> bool:
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({MODULES[name].split('.')[0]!r}) is None)"
    return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0


def _calibrate(child: Child) -> int:
    """Batches of about one round; the first ones also warm the reader up."""
    batches = 1
    while (seconds := child.run(batches)) < _ROUND_SECONDS / 4:
        batches *= 2
    return max(1, round(batches * _ROUND_SECONDS / seconds))


def start_at_report_size(task: Task, folder: Path) -> Row:
    """How long ours takes to its first batch on 14.8T tokens in sparse files, and what memory it then has."""
    prefix = sparse_manifest(folder, REPORT_TOKENS)
    path = folder / "sparse.json"
    path.write_text(json.dumps(asdict(task) | {"prefix": prefix}))
    with Child("ours", path, sys.executable) as child:
        started = child.started
    note = "start-up only: the files are holes"
    return Row("ours, 14.8T tokens", None, None, None, None, started["startup_seconds"], started["rss_bytes"], note)


def sparse_manifest(folder: Path, num_tokens: int) -> str:
    """Files of the sizes that num_tokens would have, holes but for what a start reads; gives their prefix."""
    shard_tokens = num_tokens // _SHARDS
    documents = shard_tokens // _DOCUMENT_TOKENS
    assert documents * _DOCUMENT_TOKENS * _SHARDS == num_tokens
    files = {}
    for number in range(_SHARDS):
        shard = folder / f"report-{number:05d}"
        with open(sibling(shard, ".bin"), "wb") as stream:
            stream.truncate(4 * shard_tokens)
        with open(sibling(shard, ".idx"), "wb") as stream:
            offsets_at, documents_at = HEADER.size + 4 * documents, HEADER.size + 12 * documents
            stream.truncate(documents_at + 8 * (documents + 1))
            ends = [
                (0, HEADER.pack(MAGIC, VERSION, 4, documents, documents + 1)),
                (HEADER.size, np.array([_DOCUMENT_TOKENS], "<i4").tobytes()),
                (offsets_at - 4, np.array([_DOCUMENT_TOKENS], "<i4").tobytes()),
                (documents_at - 8, np.array([4 * (shard_tokens - _DOCUMENT_TOKENS)], "<i8").tobytes()),
                (documents_at + 8 * documents, np.array([documents], "<i8").tobytes()),
            ]
            for at, raw in ends:
                stream.seek(at)
                stream.write(raw)
        for ending in (".bin", ".idx"):
            file = sibling(shard, ending)
            files[file.name] = FileRecord(file.stat().st_size, "0" * 64)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    files[tokenizer.name] = FileRecord(2, sha256_file(tokenizer))
    Manifest(
        tokenizer_file=tokenizer.name, tokenizer_sha256=files[tokenizer.name].sha256, vocab_size=128_815,
        dtype="int32", num_tokens=num_tokens, num_documents=documents * _SHARDS, max_token_id=128_814,
        text_bytes=4 * num_tokens, files=files, sources=(), arguments={}, corpus_sha256="0" * 64,
        shards=tuple(f"report-{number:05d}" for number in range(_SHARDS)),
    ).write(folder / "report")  # fmt: skip
    return str(folder / "report")
