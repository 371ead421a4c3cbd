"""Ends a run that hangs, and says which rank hangs and where.

Each rank's watchdog thread puts a growing number into the rank's recorder file, on the file system that all ranks
share, and looks at the number of the next rank: a process that is stopped or dead, or whose node is gone, counts no
more. Numbers are compared, never clocks. A rank that is alive but stands still in a step is found by its own thread.
The first to notice writes the report; the others see it and follow: every rank dumps its stacks and ends with the code
that asks for a restart.

A stopped rank of the same machine is woken with a signal that makes it dump its stacks too.
"""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.record.recorder import Life, Recorder, read, read_life, recorder_path

REQUEUE = 75
BEAT_SECONDS = 1.0
LAG_SECONDS = 4.0  # a watchdog that was itself held up for so long has no opinion on others
STALL_SECONDS = 3.0  # without a note of the own main thread, before anything is suspected
SCAN_SECONDS = 4.0  # over which silence is judged when all ranks are looked at
DUMP_SECONDS = 1.0  # for a woken rank to write its stacks
ENDED = ("finished", "stopped", "failed", "lost a peer")  # last actions of ranks that are silent for a good reason
WAITING = re.compile(  # a line of code that waits for other ranks
    r"\.wait\(|\.join\(|all_reduce|all_gather|reduce_scatter|broadcast|barrier|recv|\.tolist\(|\.item\("
)
DUMP_SIGNAL = signal.SIGUSR2


def report_path(run_dir: Path | str) -> Path:
    """Where the first watchdog to find a hang says so; removed when a run starts."""
    return Path(run_dir) / "ranks" / "hang.txt"


def stacks_path(run_dir: Path | str, rank: int) -> Path:
    """Where a rank dumps the stacks of its threads."""
    return Path(run_dir) / "ranks" / f"rank{rank}.stacks"


def place_path(run_dir: Path | str, rank: int) -> Path:
    """Where a rank that does not move says at which line it is, and whether it waits for others there."""
    return Path(run_dir) / "ranks" / f"rank{rank}.place"


def is_dead(life: Life) -> bool:
    """Whether a process of this machine has ended; False for one of another machine."""
    if life.host != os.uname().nodename or not life.pid:
        return False
    try:
        return Path(f"/proc/{life.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return not _exists(life.pid)
    except (OSError, IndexError):
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True)
class Suspect:
    """A rank that gives no sign of life, or that stands still (alive)."""

    rank: int
    life: Life | None
    alive: bool
    place: str = ""  # file, line and function, where known

    def describe(self, run_dir: Path | str, seconds: float) -> str:
        """One sentence: who, since when, where."""
        entry = read(recorder_path(run_dir, self.rank))
        who = f"rank {self.rank}"
        if self.life is not None and self.life.pid:
            who += f" (pid {self.life.pid} on {self.life.host})"
        if self.life is not None and is_dead(self.life):
            what = "is dead"
        elif self.alive:
            what = "is alive but stands still" + (f" at {self.place}" if self.place else "")
        else:
            what = f"has given no sign of life for {seconds:.0f} s"
        if entry is None:
            return f"{who} {what}, before its first recorded action"
        return f"{who} {what}, in step {entry.step}, last action: {entry.action} ({entry.seconds_since:.0f} s ago)"


def _has_ended(run_dir: Path | str, rank: int) -> bool:
    entry = read(recorder_path(run_dir, rank))
    return entry is not None and entry.action.startswith(ENDED)


def silent_ranks(
    run_dir: Path | str,
    world_size: int,
    *,
    seconds: float = SCAN_SECONDS,
    beat: Callable[[], None] = lambda: None,
) -> list[Suspect]:
    """Ranks whose number stands still for `seconds`, or whose process is dead; ranks that have ended are none.

    beat: called every second while waiting, for a caller that is watched itself.
    """
    paths = [recorder_path(run_dir, rank) for rank in range(world_size)]
    before = [read_life(path) for path in paths]
    dead = [life is not None and is_dead(life) for life in before]
    if not any(dead):  # a death on this machine needs no waiting
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, BEAT_SECONDS / 2))
            beat()
    after = [read_life(path) for path in paths]
    found = []
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        still = dead[rank] or (not any(dead) and old is not None and new is not None and old.beats == new.beats)
        if still and not _has_ended(run_dir, rank):
            found.append(Suspect(rank, new, alive=False))
    return found


