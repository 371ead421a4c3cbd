"""Micro-batches straight from the memory map: no worker, no queue, no state but the counts passed in.

A gather of 4096-token windows runs at memory speed, orders of magnitude above what a model consumes, so there is
nothing to hide behind worker processes, and a resumed run needs one integer: the samples consumed so far. What remains
beside the copy is the permutation, which costs the same for one index as for hundreds: places are therefore computed
for the coming micro-batches together and kept until they are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.check import tokenizer_problems
from data.config import DataConfig
from data.cursor import Cursor
from data.index import TokenFileError
from data.sampler import Sampler, SamplerError, step_sample_ids
from data.stream import TokenStream

_LOOK_AHEAD = 256  # micro-batches whose places are computed at once, at most


@dataclass(frozen=True)
class Windows:
    """Where samples [N] begin: source [N], offset in tokens in it [N], and their one sequence length."""

    sequence_length: int
    source: list[int]
    start: list[int]


@dataclass(frozen=True)
class Batch:
    """Tokens int64 [B, S + 1], and with document_mask the document of each, int32 [B, S + 1], counted from 0 in every
    window: position t may attend to position u <= t if their documents are equal.
    """

    tokens: np.ndarray
    documents: np.ndarray | None


class Loader:
    """Windows of one corpus or a blend.

    fim_rate: share of documents to turn, by tokens seen; None: as prepared. Raises TokenFileError for damaged files,
    different tokenizers and rates above the prepared one, SamplerError for too little data and impossible phases.
    """

    def __init__(self, config: DataConfig, *, fim_rate: Callable[[int], float] | None = None) -> None:
        self.config = config
        self.cursor = Cursor(config)
        self.streams = _open(config.prefixes)
        self._fim_rate = fim_rate
        self._samplers = {
            length: [
                Sampler(stream.num_tokens, length, config.seed, number) for number, stream in enumerate(self.streams)
            ]
            for length in self.cursor.sequence_lengths
        }
        self._ahead: dict[tuple[int, int], Windows] = {}
        self._num_ahead = 1

    @property
    def sampler(self) -> Sampler:
        """Of the first source, before the first phase."""
        return self._samplers[self.config.sequence_length][0]

    def locate(self, sample_ids: np.ndarray) -> Windows:
        """Where samples [N] of one sequence length begin."""
        return self._resolve(np.asarray(sample_ids, dtype=np.int64))

    def windows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Tokens int64 [N, S + 1] of sample ids [N]: [:, :-1] are the inputs, [:, 1:] the targets."""
        return self._gather(sample_ids, self.locate(sample_ids))

    def documents(self, sample_ids: np.ndarray) -> np.ndarray:
        """Which document each token of `windows` belongs to, counted from 0 in every window: int32 [N, S + 1]."""
        return self._documents(self.locate(sample_ids))

    def microbatch(
        self, *, consumed: int, microbatch: int, data_rank: int, data_size: int, micro_batch_size: int
    ) -> np.ndarray:
        """Tokens int64 [B, S + 1] of one data rank's micro-batch; see data.sampler.step_sample_ids.

        Raises SamplerError with document_mask: whoever masks must take `batch`.
        """
        if self.config.document_mask:
            raise SamplerError(
                "data.document_mask=true: this caller takes tokens alone and could not mask; use "
                "data.document_mask=false"
            )
        return self.batch(
            consumed=consumed,
            microbatch=microbatch,
            data_rank=data_rank,
            data_size=data_size,
            micro_batch_size=micro_batch_size,
        ).tokens

    def batch(self, *, consumed: int, microbatch: int, data_rank: int, data_size: int, micro_batch_size: int) -> Batch:
        """One data rank's micro-batch, with its documents if they are to be masked."""
        ids = step_sample_ids(
            consumed=consumed,
            microbatch=microbatch,
            data_rank=data_rank,
            data_size=data_size,
            micro_batch_size=micro_batch_size,
        )
        key = (int(ids[0]), micro_batch_size)
        if key not in self._ahead:
            self._look_ahead(ids, stride=data_size * micro_batch_size)
        windows = self._ahead.pop(key)
        tokens = self._gather(ids, windows)
        return Batch(tokens, self._documents(windows) if self.config.document_mask else None)

    def _look_ahead(self, ids: np.ndarray, *, stride: int) -> None:
        """Computes the places of these samples and of the same rank's next ones, ever more of them while it pays."""
        if len(self._ahead) > _LOOK_AHEAD:  # guesses that nobody asked for
            self._ahead.clear()
            self._num_ahead = 1
        first = int(ids[0])
        ahead = np.arange(self._num_ahead)[:, None] * stride + ids
        # a stretch of another length is another shape: guess up to its beginning only
        ahead = ahead[: max(1, sum(self._one_length(first, int(row[-1])) for row in ahead))]
        found = self._resolve(ahead.ravel())
        for number, row in enumerate(ahead):
            part = slice(number * len(ids), (number + 1) * len(ids))
            self._ahead[int(row[0]), len(ids)] = Windows(found.sequence_length, found.source[part], found.start[part])
        self._num_ahead = min(_LOOK_AHEAD, 2 * self._num_ahead)

    def _one_length(self, first: int, last: int) -> bool:
        return len(self.cursor.stretches) == 1 or self.cursor.stretch(first) is self.cursor.stretch(last)

    def _resolve(self, ids_N: np.ndarray) -> Windows:
        places = self.cursor.places(ids_N)
        samplers = self._samplers[places.sequence_length]
        starts_N = np.empty(len(ids_N), dtype=np.int64)
        for source in np.unique(places.source):
            at = np.flatnonzero(places.source == source)
            starts_N[at] = samplers[source].starts(places.rank[at])
        return Windows(places.sequence_length, places.source.tolist(), starts_N.tolist())

    def _gather(self, ids: np.ndarray, windows: Windows) -> np.ndarray:
        out = np.empty((len(windows.start), windows.sequence_length + 1), dtype=np.int64)
        for row, source, start in zip(out, windows.source, windows.start, strict=True):
            self.streams[source].copy(start, row)
        if self._fim_rate is not None:
            for sample, row, source, start in zip(ids.tolist(), out, windows.source, windows.start, strict=True):
                rate = self._fim_rate(self.cursor.tokens_seen(sample))
                self.streams[source].require_rate(rate)
                self.streams[source].turn_back(start, row, rate)
        return out

    def _documents(self, windows: Windows) -> np.ndarray:
        length = windows.sequence_length + 1
        out = np.zeros((len(windows.start), length), dtype=np.int32)
        for row, source, start in zip(out, windows.source, windows.start, strict=True):
            row[self.streams[source].documents(start, length)[1][1:-1] - start] = 1
            np.cumsum(row, out=row)
        return out


def _open(prefixes: tuple[str, ...]) -> list[TokenStream]:
    """The sources, or TokenFileError with the problems of all of them."""
    streams, errors = [], []
    for prefix in prefixes:
        try:
            streams.append(TokenStream(prefix))
        except TokenFileError as error:
            errors.append(str(error))
    errors += tokenizer_problems({stream.prefix: stream.manifest for stream in streams if stream.manifest})
    if errors:
        raise TokenFileError("; ".join(errors))
    return streams
