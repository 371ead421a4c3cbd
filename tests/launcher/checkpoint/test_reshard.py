"""Another layout finds the same state, every rank reading its share of it, and trains on alike."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.build import build
from launcher.checkpoint import state as checkpoint
from launcher.checkpoint.reader import Reader
from launcher.config import RunConfig
from launcher.runtime import process_group
from tests.distributed import run_distributed
from tests.launcher.checkpoint.states import VOCAB, Straight, assert_same, session, whole
from tests.launcher.spine import config

BATCH = 8  # sequences a step, whatever the layout
LAYOUTS: dict[str, dict[str, Any]] = {
    "1f1b on two ranks, other layers": {"pipeline": 2, "expert": 1, "data": 1, "schedule": "1f1b", "layers": (3, 1)},
    "experts over four data ranks": {"pipeline": 1, "expert": 4, "data": 4, "schedule": "1f1b"},
    "two stages a rank, experts whole": {"pipeline": 2, "expert": 1, "data": 2, "schedule": "interleaved"},
    "a V on two ranks": {"pipeline": 2, "expert": 1, "data": 1, "schedule": "zbv"},
    "one process": {"pipeline": 1, "expert": 1, "data": 1, "schedule": "gpipe"},
    "four stages": {"pipeline": 4, "expert": 1, "data": 1, "schedule": "zb1p"},
}
FAST = "1f1b on two ranks, other layers"
CASES = [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in LAYOUTS]


def other_layout(straight: Straight, name: str, folder: Path) -> RunConfig:
    """The straight run's model, data, batch and recipe on other ranks; it was DualPipe on 2 x 2 with 2 expert ranks."""
    layout = LAYOUTS[name]
    found = config(
        straight.config.data.prefix, microbatches=BATCH // layout["data"], model=VOCAB, run_dir=str(folder), **layout
    )
    return replace(found, optim=straight.config.optim)


@pytest.mark.parametrize("name", CASES)
def test_another_layout_finds_the_same_state_and_trains_alike(straight: Straight, tmp_path: Path, name: str) -> None:
    other = other_layout(straight, name, tmp_path)
    assert straight.config.optim.ema_decay and other.train.global_batch_size == BATCH
    ranks = run_distributed(other.parallel.world_size, session, other, 1, str(straight.step(2)))
    assert_same(whole([rank[0] for rank in ranks]), straight.states[2])
    ours, theirs = whole([rank[1] for rank in ranks]), straight.states[3]
    assert ours.loss is not None and theirs.loss is not None
    assert abs(ours.loss / theirs.loss - 1) < 2e-6
    for kind in ("master", "ema"):
        for weight, expected in zip(ours.tensors[kind].values(), theirs.tensors[kind].values(), strict=True):
            assert (weight - expected).norm() / expected.norm() < 1e-5
    assert all(torch.equal(bias, theirs.biases[block]) for block, bias in ours.biases.items())


def there_and_back(first: RunConfig, second: RunConfig) -> None:
    """On two ranks in BF16: FP32 masters, the average and BF16 moments go through another layout and come back."""
    with process_group(first.train) as process:
        run = build(first, process)
        checkpoint.save(run)
        between = build(second, process)
        checkpoint.load(between, checkpoint.find(Path(first.run_dir)))
        checkpoint.save(between)
        again = build(replace(first, train=replace(first.train, seed=1)), process)
        checkpoint.load(again, checkpoint.find(Path(second.run_dir)))
        for ours, theirs in zip(checkpoint.rank_state(run), checkpoint.rank_state(again), strict=True):
            for key, start, stop in ours.stretches:
                assert torch.equal(ours.tensor[start:stop], theirs.tensor[start:stop]), key
        for bucket, other in zip(run.zero1.buckets, again.zero1.buckets, strict=True):
            assert bucket.weights.dtype == torch.bfloat16 and torch.equal(bucket.weights, other.weights)


def test_fp32_masters_of_a_bf16_run_come_back_unchanged(straight: Straight, tmp_path: Path) -> None:
    def chosen(name: str) -> RunConfig:
        found = other_layout(straight, name, tmp_path / name)
        train = replace(found.train, precision="bf16")
        return replace(found, train=train, optim=replace(found.optim, moments="bf16"))

    run_distributed(2, there_and_back, chosen(FAST), chosen("a V on two ranks"))


@dataclass(frozen=True)
class Read:
    """What one rank took of a checkpoint: bytes of tensors, bytes verified, shards opened."""

    tensor_bytes: int
    verified_bytes: int
    opened: list[str]


def reading(run_config: RunConfig, start: str) -> Read:
    """In one rank: load and count."""
    readers: list[Reader] = []
    verified: list[int] = []
    plain_verify = checkpoint.verify

    class Counted(Reader):
        def __init__(self, path: Path, *, verify: bool = True) -> None:
            super().__init__(path, verify=verify)
            readers.append(self)

    def count(path: Path, **share: int) -> int:
        verified.append(plain_verify(path, **share))
        return verified[-1]

    checkpoint.Reader, checkpoint.verify = Counted, count
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        checkpoint.load(run, Path(start))
    (reader,) = readers
    return Read(reader.bytes_read, sum(verified), sorted(reader.files_opened))


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_each_rank_opens_its_own_shard_alone(straight: Straight, tmp_path: Path) -> None:
    """And those of router biases, which the first holder of a router writes."""
    same = replace(straight.config, run_dir=str(tmp_path))
    reads = run_distributed(4, reading, same, str(straight.step(3)))
    total = stored_bytes(straight.step(3))
    for rank, read in enumerate(reads):
        assert f"rank-{rank:05d}.safetensors" in read.opened and len(read.opened) <= 2
        assert 0.15 * total < read.tensor_bytes < 0.35 * total
        assert read.verified_bytes < 0.35 * total
    assert sum(read.tensor_bytes for read in reads) == pytest.approx(total, rel=0.05)
    assert sum(read.verified_bytes for read in reads) == sum(
        file.stat().st_size for file in straight.step(3).iterdir() if file.name != "manifest.json"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"),
    [("experts over four data ranks", 0.4), ("four stages", 0.55)],  # head and MTP are half of this model
)
def test_no_rank_reads_the_model(straight: Straight, tmp_path: Path, name: str, most: float) -> None:
    reads = run_distributed(4, reading, other_layout(straight, name, tmp_path), str(straight.step(3)))
    total = stored_bytes(straight.step(3))
    assert max(read.tensor_bytes for read in reads) < most * total
    assert sum(read.tensor_bytes for read in reads) == pytest.approx(total, rel=0.05)  # and nothing twice
