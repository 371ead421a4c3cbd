"""What partitions a Slurm cluster has, and why a run cannot be in one of them. No torch."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = 30  # until a controller that does not answer is given up
_MANY_DAYS = "infinite"


class SlurmError(ValueError):
    """Slurm is not here, or does not answer; one line."""

    user_error = True


@dataclass(frozen=True)
class Partition:
    """One partition. cpus: of a node. limit: longest time of a job, in Slurm's words."""

    name: str
    is_default: bool
    is_up: bool
    num_nodes: int
    gpus_per_node: int
    cpus: int
    limit: str

    def describe(self) -> str:
        """A few words for messages."""
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        gpus = f" of {self.gpus_per_node} GPUs" if self.gpus_per_node else " without GPUs"
        limit = "no time limit" if self.limit == _MANY_DAYS else f"at most {self.limit}"
        return f"{self.name} ({nodes}{gpus}, {limit}{'' if self.is_up else ', down'})"


@dataclass(frozen=True)
class Demand:
    """What a run asks of a partition. time: in Slurm's words, None for the partition's own."""

    num_nodes: int
    gpus_per_node: int
    time: str | None = None


def partitions() -> list[Partition]:
    """Those of the cluster that this machine belongs to. Raises SlurmError."""
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        raise SlurmError("Slurm's commands (sinfo, sbatch) are not here: submit from a machine of the cluster")
    command = ["sinfo", "--noheader", "--exact", "--format=%P|%a|%D|%G|%c|%l"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"sinfo does not answer: {error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise SlurmError(f"sinfo: {said}")
    return merged([parse(line) for line in done.stdout.splitlines() if line.strip()])


def parse(line: str) -> Partition:
    """One line of sinfo; a number may end with + where nodes differ."""
    name, state, nodes, gres, cpus, limit = line.strip().split("|")
    counts = [int(found) for found in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres)]
    return Partition(
        name.rstrip("*"), name.endswith("*"), state == "up", int(nodes), sum(counts), int(cpus.rstrip("+")), limit
    )


def merged(found: Sequence[Partition]) -> list[Partition]:
    """One entry a partition: of the lines of one that has several kinds of nodes, the one with the most GPUs."""
    best: dict[str, Partition] = {}
    for one in found:
        if one.name not in best or (one.gpus_per_node, one.num_nodes) > (
            best[one.name].gpus_per_node,
            best[one.name].num_nodes,
        ):
            best[one.name] = one
    return list(best.values())


def chosen(name: str | None, there: Sequence[Partition]) -> Partition | None:
    """The partition of that name, or the default one; None if there is no such."""
    return next((one for one in there if (one.name == name if name else one.is_default)), None)


def problems(name: str | None, there: Sequence[Partition], demand: Demand | None) -> list[str]:
    """Why the run cannot be in the partition, one line each with the partitions that there are; no demand: unknown."""
    words = ", ".join(one.describe() for one in there) or "none"
    mine = chosen(name, there)
    if mine is None:
        asked = f"--partition {name}: no such partition" if name else "no default partition: give --partition"
        return [f"{asked}; there are {words}"]
    if not mine.is_up:
        return [f"partition {mine.name} is down; there are {words}"]
    found = []
    if demand is not None:
        asked = f"the run needs {demand.num_nodes} node{'s' if demand.num_nodes > 1 else ''}"
        asked += f" with {demand.gpus_per_node} GPUs each" if demand.gpus_per_node else ""
        if demand.gpus_per_node > mine.gpus_per_node or demand.num_nodes > mine.num_nodes:
            found.append(f"{asked}, partition {mine.name} does not have them; there are {words}")
        wanted, limit = seconds(demand.time), seconds(mine.limit)
        if demand.time is not None and wanted is None:
            found.append(f"--time {demand.time}: write minutes, HH:MM:SS or D-HH:MM:SS")
        elif wanted is not None and limit is not None and wanted > limit:
            found.append(f"--time {demand.time} is more than partition {mine.name} allows: use {mine.limit} or less")
    return found


def seconds(text: str | None) -> float | None:
    """Slurm's time (minutes, MM:SS, HH:MM:SS, D-HH[:MM[:SS]]) in seconds; None where it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text or "")
    if match is None:
        return float("inf") if text == _MANY_DAYS else None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, rest = (*numbers, 0, 0)[:3]
        return 86400.0 * int(days) + 3600 * hours + 60 * minutes + rest
    if len(numbers) == 1:
        return 60.0 * numbers[0]
    total = 0.0
    for number in numbers:
        total = 60 * total + number
    return total
