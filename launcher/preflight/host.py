"""What differs between nodes that should be alike: libraries, clocks, and how fast and whether run_dir is shared."""

import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from launcher.checkpoint.files import digest_of, versions
from launcher.config import RunConfig, to_dict
from launcher.preflight.team import Team
from launcher.preflight.verdict import Row, differing

CLOCK_SECONDS = 1.0  # off by more, and logs of two nodes cannot be laid side by side
CLOCK_QUESTIONS = 5
GIB = 2**30


def facts(config: RunConfig, device: torch.device) -> dict[str, str]:
    """What must be the same everywhere."""
    found = {**versions(), "configuration": digest_of(to_dict(config))[:8], "machine": platform.machine()}
    if device.type == "cuda":
        import torch.cuda.nccl

        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["GPU"] = torch.cuda.get_device_name(device)
    return found


def check_libraries(team: Team, config: RunConfig) -> Row:
    """Versions, GPU and configuration of every rank against most ranks'."""
    mine = facts(config, team.process.device)
    words = f"torch {mine['torch']}" + (f", NCCL {mine['NCCL']}, {mine['GPU']}" if "NCCL" in mine else ", gloo")
    return Row("libraries", words, tuple(differing(team.everyone(mine), team.nodes)))


def now() -> float:
    """Seconds of this machine's clock."""
    return time.time()


def check_clocks(team: Team) -> Row:
    """Each node's clock against the first one's: half a round trip is the uncertainty, the shortest of a few counts."""
    leaders = [ranks[0] for ranks in team.nodes.by_host.values()]
    cell = torch.zeros(1, dtype=torch.float64, device=team.process.device)
    offsets: dict[int, tuple[float, float]] = {}
    for leader in leaders[1:]:
        for _ in range(CLOCK_QUESTIONS):
            if team.rank == leaders[0]:
                asked = now()
                dist.send(cell, leader)
                dist.recv(cell, leader)
                answered, theirs = now(), float(cell)
                best = offsets.get(leader, (0.0, float("inf")))
                if answered - asked < 2 * best[1]:
                    offsets[leader] = (theirs - (asked + answered) / 2, (answered - asked) / 2)
            elif team.rank == leader:
                dist.recv(cell, leaders[0])
                cell.fill_(now())
                dist.send(cell, leaders[0])
    offsets = team.everyone(offsets)[leaders[0]]
    if not offsets:
        return Row("clocks", "one node")
    worst = max(offsets, key=lambda rank: abs(offsets[rank][0]))
    off, around = offsets[worst]
    bad = tuple(
        f"node {team.nodes.hosts[rank]}: its clock is {seconds:+.1f} s off that of {team.nodes.hosts[0]}"
        for rank, (seconds, uncertain) in offsets.items()
        if abs(seconds) - uncertain > CLOCK_SECONDS
    )
    return Row(
        "clocks", f"largest difference {1e3 * off:+.2f} ms (+-{1e3 * around:.2f}), {team.nodes.hosts[worst]}", bad
    )


@dataclass(frozen=True)
class Written:
    """What one rank found of the storage. error: in words, empty if none."""

    write_seconds: float = 0.0
    read_seconds: float = 0.0
    sees_first: bool = True
    error: str = ""


def try_storage(folder: Path, rank: int, num_bytes: int) -> Written:
    """Write a file of this rank to stable storage, read it back, and look for rank 0's."""
    path, data = folder / f"rank{rank}", os.urandom(min(num_bytes, 1 << 20)) * max(1, num_bytes >> 20)
    try:
        began = time.perf_counter()
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            same = file.read() == data
        return Written(written - began, time.perf_counter() - written, error="" if same else "reads other bytes back")
    except OSError as error:
        return Written(error=f"{error.strerror or error} ({path})")


def check_storage(team: Team, run_dir: Path) -> Row:
    """All ranks write and read at once, as a checkpoint does; every rank must see the first one's file."""
    number = os.environ.get("SLURM_JOB_ID", "local")
    folder = run_dir.absolute() / f".preflight-{number}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine = Written()
    except OSError as error:
        mine = Written(error=f"{error.strerror or error} ({folder})")
    team.everyone(None)  # the folder is there before anybody's speed is taken
    if not mine.error:
        mine = try_storage(folder, team.rank, team.payload_bytes)
    team.everyone(None)  # all files are written before anybody looks for the first
    sees = (folder / "rank0").exists()
    found = team.everyone(Written(mine.write_seconds, mine.read_seconds, sees, mine.error))
    if team.rank in (ranks[0] for ranks in team.nodes.by_host.values()):
        shutil.rmtree(folder, ignore_errors=True)
    return judge_storage(team, found, run_dir)


def judge_storage(team: Team, found: list[Written], run_dir: Path) -> Row:
    """The row from what all ranks found."""
    name, good = team.nodes.name, [one for one in found if not one.error]
    bad = [f"{name(rank)}: {one.error}" for rank, one in enumerate(found) if one.error]
    blind = [host for host, ranks in team.nodes.by_host.items() if not any(found[rank].sees_first for rank in ranks)]
    if found[0].error == "":
        bad += [f"node {host}: does not see what rank 0 wrote, so {run_dir} is not shared with it" for host in blind]
    if not good:
        return Row("storage of run_dir", "nothing written", tuple(bad))
    writes, middle = [one.write_seconds for one in good], median(one.write_seconds for one in good)
    bad += [
        f"{name(rank)}: writes at {middle / one.write_seconds:.2g} of the median speed"
        for rank, one in enumerate(found)
        if not one.error and len(good) > 2 and one.write_seconds * team.slow_share > middle
    ]
    together = len(good) * team.payload_bytes
    words = f"write {together / max(writes) / GIB:.3g} GiB/s, all ranks together"
    read = f"read {together / max(one.read_seconds for one in good) / GIB:.3g}"
    return Row("storage of run_dir", f"{words}, {read}", tuple(bad))
