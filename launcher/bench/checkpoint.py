"""`expertpipe bench checkpoint --json`: saving and loading a state, beside the raw disk and torch's own checkpoints.

Eight processes hold one GiB of FP32 in 16 tensors, each an eighth of every tensor. In turns, so that a busy disk hits
all alike: raw (one file each, written, flushed), ours (checksums, manifest, rename; then asynchronous), torch DCP (as
DTensor shards; then asynchronous). Loading reads what was saved into 8 processes again, and into 4. Rows are medians.

The stall is what the loop waits for an asynchronous save, at the slowest process, of which there are two figures:

`stall_seconds`               ours is copied beside the next step, so this is around a step of half a second in which
                              the host waits for its device. DCP copies before it returns; a step changes nothing
`stall_without_step_seconds`  ours with no step at all between the save and the next update: the copy as such, as fast
                              as memory is. No run meets this case

`..._of_save` is each as a share of the waiting save of the same turn.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.files import commit, write_tensors
from launcher.checkpoint.host_copy import HostCopy, run_behind
from launcher.checkpoint.reader import verify
from launcher.config import compose, to_dict
from launcher.local import run_local

NUM_TENSORS = 16
STEP_SECONDS = 0.5
ENGINES = ("raw", "expertpipe", "torch DCP")


def _barrier_seconds(work: Callable[[], Any]) -> float:
    """Wall seconds from a common start until the last rank has done the work."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def _raw(folder: Path, tensors: dict[str, Tensor]) -> None:
    with open(folder / f"raw-{dist.get_rank()}", "wb", buffering=0) as file:
        for tensor in tensors.values():
            file.write(tensor.numpy().data)
        os.fsync(file.fileno())


class _Ours:
    """The file layer under `train`'s saves, fed with plain tensors."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.folder, self.tensors = folder, tensors
        start = dist.get_rank() * (next(iter(tensors.values())).numel())
        self.keys = {name: f"master/{name}@{start}" for name in tensors}
        self.copy = HostCopy(list(tensors.values()))
        self.config = to_dict(compose([]))

    def save(self, number: int) -> None:
        temporary, final = self.folder / f".tmp-step-{number:08d}", self.folder / f"step-{number:08d}"
        if dist.get_rank() == 0:
            temporary.mkdir()
        dist.barrier()
        self._write(temporary, self.tensors, number)
        dist.barrier()
        if dist.get_rank() == 0:
            progress = {"step": number, "tokens": 0, "samples": 0}
            commit(temporary, final, {"progress": progress, "config": self.config})

    def _write(self, temporary: Path, tensors: dict[str, Tensor], number: int) -> None:
        shards = {self.keys[name]: tensor for name, tensor in tensors.items()}
        write_tensors(temporary / f"rank-{dist.get_rank():05d}.safetensors", shards, step=number)

    def save_behind(self, number: int, step_seconds: float) -> tuple[float, Callable[[], None]]:
        """Copy and write as training's saver does, beside a step of the device: seconds that the host's loop waits, and
        what waits for the rest.

        The folder is there already: in training it is made in the thread, and the ranks learn of it at a later step.
        """
        temporary = self.folder / f".tmp-step-{number:08d}"
        if dist.get_rank() == 0:
            temporary.mkdir()
        dist.barrier()
        began = time.perf_counter()
        self.copy.begin(list(self.tensors.values()))
        begun = time.perf_counter()
        time.sleep(step_seconds)
        before_update = time.perf_counter()
        self.copy.wait()
        stall = begun - began + time.perf_counter() - before_update
        dist.barrier()  # the boundary of the step, at which the ranks learn that all copies are there

        def write() -> None:
            run_behind()
            self._write(temporary, dict(zip(self.tensors, self.copy.taken(), strict=True)), number)

        thread = threading.Thread(target=write)
        thread.start()
        return stall, thread.join

    def load(self, path: Path, readers: int) -> None:
        """Verified, each of the first `readers` ranks its part of every tensor; each file's checksum is read once."""
        from launcher.checkpoint.reader import Reader

        rank = dist.get_rank()
        if rank < readers:
            verify(path, share=rank, shares=readers)
            reader = Reader(path, verify=False)
            size = next(iter(self.tensors.values())).numel() * dist.get_world_size() // readers
            for name in self.tensors:
                out = torch.empty(size)
                reader.read("master", name, out, offset=rank * size)
                _require(out, rank * size, name)


def _values(start: int, size: int, name: str) -> Tensor:
    """Numbers that tell where they belong."""
    return torch.arange(start, start + size, dtype=torch.float32).mul_(1e-6).add_(int(name))


def _require(out: Tensor, start: int, name: str) -> None:
    if not torch.equal(out, _values(start, out.numel(), name)):
        raise RuntimeError(f"tensor {name} from element {start} was read back wrong")


