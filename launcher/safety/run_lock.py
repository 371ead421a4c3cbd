"""One job per run folder: a lock file with a heartbeat, which works on shared file systems and outlives a dead node.

The owner rewrites a counter in the file every few seconds. Whoever finds a lock looks at its owner: a process of this
machine that is gone, or an earlier start of the same Slurm job, holds nothing; any other owner is watched, and if the
counter stands still for long enough the lock is taken over. Clocks of two machines are never compared.
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
    return value if isinstance(value, dict) else None


def _is_gone(owner: dict[str, Any]) -> bool:
    job = os.environ.get("SLURM_JOB_ID")
    if job and owner.get("job") == job and owner.get("restart") != os.environ.get("SLURM_RESTART_COUNT", "0"):
        return True
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
        self._beats = 0
        self._ended = threading.Event()
        self._lost: str | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock and keep it alive. RunLockError when another job holds it, after watching its heartbeat."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._wait_for_owner()
            aside = self.path.with_name(f"{LOCK}.{self._token}")
            with contextlib.suppress(FileNotFoundError):
                self.path.rename(aside)  # one of several that wait wins; the others find the winner's lock
                aside.unlink()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="run lock")
        self._thread.start()

    def _owner(self) -> dict[str, Any]:
        return {
            "token": self._token,
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "beats": self._beats,
        }

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

    def _wait_for_owner(self) -> None:
        """Return when the lock that is there holds nothing any more; RunLockError as soon as it shows life."""
        first = _read(self.path)
        deadline = time.monotonic() + self._stale_seconds
        while first is not None and not _is_gone(first):
            time.sleep(min(self._beat_seconds, 0.5))
            now = _read(self.path)
            if now is None or now.get("token") != first.get("token"):
                return
            if now.get("beats") != first.get("beats"):
                job = f", job {now['job']}" if now.get("job") else ""
                raise RunLockError(
                    f"{self.path}: process {now.get('pid')} on {now.get('host')}{job} is working in this folder: "
                    f"stop it, or set another run_dir"
                )
            if time.monotonic() > deadline:
                return

    def _keep(self) -> None:
        draft = self.path.with_name(f".{LOCK}.{self._token}")
        while not self._ended.wait(self._beat_seconds):
            owner = _read(self.path)
            if owner is None or owner.get("token") != self._token:
                self._lost = "nobody" if owner is None else f"process {owner.get('pid')} on {owner.get('host')}"
                return
            self._beats += 1
            with contextlib.suppress(OSError):  # a full disk: the lock grows stale, which `require` does not hide
                draft.write_text(json.dumps(self._owner()))
                draft.replace(self.path)

    def require(self) -> None:
        """RunLockError when another job has taken the folder over, as after a stop of this process for a while."""
        owner = _read(self.path)
        if self._lost is None and owner is not None and owner.get("token") != self._token:
            self._lost = f"process {owner.get('pid')} on {owner.get('host')}"
        if self._lost is not None:
            raise RunLockError(f"{self.path}: the lock of this run now belongs to {self._lost}; nothing is written")

    def release(self) -> None:
        """Give the lock up; a lock that another has taken over stays."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        owner = _read(self.path)
        if owner is not None and owner.get("token") == self._token:
            self.path.unlink(missing_ok=True)
