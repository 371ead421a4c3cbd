"""Weakens every acquire, release and strong signal of the kernels, one at a time, and shows what catches each.

    python -m parallel.expert.native.race_table [SITE ...]

Each site (csrc/order.h) becomes relaxed, or a weak signal, by a build flag. The weakened kernels run, on the machine of
a CPU, once under ThreadSanitizer with an orderly network and once without it on a network that delays, splits and
reorders. Site 0 weakens nothing: there both must be silent.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
TSAN_EXIT = 66
# race_main's NODES LOCALS CHANNELS RING TOKENS DIM SEED ROUNDS.
TSAN_RUNS = ("2 2 2 2 33 32 0 4", "3 2 1 1 17 32 0 4", "2 3 2 4 33 32 0 4")
FAULT_RUNS = tuple(f"2 2 2 4 65 256 {seed} 3" for seed in range(1, 5)) + tuple(
    f"4 2 1 2 65 64 {seed} 3" for seed in range(5, 8)
)


@dataclass(frozen=True)
class Site:
    """An ordering of the kernels: its number and name, what it is (acquire, release, strong), who executes it."""

    number: int
    name: str
    kind: str
    role: str


@dataclass(frozen=True)
class Row:
    """What the runs of one weakened site showed."""

    site: Site
    caught_by_tsan: bool
    caught_by_faults: bool

    @property
    def caught(self) -> bool:
        """By either."""
        return self.caught_by_tsan or self.caught_by_faults


def sites() -> list[Site]:
    """Every site, read from csrc/order.h."""
    found = re.findall(r'X\((\d+), (\w+), (\w+), "([^"]+)"\)', (SOURCES / "order.h").read_text())
    return [Site(int(number), name, kind, role) for number, name, kind, role in found]


def build(out: Path, *, weaken: int, tsan: bool) -> Path:
    """csrc/race_main.cpp with one site weakened (0: none)."""
    flags = ["-O1", "-fsanitize=thread"] if tsan else ["-O2"]
    sources = [str(SOURCES / name) for name in ("race_main.cpp", "abi_host.cpp")]
    command = ["g++", "-std=c++17", "-pthread", *flags, f"-DEP_WEAKEN={weaken}", *sources, "-o", str(out)]
    subprocess.run(command, check=True)
    return out


def run(program: Path, arguments: str, *, timeout_seconds: float = 120) -> int:
    """Exit status of race_main; -1 if it did not end in time."""
    options = {"TSAN_OPTIONS": f"exitcode={TSAN_EXIT} halt_on_error=1", "PATH": "/usr/bin:/bin"}
    try:
        done = subprocess.run([program, *arguments.split()], env=options, capture_output=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode


def examine(site: Site, folder: Path) -> Row:
    """Builds and runs one weakened site."""
    tsan = build(folder / f"tsan{site.number}", weaken=site.number, tsan=True)
    plain = build(folder / f"plain{site.number}", weaken=site.number, tsan=False)
    by_tsan = any(run(tsan, arguments) == TSAN_EXIT for arguments in TSAN_RUNS)
    by_faults = any(run(plain, arguments) != 0 for arguments in FAULT_RUNS)
    return Row(site, by_tsan, by_faults)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'site':>4}  {'name':<29}{'weakened':<10}{'role':<26}{'ThreadSanitizer':<17}faulty network"]
    for row in rows:
        seen = ["caught" if caught else "-" for caught in (row.caught_by_tsan, row.caught_by_faults)]
        site = row.site
        lines.append(f"{site.number:>4}  {site.name:<29}{site.kind:<10}{site.role:<26}{seen[0]:<17}{seen[1]}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints the table; 1 if the sound kernels are not clean or a weakened site goes unnoticed."""
    wanted = {int(argument) for argument in arguments}
    chosen = [Site(0, "none", "-", "-"), *(site for site in sites() if not wanted or site.number in wanted)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda site: examine(site, Path(folder)), chosen))
    print(table(rows))
    missed = [row.site.name for row in rows[1:] if not row.caught]
    if rows[0].caught:
        print("the sound kernels are not clean")
    if missed:
        print(f"not caught: {', '.join(missed)}")
    return int(rows[0].caught or bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
