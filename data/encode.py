"""What one worker does with one unit of input: documents to token ids, in files that the next stage puts together.

WORK/unit-000012.tokens   ids of all documents, one after another
WORK/unit-000012.docs     one record (DOCUMENT) each
WORK/unit-000012.json     counts and rejects; written last, so what has it is complete
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.draws import document_hash, document_id, is_heldout
from data.fim import FimTokens, cuts, is_turned, turned
from data.index import sha256_file
from data.inputs import Reject, Text, Unit, read
from data.split import Splits, find_splits
from data.tokenizer_file import TokenizerError, load_tokenizer, special_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DOCUMENT = np.dtype(
    [
        ("name", "<u8"),  # data.draws.document_id
        ("rest", "<u8"),  # 64 more bits of the hash: equal in both means equal documents
        ("length", "<i4"),
        ("text_bytes", "<i8"),
        ("heldout", "u1"),
        ("turned", "u1"),
        ("num_split", "<i4"),
    ]
)
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """What is done to every document. tokenizer: path of a tokenizers file. Rates lie in [0, 1]."""

    tokenizer: str
    text_key: str = "text"
    heldout_fraction: float = 0.01
    fim_rate: float = 0.0
    split_rate: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class UnitResult:
    """Counts of one unit; lines: of a JSON-lines unit, so that the next unit's lines get their numbers."""

    documents: int
    tokens: int
    text_bytes: int
    lines: int
    max_token_id: int
    rejects: tuple[Reject, ...]


class Encoder:
    """A tokenizer and what the recipe asks of it. Raises TokenizerError where it lacks something."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer: Tokenizer = load_tokenizer(recipe.tokenizer)
        self.special = special_ids(self.tokenizer, recipe.tokenizer)
        self.dtype = np.dtype("<u2" if self.special.vocab_size < 1 << 16 else "<i4")
        self.splits: Splits | None = find_splits(self.tokenizer) if recipe.split_rate else None
        if recipe.fim_rate and self.special.fim is None:
            raise TokenizerError(f"{recipe.tokenizer}: no fill-in-the-middle markers; set the FIM rate to 0")
        if self.splits is not None and not self.splits.num_joined:
            raise TokenizerError(
                f"{recipe.tokenizer}: no token joins punctuation and line breaks; set the split rate to 0"
            )
        if recipe.fim_rate or recipe.split_rate:
            self._require_joinable()

    def _require_joinable(self) -> None:
        """Parts that are tokenised alone must decode to the whole; a tokenizer that adds blanks does not do that."""
        pieces = ["def f", "oo(x):\n", "  return", " x\n\n"]
        ids = [token for piece in pieces for token in self.tokenizer.encode(piece, add_special_tokens=False).ids]
        if self.tokenizer.decode(ids, skip_special_tokens=False) != "".join(pieces):
            raise TokenizerError(
                f"{self.recipe.tokenizer}: parts of a text do not decode to the text, so it can be neither turned nor "
                "split; use a byte-level tokenizer or set the FIM and split rates to 0"
            )

    def encode(self, documents: list[Text]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A record [] of DOCUMENT and the ids [length], end of sentence included, of each document."""
        digests = [document_hash(document.raw) for document in documents]
        names = [document_id(digest) for digest in digests]
        plans = [self._pieces(document, name) for document, name in zip(documents, names, strict=True)]
        flat = [piece for pieces, _ in plans for piece in pieces]
        encodings = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        for document, digest, name, (pieces, heldout) in zip(documents, digests, names, plans, strict=True):
            parts = [next(encodings).ids for _ in pieces]
            fim = self.special.fim if len(parts) == 3 else None
            ids, num_split = self._whole(parts, name, fim, heldout=heldout)
            record = np.zeros((), dtype=DOCUMENT)
            rest = int.from_bytes(digest[8:16], "little")
            record[()] = (name, rest, len(ids), len(document.raw), heldout, fim is not None, num_split)
            yield record, ids

    def _pieces(self, document: Text, name: int) -> tuple[list[str], bool]:
        """What is tokenised by itself: the text, or prefix, middle and suffix. Held-out text stays as it is."""
        text, heldout = document.text, is_heldout(document.raw, self.recipe.heldout_fraction)
        if heldout or not is_turned(name, rate=self.recipe.fim_rate, seed=self.recipe.seed):
            return [text], heldout
        begin, end = cuts(len(text), name, seed=self.recipe.seed)
        return [text[:begin], text[begin:end], text[end:]], heldout

    def _whole(
        self, parts: list[list[int]], name: int, fim: FimTokens | None, *, heldout: bool
    ) -> tuple[np.ndarray, int]:
        ids = turned(parts[0], parts[1], parts[2], fim) if fim else [*parts[0], self.special.end_of_sentence]
        array = np.array(ids, dtype=np.int64)
        if self.splits is None or heldout:
            return array, 0
        split = self.splits.apply(array, name, rate=self.recipe.split_rate, seed=self.recipe.seed)
        return split, len(split) - len(array)


@lru_cache(maxsize=1)
def _encoder(recipe: Recipe, tokenizer_sha256: str) -> Encoder:
    del tokenizer_sha256  # a part of the key: another file may have come under the same name
    return Encoder(recipe)


def encoder(recipe: Recipe) -> Encoder:
    """The encoder of this process, made once: reading a tokenizer takes longer than many a unit."""
    return _encoder(recipe, sha256_file(recipe.tokenizer))


def unit_path(work: Path, number: int, ending: str) -> Path:
    """Where a unit's result lies."""
    return work / f"unit-{number:06d}.{ending}"


def encode_unit(unit: Unit, number: int, recipe: Recipe, work: Path) -> UnitResult:
    """Reads, encodes and writes one unit, unless a complete result is there already."""
    done = finished(work, number)
    if done is not None:
        return done
    made = encoder(recipe)
    lines: Counter[str] = Counter()
    rejects: list[Reject] = []
    documents = tokens = text_bytes = 0
    max_token_id = -1
    paths = {ending: unit_path(work, number, f"{ending}.tmp") for ending in ("tokens", "docs")}
    with open(paths["tokens"], "wb") as tokens_out, open(paths["docs"], "wb") as docs_out:
        items = read(unit, text_key=recipe.text_key, count_line=lambda: lines.update(("lines",)))
        for batch in _batches(items, rejects):
            for record, ids in made.encode(batch):
                tokens_out.write(ids.astype(made.dtype).tobytes())
                docs_out.write(record.tobytes())
                documents, tokens = documents + 1, tokens + len(ids)
                text_bytes += int(record["text_bytes"])
                max_token_id = max(max_token_id, int(ids.max()))
    result = UnitResult(documents, tokens, text_bytes, lines["lines"], max_token_id, tuple(rejects))
    for ending, path in paths.items():
        os.replace(path, unit_path(work, number, ending))
    temporary = unit_path(work, number, "json.tmp")
    temporary.write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(temporary, unit_path(work, number, "json"))
    return result


def finished(work: Path, number: int) -> UnitResult | None:
    """The result of a unit that an earlier call completed."""
    path = unit_path(work, number, "json")
    if not path.exists():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    return UnitResult(**{**value, "rejects": tuple(Reject(**reject) for reject in value["rejects"])})


def _batches(items: Iterator[Text | Reject], rejects: list[Reject]) -> Iterator[list[Text]]:
    batch, size = [], 0
    for item in items:
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        batch.append(item)
        size += len(item.raw)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
