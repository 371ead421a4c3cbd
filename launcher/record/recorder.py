"""A flight recorder per rank: the latest action, in a memory-mapped file that outlives the process.

A rank calls `note` before every pipeline action. When it dies, even by SIGKILL, the pages stay with the kernel, so
whoever started it can say where it was. Two slots are written in turn, each with a checksum: a write cut in half
spoils one slot and the one before it is still good. Behind the slots stand host, process number and a count that a
living process raises every second (launcher/safety/watchdog.py), so that other nodes can tell a
dead rank from a busy one.
"""

import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

SLOT_BYTES = 128
LIFE_OFFSET = 2 * SLOT_BYTES
FILE_BYTES = LIFE_OFFSET + 128
_CHECKSUM = struct.Struct("<I")
_HEAD = struct.Struct("<QdqIH")  # sequence, wall time, step, pid, bytes of the action; the action follows
_LIFE = struct.Struct("<QIH")  # beats, pid, bytes of the host's name; the name follows
_ACTION_BYTES = SLOT_BYTES - _CHECKSUM.size - _HEAD.size


@dataclass(frozen=True)
class Entry:
    """What a rank did last."""

    pid: int
    step: int
    action: str
    seconds_since: float  # between the note and this reading


@dataclass(frozen=True)
class Life:
    """Signs of life of a rank: a count that grows while the process lives, and where that process is."""

    beats: int
    pid: int
    host: str


def recorder_path(run_dir: Path | str, rank: int) -> Path:
    """Where the recorder of `rank` lies: run_dir/ranks/rank<k>.last."""
    return Path(run_dir) / "ranks" / f"rank{rank}.last"


class Recorder:
    """Writes the latest action of this process into `path`, about a microsecond a note.

    The file is made, or emptied, here; its folder is made if need be. Belongs to one thread of one process.
    """

    def __init__(self, path: Path | str):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w+b") as file:
            file.truncate(FILE_BYTES)
            self._map = mmap.mmap(file.fileno(), FILE_BYTES)
        self._path = path
        self._pid = os.getpid()
        self._sequence = 0
        self.step = 0  # of the latest note
        host = os.uname().nodename.encode()[: FILE_BYTES - LIFE_OFFSET - _LIFE.size]
        self._map[LIFE_OFFSET:FILE_BYTES] = (_LIFE.pack(0, self._pid, len(host)) + host).ljust(
            FILE_BYTES - LIFE_OFFSET, b"\0"
        )
        self._beats = 0

    @property
    def notes(self) -> int:
        """How many notes have been made."""
        return self._sequence

    def beat(self) -> None:
        """Raise the count. Opened and closed anew: on NFS that is what shows other nodes this write and the notes."""
        self._beats += 1
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, self._beats.to_bytes(8, "little"), LIFE_OFFSET)
        finally:
            os.close(descriptor)

    def note(self, step: int, action: str) -> None:
        """Record that `action` of `step` begins now; an action longer than about 90 bytes of UTF-8 is cut."""
        self.step = step
        self._sequence += 1
        text = action.encode("utf-8", "replace")[:_ACTION_BYTES]
        body = _HEAD.pack(self._sequence, time.time(), step, self._pid, len(text)) + text
        offset = (self._sequence & 1) * SLOT_BYTES
        data = _CHECKSUM.pack(zlib.crc32(body)) + body
        self._map[offset : offset + len(data)] = data

    def close(self) -> None:
        """Unmap the file; it stays on disk. Further notes raise ValueError."""
        self._map.close()


def _read_slot(slot: bytes) -> tuple[int, float, int, int, str] | None:
    if len(slot) < _CHECKSUM.size + _HEAD.size:
        return None
    (checksum,) = _CHECKSUM.unpack_from(slot)
    sequence, when, step, pid, length = _HEAD.unpack_from(slot, _CHECKSUM.size)
    end = _CHECKSUM.size + _HEAD.size + length
    if sequence == 0 or end > len(slot) or zlib.crc32(slot[_CHECKSUM.size : end]) != checksum:
        return None
    text = slot[_CHECKSUM.size + _HEAD.size : end].decode("utf-8", "ignore")
    return sequence, when, step, pid, text


def read_life(path: Path | str) -> Life | None:
    """The signs of life in `path`; None where there are none yet."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES)[LIFE_OFFSET:]
        beats, pid, length = _LIFE.unpack_from(data)
    except (OSError, struct.error):
        return None
    return Life(beats, pid, data[_LIFE.size : _LIFE.size + length].decode("utf-8", "replace")) if beats else None


def read(path: Path | str) -> Entry | None:
    """The newest whole note in `path`; None where there is none (no file, nothing noted yet, or not a recorder)."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES)
    except OSError:
        return None
    found = [slot for start in (0, SLOT_BYTES) if (slot := _read_slot(data[start : start + SLOT_BYTES])) is not None]
    if not found:
        return None
    _, when, step, pid, text = max(found)
    # wall time: it can be read by another process, on another day; a clock set back must not give a negative age
    return Entry(pid=pid, step=step, action=text, seconds_since=max(0.0, time.time() - when))