class _DCP:
    """torch.distributed.checkpoint on the same state as DTensors sharded over the ranks."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        self.dcp: Any = import_module("torch.distributed.checkpoint")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.state = {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
        ranks = list(range(dist.get_world_size() // 2))
        self.half: Any = dist.new_group(ranks)
        self.background: Any = dist.new_group()  # which a thread may use beside the main one
        self.tensors = tensors

    def save(self, path: Path) -> None:
        self.dcp.save(self.state, checkpoint_id=path)

    def save_behind(self, path: Path) -> tuple[float, Callable[[], Any]]:
        began = time.perf_counter()
        future: Any = self.dcp.async_save(self.state, checkpoint_id=path, process_group=self.background)
        return time.perf_counter() - began, future.result

    def load(self, path: Path, readers: int) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        rank = dist.get_rank()
        if rank >= readers:
            return
        group: Any = self.half if readers < dist.get_world_size() else dist.group.WORLD
        mesh = DeviceMesh.from_group(group, "cpu")
        size = next(iter(self.tensors.values())).numel() * dist.get_world_size() // readers
        state = {name: DTensor.from_local(torch.empty(size), mesh, [Shard(0)]) for name in self.tensors}
        self.dcp.load(state, checkpoint_id=path, process_group=group)
        for name, tensor in state.items():
            _require(tensor.to_local(), rank * size, name)


def rank_main(folder: Path, total_bytes: int, turns: int) -> None:
    """One rank's part; rank 0 writes the figures of all turns to folder/figures.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    size = total_bytes // (4 * NUM_TENSORS * world)
    tensors = {str(number): _values(rank * size, size, str(number)) for number in range(NUM_TENSORS)}
    ours, theirs = _Ours(folder / "ours", tensors), _DCP(tensors)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in ENGINES}

    def note(engine: str, figure: str, seconds: float) -> None:
        figures[engine].setdefault(figure, []).append(seconds)

    for turn in range(turns):
        (folder / "ours").mkdir(exist_ok=True)
        dist.barrier()
        note("raw", "save", _barrier_seconds(lambda: _raw(folder, tensors)))
        note("expertpipe", "save", _barrier_seconds(lambda n=3 * turn: ours.save(n)))
        note("torch DCP", "save", _barrier_seconds(lambda n=turn: theirs.save(folder / f"dcp-{n}")))
        for engine, figure, begin in (
            ("expertpipe", "stall", lambda n=3 * turn + 1: ours.save_behind(n, STEP_SECONDS)),
            ("expertpipe", "stall_without_step", lambda n=3 * turn + 2: ours.save_behind(n, 0.0)),
            ("torch DCP", "stall", lambda n=turn: theirs.save_behind(folder / f"dcp-behind-{n}")),
        ):
            dist.barrier()
            stall, wait = begin()
            wait()
            worst = torch.tensor([stall], dtype=torch.float64)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            note(engine, figure, worst.item())
        for figure, readers in (("load", world), ("reshard", world // 2)):
            path = folder / "ours" / f"step-{3 * turn:08d}"
            note("expertpipe", figure, _barrier_seconds(lambda p=path, r=readers: ours.load(p, r)))
            note("torch DCP", figure, _barrier_seconds(lambda n=turn, r=readers: theirs.load(folder / f"dcp-{n}", r)))
        dist.barrier()
        if rank == 0:
            for path in [folder / "ours", *folder.glob("dcp-*")]:
                shutil.rmtree(path)
            for path in folder.glob("raw-*"):
                path.unlink()
        dist.barrier()
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def rows_of(figures: dict[str, dict[str, list[float]]], total_bytes: int) -> list[dict[str, Any]]:
    """One row for each engine: medians over the turns, the ratio turn by turn; None for what it does not do."""
    raw = figures["raw"]["save"]
    rows = []
    for engine in ENGINES:
        found = figures[engine]

        def median(figure: str, found: dict[str, list[float]] = found) -> float | None:
            return statistics.median(found[figure]) if figure in found else None

        def of_save(figure: str, found: dict[str, list[float]] = found) -> float | None:
            if figure not in found:
                return None
            return statistics.median(part / whole for part, whole in zip(found[figure], found["save"], strict=True))

        ratios = [seconds / base for seconds, base in zip(found["save"], raw, strict=True)]
        rows.append(
            {
                "bench": "checkpoint",
                "engine": engine,
                "bytes": total_bytes,
                "save_seconds": median("save"),
                "ratio_to_raw": statistics.median(ratios),
                "ratio_lowest": min(ratios),
                "ratio_highest": max(ratios),
                "stall_seconds": median("stall"),
                "stall_of_save": of_save("stall"),
                "stall_without_step_seconds": median("stall_without_step"),
                "stall_without_step_of_save": of_save("stall_without_step"),
                "load_seconds": median("load"),
                "reshard_seconds": median("reshard"),
                "turns": len(raw),
            }
        )
    return rows


def bench_checkpoint(argv: list[str]) -> int:
    """`expertpipe bench checkpoint [--json] [--processes N] [--bytes B] [--turns T] [--folder F]`; the exit code."""
    parser = ArgumentParser(prog="expertpipe bench checkpoint", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line per engine instead of a table")
    parser.add_argument("--processes", type=int, default=8, help="an even number")
    parser.add_argument("--bytes", type=int, default=2**30, help="of the whole state")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the folder for temporary files")
    args = parser.parse_args(argv)
    if args.processes < 2 or args.processes % 2:
        parser.error(f"--processes {args.processes}: an even number, 2 or more")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="expertpipe-bench-") as folder:
        code = run_local(
            [], world_size=args.processes, run_dir=Path(folder), threads=1,
            command=[sys.executable, "-m", "launcher.bench.checkpoint", folder, str(args.bytes), str(args.turns)],
        )  # fmt: skip
        if code:
            return code
        rows = rows_of(json.loads((Path(folder) / "figures.json").read_text()), args.bytes)
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    keys = (
        "engine",
        "save_seconds",
        "ratio_to_raw",
        "stall_seconds",
        "stall_of_save",
        "load_seconds",
        "reshard_seconds",
    )
    print("  ".join(f"{key:>15}" for key in keys))
    for row in rows:
        cells = [f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key] or "-") for key in keys]
        print("  ".join(f"{cell:>15}" for cell in cells))
    return 0


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
