"""One job per run folder: a lock file with a heartbeat, which works on shared file systems and outlives a dead node.

The lock says who owns it and is never written again; beside it the owner counts in a file of its own (`lock.TOKEN`)
every few seconds, so that an owner that wakes up late cannot write over its successor's lock. Whoever finds a lock
looks at its owner: a process of this machine that is gone, or an earlier start of the same Slurm job, holds nothing;
any other owner is watched, and if its counter stands still for long enough the lock is taken over. An owner that has
lost its lock learns of it within one beat and counts on until its run has ended, for which the successor waits: an
earlier start may live on where Slurm no longer reaches it. Clocks of two machines are never compared.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

LOCK = "lock.json"
BEAT_SECONDS = 2.0
STALE_SECONDS = 20.0
QUIET_BEATS = 3  # without a count: an owner that has lost its lock has ended


class RunLockError(ValueError):
    """Another job works in the folder, or has taken it over; the message says which."""

    user_error = True


def _process_start(pid: int) -> str | None:
    """The kernel's start time of a process of this machine, which tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and str(value.get("token")).isalnum() else None


def _is_missing(path: Path) -> bool:
    """Not just for the moment in which somebody moves it away and puts it back."""
    if path.exists():
        return False
    time.sleep(0.2)
    return not path.exists()


def _is_gone(owner: dict[str, Any]) -> bool:
    job = os.environ.get("SLURM_JOB_ID")
    if job and owner.get("job") == job and owner.get("restart") != os.environ.get("SLURM_RESTART_COUNT", "0"):
        return True
    return _is_dead(owner)


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether it was a process of this machine and has ended."""
    if owner.get("host") != os.uname().nodename or not isinstance(owner.get("pid"), int):
        return False
    return _process_start(owner["pid"]) != owner.get("process_start")


class RunLock:
    """Held from `acquire` to `release` by one process of a run, rank 0.

    stale_seconds: how long another's heartbeat may stand still before its lock is taken over.
    """

    def __init__(self, folder: Path, *, beat_seconds: float = BEAT_SECONDS, stale_seconds: float = STALE_SECONDS):
        self.path = folder / LOCK
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._lost: str | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, keep it alive, and wait for the end of whoever had it.

        RunLockError when another job holds it, after watching its heartbeat.
        """
        before = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._beat_path(self._token).write_text("0")
        try:
            while not self._create():
                before = self._wait_for_owner()
                self._take_away(before)
        except BaseException:
            self._beat_path(self._token).unlink(missing_ok=True)
            raise
        self._thread = threading.Thread(target=self._keep, daemon=True, name="run lock")
        self._thread.start()
        if before is not None:
            self._wait_for_end(before)

    def _owner(self) -> dict[str, Any]:
        return {
            "token": self._token,
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
        }

    def _beat_path(self, token: object) -> Path:
        return self.path.with_name(f"lock.{token}")

    def _beats(self, owner: dict[str, Any]) -> str | None:
        try:
            return self._beat_path(owner.get("token")).read_text()
        except OSError:
            return None

    def _create(self) -> bool:
        """A link to a whole file: no reader ever sees half a lock."""
        draft = self.path.with_name(f".{LOCK}.{self._token}")
        draft.write_text(json.dumps(self._owner()))
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _wait_for_owner(self) -> dict[str, Any] | None:
        """Return when the lock that is there holds nothing any more, with it; RunLockError as soon as it shows life."""
        first = _read(self.path)
        beats = self._beats(first) if first is not None else None
        deadline = time.monotonic() + self._stale_seconds
        while first is not None and not _is_gone(first):
            time.sleep(min(self._beat_seconds, 0.5))
            now = _read(self.path)
            if now is None or now.get("token") != first.get("token"):
                break
            if self._beats(first) != beats:
                job = f", job {now['job']}" if now.get("job") else ""
                raise RunLockError(
                    f"{self.path}: process {now.get('pid')} on {now.get('host')}{job} is working in this folder: "
                    f"stop it, or set another run_dir"
                )
            if time.monotonic() > deadline:
                break
        return first

    def _take_away(self, watched: dict[str, Any] | None) -> None:
        """Remove the lock that was watched; that of somebody who waited too and was faster is put back."""
        aside = self.path.with_name(f"{LOCK}.{self._token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != watched:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()

    def _wait_for_end(self, before: dict[str, Any]) -> None:
        """Return when the earlier owner has removed its counter, is dead, or counts no more, but not for ever."""
        beats, quiet_since = self._beats(before), time.monotonic()
        deadline = quiet_since + 3 * self._stale_seconds
        while beats is not None and not _is_dead(before) and (now := time.monotonic()) < deadline:
            if now - quiet_since > QUIET_BEATS * self._beat_seconds:
                break
            time.sleep(min(self._beat_seconds, 0.5))
            if self._beats(before) != beats:
                beats, quiet_since = self._beats(before), time.monotonic()
        self._beat_path(before.get("token")).unlink(missing_ok=True)

    def _keep(self) -> None:
        beats = 0
        while not self._ended.wait(self._beat_seconds):
            self._successor()
            beats += 1
            with contextlib.suppress(OSError):  # a full disk: the lock grows stale, which `require` does not hide
                self._beat_path(self._token).write_text(str(beats))

    def _successor(self) -> str | None:
        """Who has taken the lock over, if anybody has; once lost, it stays lost."""
        if self._lost is None:
            owner = _read(self.path)
            if owner is not None and owner.get("token") != self._token:
                self._lost = f"process {owner.get('pid')} on {owner.get('host')}"
            elif owner is None and _is_missing(self.path):
                self._lost = "nobody"
        return self._lost

    @property
    def lost(self) -> bool:
        """Whether another job was found to have taken the folder over; reads nothing, see `require`."""
        return self._lost is not None

    def require(self) -> None:
        """RunLockError when another job has taken the folder over, as after a stop of this process for a while."""
        successor = self._successor()
        if successor is not None:
            raise RunLockError(
                f"{self.path}: the lock of this run now belongs to {successor}: this process was silent for "
                f"{self._stale_seconds:g} s, or its job was started again; nothing more is written"
            )

    def release(self) -> None:
        """Give the lock up; a lock that another has taken over stays."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._beat_path(self._token).unlink(missing_ok=True)
        owner = _read(self.path)
        if owner is not None and owner.get("token") == self._token:
            self.path.unlink(missing_ok=True)
