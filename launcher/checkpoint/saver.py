"""Saving while training goes on: a copy to host memory, then a thread that writes; all ranks in the same phase.

    copy      every rank, beside the next step, whose update waits for it (host_copy.py); this and its beginning are
              all that a step waits for, without an allocation, a file or a message (`Saved.stall_seconds`)
    prepare   rank 0: the temporary folder
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

from launcher.build import Run
from launcher.checkpoint.files import MANIFEST, commit, flush, step_name, to_delete
from launcher.checkpoint.host_copy import HostCopy, run_behind
from launcher.checkpoint.reader import read_manifest, records_of, require_whole
from launcher.checkpoint.state import (
    Snapshot,
    checkpoints_dir,
    prepare_temporary,
    rank_state,
    temporary_of,
)
from launcher.safety.agreement import require_agreed
from launcher.safety.run_lock import RunLock


@dataclass(frozen=True)
class Saved:
    """One finished save. stall_seconds: that the run waited for it; total_seconds: from beginning to commit."""

    path: Path
    stall_seconds: float
    total_seconds: float


class Saver:
    """Saves one run; every method is called by all ranks together.

    asynchronous: whether `start` returns at once and `before_update` waits for the copy; the memory for it is made
    here. lock: the run's, on rank 0,
    asked before every commit. extra: more for the manifest, asked when the state is copied. say: told what rank 0
    finds worth telling. on_phase: told the name of each phase as it begins, from the main thread.
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
        self._run, self._lock = run, lock
        self._extra, self._say, self._on_phase = extra, say, on_phase
        self._copy = HostCopy([flat.tensor for flat in rank_state(run)]) if asynchronous else None
        self._root = checkpoints_dir(run.config)
        self._active, self._waited_for, self._step = False, False, 0
        self._snapshot: Snapshot | None = None
        self._phases: list[tuple[str, Callable[[], None]]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._began = self._stall = self._total = 0.0
        self._finished: Saved | None = None

    @property
    def active(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._active

    def start(self, *, wait: bool = False) -> Saved | None:
        """Begin to save the state as it is now; waits for a save that is still under way (back-pressure).

        Nothing of the state may change until `before_update` has been called, or until the save has ended. wait: until
        this one has ended too, which needs no copy; so does a saver that is not asynchronous. The save that was waited
        for. A copy that failed is raised on all ranks at the next boundary.
        """
        self._began = time.perf_counter()
        self.finish()
        self._active, self._step, self._error = True, self._run.progress.step, None
        copy = None if wait else self._copy
        self._waited_for = copy is None
        self._attempt(lambda: self._take(copy))
        work = (self._prepare, self._write, self._commit, self._verify, self._delete)
        self._phases = list(zip(("prepare", "write", "commit", "verify", "delete"), work, strict=True))
        self._next_phase()
        self._stall = time.perf_counter() - self._began
        return self.finish() if copy is None else None

    def before_update(self) -> None:
        """Wait until the state may change: every step calls it before its update. Talks to no other rank."""
        if self._copy is not None and self._active:
            began = time.perf_counter()
            self._copy.wait()
            self._stall += time.perf_counter() - began

    def _take(self, copy: HostCopy | None) -> None:
        self._snapshot = Snapshot.take(self._run, copy, extra=self._extra())

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
            began = time.perf_counter()
            self._thread.join()
            self._stall += time.perf_counter() - began
            saved = self.advance(any_busy=False) or saved
        return saved

    def save(self) -> Path:
        """Save and wait; the checkpoint's folder."""
        path = self._root / step_name(self._run.progress.step)
        self.start(wait=True)
        return path

    def _next_phase(self) -> None:
        if not self._phases:
            self._active, self._snapshot = False, None
            return
        name, work = self._phases.pop(0)
        self._on_phase(name)
        if name == "verify":  # committed
            self._total = time.perf_counter() - self._began
            self._finished = Saved(self._final, self._stall, self._total)
        self._thread = threading.Thread(target=self._behind, args=(work,), daemon=True, name=f"checkpoint {name}")
        self._thread.start()

    def _behind(self, work: Callable[[], None]) -> None:
        if not self._waited_for:
            run_behind()
        self._attempt(work)

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
            self._active, self._snapshot, self._phases = False, None, []
            if self._run.process.rank == 0:
                shutil.rmtree(temporary_of(self._run.config, self._step), ignore_errors=True)
            raise

    @property
    def _taken(self) -> Snapshot:
        assert self._snapshot is not None
        return self._snapshot

    @property
    def _final(self) -> Path:
        return self._root / step_name(self._step)

    def _prepare(self) -> None:
        if self._run.process.rank == 0:
            prepare_temporary(self._run.config, self._step)

    def _write(self) -> None:
        if self._copy is not None:
            self._copy.taken()
        self._taken.write(temporary_of(self._run.config, self._step))

    def _commit(self) -> None:
        if self._run.process.rank != 0:
            return
        if self._lock is not None:
            self._lock.require()
        config = self._run.config
        aside = commit(temporary_of(config, self._step), self._final, self._taken.manifest(config))
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