class Watchdog:
    """Watches the next rank and this one. A context manager; `step` marks where standing still is a fault.

    silent_seconds: without a sign of life from the next rank. stuck_seconds: without a note of this rank in a step.
    """

    def __init__(
        self,
        run_dir: Path | str,
        recorder: Recorder,
        *,
        rank: int,
        world_size: int,
        silent_seconds: float,
        stuck_seconds: float,
    ) -> None:
        self._run_dir, self._recorder, self._rank, self._world_size = Path(run_dir), recorder, rank, world_size
        self._silent_seconds, self._stuck_seconds = silent_seconds, stuck_seconds
        self._in_step = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._stacks = None

    def __enter__(self) -> "Watchdog":
        if self._rank == 0:
            report_path(self._run_dir).unlink(missing_ok=True)
        # held open: a signal handler cannot open files
        self._stacks = open(stacks_path(self._run_dir, self._rank), "wb", buffering=0)
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._recorder.beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(SCAN_SECONDS + BEAT_SECONDS)
        faulthandler.unregister(DUMP_SIGNAL)
        if self._stacks is not None:
            self._stacks.close()
            with contextlib.suppress(OSError):
                path = stacks_path(self._run_dir, self._rank)
                if not path.stat().st_size:
                    path.unlink()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Inside, this rank standing still for too long is a fault."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def suspects(self) -> list[str]:
        """After a peer was lost: which ranks are dead or silent, and where they were. Takes some seconds."""
        return [
            suspect.describe(self._run_dir, SCAN_SECONDS)
            for suspect in silent_ranks(self._run_dir, self._world_size)
            if suspect.rank != self._rank
        ]

    def _watch(self) -> None:
        following = (self._rank + 1) % self._world_size
        began = time.monotonic()
        last_turn = seen_at = noted_at = began
        number, notes, told = None, None, False
        while not self._ended.wait(BEAT_SECONDS):
            self._beat()
            now = time.monotonic()
            life = read_life(recorder_path(self._run_dir, following))
            if now - last_turn > LAG_SECONDS or life is None or life.beats != number:
                seen_at, number = now, life.beats if life is not None else None
            if now - last_turn > LAG_SECONDS or notes != self._recorder.notes:
                noted_at, notes = now, self._recorder.notes
                if told:
                    place_path(self._run_dir, self._rank).unlink(missing_ok=True)
                    told = False
            last_turn = now
            stalled = now - noted_at
            if stalled < STALL_SECONDS or _has_ended(self._run_dir, self._rank):
                continue
            if not told:
                self._tell_place()
                told = True
            if report_path(self._run_dir).exists():
                self._end(None)
            silent = self._world_size > 1 and now - seen_at >= self._silent_seconds
            if silent and not _has_ended(self._run_dir, following):
                found = self._silent()
                if found:
                    self._end(self._report(found, now - seen_at))
                seen_at = time.monotonic()
            elif self._in_step and stalled >= self._stuck_seconds:
                self._end(self._report(self._silent() or [self._slowest()], stalled))

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: others will find this rank silent, and say so
            self._recorder.beat()

    def _silent(self) -> list[Suspect]:
        found = silent_ranks(self._run_dir, self._world_size, beat=self._beat)
        return [suspect for suspect in found if suspect.rank != self._rank]

    def _tell_place(self) -> None:
        """Where this rank's main thread stands, for whoever finds that nobody moves."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = traceback.extract_stack(frame, limit=12) if frame is not None else []
        waits = any("torch/distributed" in call.filename or WAITING.search(call.line or "") for call in stack)
        where = f"{Path(stack[-1].filename).name}:{stack[-1].lineno} {stack[-1].name}" if stack else "unknown"
        with contextlib.suppress(OSError):
            place_path(self._run_dir, self._rank).write_text(f"{'waits' if waits else 'stands'} {where}")

    def _slowest(self) -> Suspect:
        """All are alive: the rank that waits for no other, else the one whose last note is the oldest."""
        time.sleep(BEAT_SECONDS)  # so that all have told their place
        for rank in range(self._world_size):
            with contextlib.suppress(OSError):
                place = place_path(self._run_dir, rank).read_text()
                if place.startswith("stands "):
                    life = read_life(recorder_path(self._run_dir, rank))
                    return Suspect(rank, life, alive=True, place=place.removeprefix("stands "))
        entries = {rank: read(recorder_path(self._run_dir, rank)) for rank in range(self._world_size)}
        known = {rank: entry for rank, entry in entries.items() if entry is not None}
        rank = max(known, key=lambda number: known[number].seconds_since, default=self._rank)
        return Suspect(rank, read_life(recorder_path(self._run_dir, rank)), alive=True)

    def _report(self, found: list[Suspect], seconds: float) -> str:
        for suspect in found:
            life = suspect.life
            if not suspect.alive and life is not None and life.host == os.uname().nodename and not is_dead(life):
                for signum in (DUMP_SIGNAL, signal.SIGCONT):
                    with contextlib.suppress(OSError):
                        os.kill(life.pid, signum)
        sentences = [suspect.describe(self._run_dir, seconds) for suspect in found[:8]]
        return (
            "; ".join(sentences)
            + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
            + f". Noticed by rank {self._rank}; stacks of all ranks are in {self._run_dir / 'ranks'}/rank*.stacks"
        )

    def _end(self, report: str | None) -> None:
        """Say it, if this rank is the first to, dump the stacks and leave; never returns."""
        if report is not None:
            with contextlib.suppress(OSError):
                draft = report_path(self._run_dir).with_name(f".hang.{self._rank}")
                draft.write_text(report + "\n")
                with contextlib.suppress(FileExistsError):
                    os.link(draft, report_path(self._run_dir))
                draft.unlink()
            print(f"watchdog: {report}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            if self._stacks is not None:
                faulthandler.dump_traceback(self._stacks, all_threads=True)
            time.sleep(DUMP_SECONDS)
        os._exit(REQUEUE)
