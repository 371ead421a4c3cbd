"""Random numbers as pure functions of a key: what happens to a document depends on its content and a seed alone.

A document's id is the head of the SHA-256 of its text. Every decision about it (held out, fill-in-the-middle, where to
cut) is a hash of (seed, purpose, id, number), so neither order nor worker nor restart can move it.
"""

import hashlib
from enum import IntEnum

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 / golden ratio, odd
_HELDOUT_KEY = b"expertpipe held-out split 1"


class Purpose(IntEnum):
    """What a draw decides; draws of different purposes are independent."""

    FIM = 2
    FIM_CUTS = 3
    SPLIT = 4


def document_hash(raw: bytes) -> bytes:
    """SHA-256 of a document's UTF-8 text, 32 bytes: equal documents, equal hashes."""
    return hashlib.sha256(raw).digest()


def document_id(digest: bytes) -> int:
    """The 64-bit name that PREFIX.ids holds: the first 8 bytes of `document_hash`, little endian."""
    return int.from_bytes(digest[:8], "little")


def mix(x: int) -> int:
    """splitmix64's finaliser: every input bit changes every output bit about half the time."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _base(seed: int, purpose: Purpose, name: int) -> int:
    return mix((mix((mix((seed + _GOLDEN) & _MASK) + purpose * _GOLDEN) & _MASK) ^ name) & _MASK)


def draw(seed: int, purpose: Purpose, name: int, number: int = 0) -> int:
    """The `number`-th of the 64-bit numbers, uniform in [0, 2**64), of document `name` for one purpose."""
    return mix((_base(seed, purpose, name) + (number + 1) * _GOLDEN) & _MASK)


def draws(seed: int, purpose: Purpose, name: int, count: int) -> np.ndarray:
    """Draws 0 to count - 1 as uint64 [count], equal to `draw` one by one."""
    x_N = np.uint64(_base(seed, purpose, name)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def threshold(rate: float) -> int:
    """A draw is below this with probability `rate`, in [0, 1]."""
    assert 0 <= rate <= 1, f"a rate of {rate}"
    return int(rate * 2.0**64)


def keyed_hash(raw: bytes, key: bytes) -> int:
    """64 bits that depend on a document's UTF-8 text alone, so neither order nor neighbours move it."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "little")


def is_heldout(raw: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out set; no seed moves text between the two sets."""
    return keyed_hash(raw, _HELDOUT_KEY) < fraction * 2.0**64
