"""Saving while training goes on: a copy to host memory, then a thread that writes; all ranks in the same phase.

    copy      every rank; the only time that the step waits (`Saved.stall_seconds`)
    write     every rank its shard, flushed, hashed on the way
    commit    rank 0: manifest, rename, `latest`
    verify    every rank reads its shard again, past the page cache
    delete    rank 0: checkpoints that are neither among the last k nor at every n-th step

A phase begins when all ranks have ended the one before, which they learn at the next step's boundary through one small
all-reduce: no thread but the main one communicates, so nothing can interleave with the step's collectives. What goes
wrong on one rank is thus raised on all of them, at the same boundary.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.build import Run
from launcher.checkpoint.files import MANIFEST, commit, flush, step_name, to_delete
from launcher.checkpoint.reader import read_manifest, records_of, require_whole
from launcher.checkpoint.state import (
    Snapshot,
    checkpoints_dir,
    prepare_temporary,
    temporary_of,
)
from launcher.safety.agreement import require_agreed
from launcher.safety.run_lock import RunLock


@dataclass(frozen=True)
class Saved:
    """One finished save. stall_seconds: of the step; total_seconds: from its beginning until it was committed."""

    path: Path
    stall_seconds: float
    total_seconds: float


class Saver:
    """Saves one run; every method is called by all ranks together.

    asynchronous: whether `start` returns after the copy. lock: the run's, on rank 0, asked before every commit. extra:
    more for the manifest, asked when the state is copied. say: told what rank 0 finds worth telling. on_phase: told the
    name of each phase as it begins, from the main thread.
    """

    def __init__(
        self,
        run: Run,
        *,
        asynchronous: bool,
        lock: RunLock | None = None,
        extra: Callable[[], dict[str, Any]] = dict,
        say: Callable[[str], None] = lambda text: None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._run, self._asynchronous, self._lock = run, asynchronous, lock
        self._extra, self._say, self._on_phase = extra, say, on_phase
        self._buffers: dict[str, Tensor] | None = {} if asynchronous else None
        self._root = checkpoints_dir(run.config)
        self._snapshot: Snapshot | None = None
        self._phases: list[tuple[str, Callable[[], None]]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._began = self._stall = self._total = 0.0
        self._finished: Saved | None = None

    @property
    def active(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._snapshot is not None

    def start(self) -> None:
        """Begin to save the state as it is now; waits for a save that is still under way (back-pressure)."""
        self._began = time.perf_counter()
        self.finish()
        run = self._run
        step = run.progress.step
        self._error = None
        if run.process.rank == 0:
            self._attempt(lambda: prepare_temporary(run.config, step))
        self._raise_agreed()
        self._attempt(self._take)
        self._raise_agreed()
        names = ("write", "commit", "verify", "delete")
        self._phases = list(zip(names, (self._write, self._commit, self._verify, self._delete), strict=True))
        self._next_phase()
        self._stall = time.perf_counter() - self._began
        if not self._asynchronous:
            self.finish()

    def _take(self) -> None:
        self._snapshot = Snapshot.take(self._run, self._buffers, extra=self._extra())

    @property
    def busy(self) -> bool:
        """Whether this rank's part of the phase is still being done. Not the same on all ranks: agree on it."""
        return self._thread is not None and self._thread.is_alive()

    def advance(self, *, any_busy: bool) -> Saved | None:
        """At a boundary, with what all ranks together found `busy` to be: the next phase; the save, once committed."""
        if not self.active or any_busy:
            return None
        assert self._thread is not None
        self._thread.join()
        self._raise_agreed()
        self._next_phase()
        finished, self._finished = self._finished, None
        return finished

    def finish(self) -> Saved | None:
        """Wait until the save that is under way has ended."""
        saved = None
        while self.active:
            assert self._thread is not None
            self._thread.join()
            saved = self.advance(any_busy=False) or saved
        return saved

    def save(self) -> Path:
        """Save and wait; the checkpoint's folder."""
        path = self._root / step_name(self._run.progress.step)
        self.start()
        self.finish()
        return path

    def _next_phase(self) -> None:
        if not self._phases:
            self._snapshot = None
            return
        name, work = self._phases.pop(0)
        self._on_phase(name)
        if name == "verify" and self._snapshot is not None:  # committed
            self._total = time.perf_counter() - self._began
            self._finished = Saved(self._final, self._stall, self._total)
        self._thread = threading.Thread(target=self._attempt, args=(work,), daemon=True, name=f"checkpoint {name}")
        self._thread.start()

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def _raise_agreed(self) -> None:
        """What failed on any rank is raised on all, and what was half written goes."""
        error, self._error = self._error, None
        try:
            require_agreed(self._run.groups.world, self._run.process.device, error)
        except Exception:
            step = self._snapshot.step if self._snapshot is not None else self._run.progress.step
            self._snapshot, self._phases = None, []
            if self._run.process.rank == 0:
                shutil.rmtree(temporary_of(self._run.config, step), ignore_errors=True)
            raise

    @property
    def _taken(self) -> Snapshot:
        assert self._snapshot is not None
        return self._snapshot

    @property
    def _final(self) -> Path:
        return self._root / step_name(self._taken.step)

    def _write(self) -> None:
        self._taken.write(temporary_of(self._run.config, self._taken.step))

    def _commit(self) -> None:
        if self._run.process.rank != 0:
            return
        if self._lock is not None:
            self._lock.require()
        aside = commit(temporary_of(self._run.config, self._taken.step), self._final, self._taken.manifest)
        if aside is not None:
            self._say(f"the {self._final.name} that was there already is now {aside.name}")

    def _verify(self) -> None:
        own = f"rank-{self._taken.rank:05d}.safetensors"
        for name, record in records_of(self._final, read_manifest(self._final)).items():
            if name == own or (self._taken.rank == 0 and not name.endswith(".safetensors")):
                require_whole(self._final, name, record, from_disk=True)

    def _delete(self) -> None:
        if self._run.process.rank != 0:
            return
        train = self._run.config.train
        for old in to_delete(self._root, keep=train.keep_checkpoints, keep_every=train.keep_every):
            # the manifest first: a deletion that is cut off leaves no checkpoint, rather than a damaged one
            (old / MANIFEST).unlink(missing_ok=True)
            flush(old)
            shutil.rmtree(old)
        flush(self._root)
