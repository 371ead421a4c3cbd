"""A flight recorder per rank: the latest action, in a memory-mapped file that outlives the process.

A rank calls `note` before every pipeline action. When it dies, even by SIGKILL, the pages stay with the kernel, so
whoever started it can say where it was. Two slots are written in turn, each with a checksum: a write cut in half
spoils one slot and the one before it is still good.
"""

import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

FILE_BYTES = 256
SLOT_BYTES = FILE_BYTES // 2
_CHECKSUM = struct.Struct("<I")
_HEAD = struct.Struct("<QdqIH")  # sequence, wall time, step, pid, bytes of the action; the action follows
_ACTION_BYTES = SLOT_BYTES - _CHECKSUM.size - _HEAD.size


@dataclass(frozen=True)
class Entry:
    """What a rank did last."""

    pid: int
    step: int
    action: str
    seconds_since: float  # between the note and this reading


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
        self._pid = os.getpid()
        self._sequence = 0

    def note(self, step: int, action: str) -> None:
        """Record that `action` of `step` begins now; an action longer than about 90 bytes of UTF-8 is cut."""
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
