"""Which tokens sample i holds, as a pure function of (num_tokens, sequence_length, seed, i).

The flat stream of an epoch is cut every `sequence_length` tokens from a keyed shift, and the windows are visited in the
order of a keyed permutation. Nothing is stored: the permutation is a Feistel network over [0, rows) x [0, columns), the
smallest near-square that holds all windows, with cycle walking for the few values outside (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). A run therefore starts in no time, resumes at any sample, and epoch k is the
same however long the run is.
"""

import math
from dataclasses import dataclass

import numpy as np

ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 / golden ratio, odd
_SHIFT_SALT = 0xD1B54A32D192ED03  # separates the shift's key from the rounds' keys

_STREAM_SALT = 0xE7037ED1A0B428DB  # separates the streams of one seed


class SamplerError(ValueError):
    """The data is too short for one window, or a number is out of range."""

    user_error = True


def mix64(x_N: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 [N]: every input bit changes every output bit about half the time."""
    x_N = (x_N ^ (x_N >> 30)) * 0xBF58476D1CE4E5B9
    x_N = (x_N ^ (x_N >> 27)) * 0x94D049BB133111EB
    return x_N ^ (x_N >> 31)


def _feistel(values_N: np.ndarray, keys_N: np.ndarray, *, rows: int, columns: int) -> np.ndarray:
    """One pass of the network over [0, rows * columns); each round adds to one half, so it can be undone."""
    left_N, right_N = values_N // columns, values_N % columns
    for number in range(ROUNDS):
        round_keys_N = mix64(keys_N + ((number + 1) * _GOLDEN & _MASK))
        if number % 2 == 0:
            left_N = (left_N + mix64(right_N ^ round_keys_N) % rows) % rows
        else:
            right_N = (right_N + mix64(left_N ^ round_keys_N) % columns) % columns
    return left_N * columns + right_N


def permute(indices_N: np.ndarray, *, size: int, keys_N: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of [0, size) sends each index; indices, keys and result are uint64 [N]."""
    assert indices_N.dtype == keys_N.dtype == np.uint64 and indices_N.shape == keys_N.shape
    assert size >= 1 and not np.any(indices_N >= size), f"indices must be in [0, {size})"
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    values_N = _feistel(indices_N, keys_N, rows=rows, columns=columns)
    # Cycle walking: following the cycle until it is back inside keeps the map a bijection. As rows * columns is less
    # than size + rows hardly any value needs it, and it ends because the cycle contains the index it started from.
    while (outside := np.flatnonzero(values_N >= size)).size:
        values_N[outside] = _feistel(values_N[outside], keys_N[outside], rows=rows, columns=columns)
    return values_N


@dataclass(frozen=True)
class Sampler:
    """Windows of sequence_length + 1 tokens (inputs and shifted targets) over a stream of num_tokens.

    Every epoch leaves out up to 2 * sequence_length tokens at the two ends, others each time, so that any shift gives
    the same number of windows. Raises SamplerError if the stream is shorter than one window.
    """

    num_tokens: int
    sequence_length: int
    seed: int = 0
    stream: int = 0  # sources of one blend must not visit their windows in related orders

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise SamplerError(f"sequence_length is {self.sequence_length}, it must be at least 1")
        if self.num_tokens < self.sequence_length + 1:
            raise SamplerError(
                f"{self.num_tokens} tokens are fewer than one window of {self.sequence_length + 1}: "
                "use a shorter sequence_length or more data"
            )

    @property
    def windows_per_epoch(self) -> int:
        """Samples of one epoch; the same for every epoch."""
        return max(1, self.num_tokens // self.sequence_length - 1)

    def starts(self, sample_ids: np.ndarray) -> np.ndarray:
        """Offset in tokens of each sample's window: int64 [N] for sample ids [N] >= 0 of any number of epochs."""
        ids_N = np.asarray(sample_ids)
        assert ids_N.ndim == 1 and ids_N.dtype.kind in "iu", (
            f"sample ids are integers [N], got {ids_N.dtype} {ids_N.shape}"
        )
        assert not np.any(ids_N < 0), "sample ids start at 0"
        epochs_N, positions_N = np.divmod(ids_N.astype(np.uint64), np.uint64(self.windows_per_epoch))
        base = (self.seed + self.stream * _STREAM_SALT) & _MASK
        seed_key = mix64(np.array([base], dtype=np.uint64) + _GOLDEN)
        keys_N = mix64(seed_key + (epochs_N + np.uint64(1)) * np.uint64(_GOLDEN))
        windows_N = permute(positions_N, size=self.windows_per_epoch, keys_N=keys_N)
        num_shifts = min(self.sequence_length, self.num_tokens - self.windows_per_epoch * self.sequence_length)
        shifts_N = mix64(keys_N ^ np.uint64(_SHIFT_SALT)) % np.uint64(num_shifts)
        return (shifts_N + windows_N * np.uint64(self.sequence_length)).astype(np.int64)


def step_sample_ids(
    *, consumed: int, microbatch: int, data_rank: int, data_size: int, micro_batch_size: int
) -> np.ndarray:
    """Sample ids int64 [B] of one data rank's micro-batch, `consumed` samples into the run.

    Micro-batches are the outer index and ranks the inner one, so the samples of a step are the next
    num_microbatches * data_size * micro_batch_size ids whichever way that product is split.
    """
    assert consumed >= 0 and microbatch >= 0 and 0 <= data_rank < data_size and micro_batch_size >= 1
    first = consumed + (microbatch * data_size + data_rank) * micro_batch_size
    return np.arange(first, first + micro_batch_size, dtype=np.int64)
