"""Row-wise work in pieces, so that on a CPU the temporaries between its passes stay small."""

from collections.abc import Iterator

from torch import Tensor

# Temporaries in cache, and passes so short that torch keeps them on one thread, sums included, which it splits from
# 1 << 15 elements on: waking a second thread costs more than such a pass.
CHUNK_ELEMENTS = (1 << 15) - 1


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Slices over the first dimension of x; all of it at once on a GPU, where launches would cost more."""
    num_rows = len(x)
    step = max(1, num_rows if x.is_cuda else CHUNK_ELEMENTS * num_rows // max(1, x.numel()))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
