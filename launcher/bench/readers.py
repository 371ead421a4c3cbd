"""One reader of token files in a process of its own, driven by lines on stdin: a part of `expertpipe bench data`.

    python -m launcher.bench.readers READER TASK.json

answers with one JSON line when its first batch is there, then one for every number of batches read from stdin. All
readers give windows of S + 1 tokens in an order of their own, batched by B, on one process without workers: ours,
memmap and torchdata as int64, grain as int64, megatron with its labels, loss mask and position ids.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """Token files at `prefix` (int32), windows of sequence_length + 1, batch_size of them at a time."""

    prefix: str
    sequence_length: int
    batch_size: int
    cache: str


Batches = Iterator[Any]


class _Rows:
    """Window i of the flat file as int64 [S + 1]: what a user of a data-loading library writes first."""

    def __init__(self, task: Task) -> None:
        self._tokens = np.memmap(f"{task.prefix}.bin", dtype="<i4", mode="r").view(np.ndarray)
        self._length = task.sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, index: Any) -> np.ndarray:
        begin = int(index) * self._length
        return self._tokens[begin : begin + self._length + 1].astype(np.int64)


def ours(task: Task) -> Batches:
    """data.loader, as a training step calls it."""
    from data.config import DataConfig
    from data.loader import Loader

    loader = Loader(DataConfig(task.prefix, task.sequence_length))
    consumed = 0
    while True:
        yield loader.microbatch(
            consumed=consumed, microbatch=0, data_rank=0, data_size=1, micro_batch_size=task.batch_size
        )
        consumed += task.batch_size


def memmap(task: Task) -> Batches:
    """The bar: random windows copied from the memory map into a batch, nothing else."""
    tokens = np.memmap(f"{task.prefix}.bin", dtype="<i4", mode="r").view(np.ndarray)
    draw, length = np.random.default_rng(0), task.sequence_length + 1
    while True:
        out = np.empty((task.batch_size, length), dtype=np.int64)
        for row, start in zip(out, draw.integers(len(tokens) - length, size=task.batch_size).tolist(), strict=True):
            row[:] = tokens[start : start + length]
        yield out


def grain(task: Task) -> Batches:
    """grain.MapDataset, shuffled and batched, without reading threads: one thread for every reader."""
    import grain  # type: ignore[import-not-found]

    dataset = grain.MapDataset.source(_Rows(task)).seed(0).shuffle().repeat().batch(task.batch_size)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def torchdata(task: Task) -> Batches:
    """StatefulDataLoader over a map-style dataset, shuffled, without workers."""
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found]

    class Windows(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.rows = _Rows(task)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(self.rows[index])

    loader = StatefulDataLoader(Windows(), batch_size=task.batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def megatron(task: Task) -> Batches:
    """megatron-core's GPTDataset without attention mask, read in the order of its indices, stacked."""
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # type: ignore[import-not-found]
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # type: ignore[import-not-found]
    from megatron.core.datasets.utils import Split  # type: ignore[import-not-found]

    class Tokenizer:
        eod, pad, vocab_size, unique_identifiers = 1, 2, 128_000, {"class": "bench"}

    config = GPTDatasetConfig(
        random_seed=0, sequence_length=task.sequence_length, blend=([task.prefix], None), split="1,0,0",
        path_to_cache=task.cache, tokenizer=Tokenizer(), create_attention_mask=False, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    indexed = IndexedDataset(task.prefix)
    documents = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
    samples = len(_Rows(task)) - 1
    dataset = GPTDataset(indexed, task.prefix, documents, samples, Split.train, config)
    index = 0
    while True:
        rows = [dataset[(index + number) % samples] for number in range(task.batch_size)]
        index += task.batch_size
        yield {
            key: torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask", "position_ids")
        }


READERS: Mapping[str, Callable[[Task], Batches]] = {
    "ours": ours, "memmap": memmap, "grain": grain, "torchdata": torchdata, "megatron": megatron,
}  # fmt: skip
MODULES = {
    "grain": "grain",
    "torchdata": "torchdata.stateful_dataloader",
    "megatron": "megatron.core.datasets.gpt_dataset",
}


def resident_bytes() -> int:
    """Memory of this process that is resident, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024


def main(name: str, path: str) -> None:
    """Answers on stdout; see the module."""
    import importlib
    import warnings

    warnings.simplefilter("ignore")
    task = Task(**json.loads(Path(path).read_text()))
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    if name in MODULES:  # imports are not the reader's start-up
        importlib.import_module(MODULES[name])
    if name == "ours":
        importlib.import_module("data.loader")
    before = time.perf_counter()
    batches = READERS[name](task)
    next(batches)
    started = {"startup_seconds": time.perf_counter() - before, "rss_bytes": resident_bytes()}
    print(json.dumps(started), file=answers, flush=True)
    for line in sys.stdin:
        before = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        print(json.dumps({"seconds": time.perf_counter() - before}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
