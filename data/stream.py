"""One corpus as one endless-looking row of tokens, whatever files it is cut into."""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.draws import Purpose, draw, threshold
from data.fim import FimTokens, plain
from data.index import TokenFile, TokenFileError, file_size, map_array, sibling
from data.tokens import Manifest, Shards, changed_files, open_shards


@dataclass(frozen=True)
class Prepared:
    """How far preparation turned documents, from the manifest."""

    rate: float
    seed: int
    tokens: FimTokens


class TokenStream:
    """The shards of PREFIX.json one after another, or PREFIX.bin/.idx alone where there is no manifest.

    tokens [num_tokens] as if in one file: a reader cannot tell how they are cut into shards, but by `files`. Start-up
    reads sizes, times and the ends of each index, nothing that grows with the data. Raises TokenFileError with every
    problem.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = Manifest.read(prefix) if sibling(prefix, ".json").exists() else None
        if self.manifest is None:
            shards = Shards((TokenFile(prefix),), [])
        else:
            changed = changed_files(prefix, self.manifest)
            shards = Shards((), changed) if changed else open_shards(prefix, self.manifest)
        if shards.problems:
            raise TokenFileError("; ".join(shards.problems))
        self.files = shards.files
        self._begins = np.cumsum([0, *(shard.num_tokens for shard in self.files)]).tolist()
        self._first_documents = np.cumsum([0, *(shard.num_documents for shard in self.files)]).tolist()
        self.num_tokens, self.num_documents = self._begins[-1], self._first_documents[-1]
        self._tokens = [shard.tokens for shard in self.files]
        self.prepared = _prepared(self.manifest.arguments) if self.manifest else None
        self._ids = [_ids(shard) for shard in self.files] if self.prepared else []

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fills out [length] with the tokens from offset `start` on, in out's own type."""
        number = bisect_right(self._begins, start) - 1 if len(self._tokens) > 1 else 0
        begin, done, length = start - self._begins[number], 0, len(out)
        while done < length:
            part = self._tokens[number][begin : begin + length - done]
            out[done : done + len(part)] = part
            done, number, begin = done + len(part), number + 1, 0

    def documents(self, start: int, length: int) -> tuple[int, np.ndarray]:
        """First document that overlaps tokens [start, start + length), and where it and the next ones begin [n + 1].

        Documents are numbered over all shards; the last entry is the end of the last one; offsets are the stream's.
        """
        first, starts, end = -1, [], start + length
        number = bisect_right(self._begins, start) - 1
        while start < end:
            begin, stop = self._begins[number], min(end, self._begins[number + 1])
            if start < stop:
                document, part = self.files[number].documents_at(start - begin, stop - begin)
                first = self._first_documents[number] + document if first < 0 else first
                # a document never goes on in the next shard, so its end is where the next one begins
                starts.append((part if stop == end else part[:-1]) + begin)
            start, number = stop, number + 1
        return first, np.concatenate(starts)

    def require_rate(self, rate: float) -> None:
        """Raises TokenFileError if documents turned at `rate` cannot be had from this stream."""
        most = self.prepared.rate if self.prepared else 0.0
        if not 0 <= rate <= most:
            raise TokenFileError(
                f"{self.prefix}.json: prepared with a FIM rate of {most}, which a run can lower but not raise to "
                f"{rate}: prepare the data with `--fim-rate {rate}`"
            )

    def turn_back(self, start: int, out: np.ndarray, rate: float) -> None:
        """Puts documents of out = tokens [start, start + length) that a lower rate would not turn back in order."""
        prepared = self.prepared
        if prepared is None or rate >= prepared.rate:
            return
        first, starts = self.documents(start, len(out))
        limit = threshold(rate)
        for number, begin in enumerate(starts[:-1].tolist()):
            end = int(starts[number + 1])
            if end <= begin or draw(prepared.seed, Purpose.FIM, self._name(first + number)) < limit:
                continue
            stored = np.empty(end - begin, dtype=out.dtype)
            self.copy(begin, stored)
            low, high = max(begin, start), min(end, start + len(out))
            out[low - start : high - start] = plain(stored, prepared.tokens)[low - begin : high - begin]

    def _name(self, document: int) -> int:
        number = bisect_right(self._first_documents, document) - 1
        return int(self._ids[number][document - self._first_documents[number]])


def _prepared(arguments: Any) -> Prepared | None:
    """None for data that no document of was turned in."""
    rate, tokens = arguments.get("fim_rate", 0.0), arguments.get("fim_tokens")
    return Prepared(rate, arguments["seed"], FimTokens(**tokens)) if rate and tokens else None


def _ids(shard: TokenFile) -> np.ndarray:
    path = sibling(shard.prefix, ".ids")
    size = file_size(path)
    if size != 8 * shard.num_documents:
        raise TokenFileError(
            f"{path}: byte {min(size, 8 * shard.num_documents)}: {size} bytes where {shard.num_documents} documents "
            f"need {8 * shard.num_documents}; prepare the data again"
        )
    return map_array(path, dtype="<u8", offset=0, count=shard.num_documents)
