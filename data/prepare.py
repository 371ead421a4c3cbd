"""From text to token files: duplicates out, a held-out split, a byte-level BPE tokenizer, PREFIX.bin/.idx/.json.

    documents -> exact duplicates removed -> split by a keyed hash of the content -> tokenizer trained on a sample of
    the training part -> ids + end of sentence -> OUT/{train,heldout}.{bin,idx,json} and OUT/tokenizer.json

The text of the corpus is held in memory, which suits the corpora of data/corpus.py (12 to 54 MB). Two preparations of
the same documents with the same arguments write the same bytes.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.corpus import SOURCES, Document, SourceInfo, collect
from data.tokens import (
    FileRecord,
    Manifest,
    SourceRecord,
    TokenFile,
    TokenFileError,
    TokenWriter,
    file_problems,
    sha256_file,
    sibling,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# DeepSeek-V3's names, in which the bar and the gap are no ASCII; the position in this list is the id
_BAR, _GAP = "\uff5c", "\u2581"
SPECIAL_TOKENS = tuple(
    f"<{_BAR}{name.replace(' ', _GAP)}{_BAR}>"
    for name in ("begin of sentence", "end of sentence", " pad ", "fim begin", "fim hole", "fim end")
)
END_OF_SENTENCE = 1
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # every byte must have a token, or a text may not survive the round trip
TOKENIZER_SAMPLE_BYTES = 4_000_000
TOKENIZER_FILE = "tokenizer.json"
_RECIPE = 1  # counts up whenever the same arguments would give other files
_BATCH_BYTES = 1 << 20
_SPLIT_KEY = b"expertpipe held-out split 1"
_SAMPLE_KEY = b"expertpipe tokenizer sample 1"


class PrepareError(ValueError):
    """The arguments or the corpus cannot give a training and a held-out set."""

    user_error = True


@dataclass(frozen=True)
class Prepared:
    """Where the token files are; rebuilt is False if they were there already."""

    train_prefix: str
    heldout_prefix: str
    tokenizer_path: Path
    train: Manifest
    heldout: Manifest
    rebuilt: bool


def _silent(message: str) -> None:
    del message


def prepare(
    *,
    corpus: str | Iterable[Document],
    out_dir: str | Path,
    vocab_size: int,
    heldout_fraction: float = 0.02,
    progress: Callable[[str], None] = _silent,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Tokenises a named corpus (data/corpus.py) or given documents into `out_dir`; does nothing if that is done.

    vocab_size: upper limit; a small corpus may give fewer, see the manifest. heldout_fraction: chance of a document to
    be held out, decided by its content alone. progress: called with one line of text now and then. cache_dir: for
    fetched corpora. An interrupted call leaves no manifest, so the next one starts again.
    Raises PrepareError for arguments or too few documents, CorpusError for a source that cannot be had.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise PrepareError(f"vocab_size is {vocab_size}, 256 bytes and the special tokens need {MIN_VOCAB_SIZE}")
    if not 0 < heldout_fraction < 1:
        raise PrepareError(f"heldout_fraction is {heldout_fraction}, it must lie between 0 and 1")
    out = Path(out_dir)
    documents = _unique(collect(corpus, cache_dir=cache_dir) if isinstance(corpus, str) else corpus, progress)
    arguments = {
        "recipe": _RECIPE,
        "vocab_size": vocab_size,
        "heldout_fraction": heldout_fraction,
        "tokenizer_sample_bytes": TOKENIZER_SAMPLE_BYTES,
    }
    fingerprint = _fingerprint(documents)
    reason = _why_not_reusable(out, arguments, fingerprint)
    if reason is None:
        progress(f"{out}: complete, made from the same documents and arguments; nothing to do")
        return _prepared(out, rebuilt=False)
    progress(f"preparing {out}: {reason}")
    parts = _split(documents, heldout_fraction)
    out.mkdir(parents=True, exist_ok=True)
    for name in parts:  # from here on the old output is being replaced: no manifest may vouch for a mixture
        sibling(out / name, ".json").unlink(missing_ok=True)
    tokenizer = train_tokenizer(
        [document.text for document in parts["train"]], vocab_size=vocab_size, progress=progress
    )
    temporary = out / f"{TOKENIZER_FILE}.tmp-{uuid.uuid4().hex[:12]}"
    temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(temporary, out / TOKENIZER_FILE)
    for name, part in parts.items():
        _write_part(out / name, part, tokenizer, arguments=arguments, fingerprint=fingerprint, progress=progress)
    return _prepared(out, rebuilt=True)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a tokenizers file, set to take special tokens' names in a text as plain text.

    Otherwise a document that quotes the end of sentence would end there. Added tokens that their file calls ordinary
    (DeepSeek's fill-in-the-middle markers are) become special, which is what spares them. Raises PrepareError.
    """
    from tokenizers import Tokenizer

    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
        for token in description.get("added_tokens") or ():
            token["special"] = True
        tokenizer = Tokenizer.from_str(json.dumps(description))
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror}; a tokenizers file (tokenizer.json) is needed") from error
    except Exception as error:  # the tokenizers package raises bare Exception
        reason = " ".join(str(error).split())
        raise PrepareError(f"{path}: no tokenizers file ({reason}); give a tokenizer.json") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def texts(prefix: str | Path) -> Iterator[str]:
    """The documents of a prepared set as text, exactly as they were before tokenising.

    Raises TokenFileError if the tokenizer beside the data is not the one its manifest names.
    """
    manifest, token_file = Manifest.read(prefix), TokenFile(prefix)
    path = sibling(prefix, ".json").parent / manifest.tokenizer_file
    if not path.is_file() or sha256_file(path) != manifest.tokenizer_sha256:
        raise TokenFileError(f"{path}: missing, or not the tokenizer {prefix}.json names; prepare the data again")
    tokenizer = load_tokenizer(path)
    for ids in token_file.documents():
        yield tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False)


def train_tokenizer(
    training_texts: Sequence[str], *, vocab_size: int, progress: Callable[[str], None] = _silent
) -> "Tokenizer":
    """Byte-level BPE without normaliser, so that decoding gives back every text exactly; SPECIAL_TOKENS come first.

    Trained on at most TOKENIZER_SAMPLE_BYTES, taken in an order that depends on the texts' content alone: more text
    changes the merges little and costs time in proportion.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    sample, total = [], 0
    for text in sorted(training_texts, key=lambda text: _keyed_hash(text, _SAMPLE_KEY)):
        size = len(text.encode("utf-8"))
        if not sample or total + size <= TOKENIZER_SAMPLE_BYTES:
            sample.append(text)
            total += size
    progress(f"training a tokenizer of {vocab_size} tokens on {len(sample)} documents, {total / 1e6:.2f} MB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _keyed_hash(text: str, key: bytes) -> int:
    """64 bits that depend on the content alone, so neither order nor neighbours move a document."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest(), "little")


def _is_heldout(text: str, fraction: float) -> bool:
    return _keyed_hash(text, _SPLIT_KEY) < fraction * 2.0**64


def _split(documents: Sequence[Document], heldout_fraction: float) -> dict[str, list[Document]]:
    parts: dict[str, list[Document]] = {"train": [], "heldout": []}
    for document in documents:
        parts["heldout" if _is_heldout(document.text, heldout_fraction) else "train"].append(document)
    for name, part in parts.items():
        if not part:
            raise PrepareError(
                f"no document of {len(documents)} fell into the {name} set; "
                f"change heldout_fraction (now {heldout_fraction}) or give more documents"
            )
    return parts


def _unique(documents: Iterable[Document], progress: Callable[[str], None]) -> list[Document]:
    """The first of every group of equal texts. Near-duplicates stay."""
    seen: dict[bytes, Document] = {}
    count = 0
    for document in documents:
        where = f"{document.source}: {document.path_label}"
        if not document.text:
            raise PrepareError(f"{where}: the document is empty; leave it out")
        try:
            raw = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PrepareError(f"{where}: character {error.start} is half of a surrogate pair; leave it out") from error
        seen.setdefault(hashlib.sha256(raw).digest(), document)
        count += 1
    progress(f"collected {count} documents, {count - len(seen)} exact duplicates removed")
    return list(seen.values())


def _fingerprint(documents: Sequence[Document]) -> str:
    total = hashlib.sha256()
    for document in documents:
        for part in (document.source, document.path_label, document.text):
            raw = part.encode("utf-8")
            total.update(len(raw).to_bytes(8, "little") + raw)  # the length keeps neighbours apart
    return total.hexdigest()


def _why_not_reusable(out: Path, arguments: dict[str, Any], fingerprint: str) -> str | None:
    """None if `out` holds exactly what this call would write, every byte checked; else the reason, to be told."""
    for name in ("train", "heldout"):
        prefix = out / name
        if not sibling(prefix, ".json").exists():
            return "no complete output there"
        try:
            manifest = Manifest.read(prefix)
        except TokenFileError as error:
            return str(error)
        if dict(manifest.arguments) != arguments:
            return "the output there was made with other arguments"
        if manifest.corpus_sha256 != fingerprint:
            return "the output there was made from other documents"
        found = file_problems(prefix, manifest, hashes=True)
        if found:
            return found[0]
    for name in ("train", "heldout"):
        os.utime(sibling(out / name, ".json"))  # every byte was read: copies with new times are good from here on
    return None


def _prepared(out: Path, *, rebuilt: bool) -> Prepared:
    train, heldout = Manifest.read(out / "train"), Manifest.read(out / "heldout")
    return Prepared(str(out / "train"), str(out / "heldout"), out / TOKENIZER_FILE, train, heldout, rebuilt)


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about _BATCH_BYTES of text: enough to keep every core busy, little to hold."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_part(
    prefix: Path,
    documents: Sequence[Document],
    tokenizer: "Tokenizer",
    *,
    arguments: dict[str, Any],
    fingerprint: str,
    progress: Callable[[str], None],
) -> None:
    vocab_size = tokenizer.get_vocab_size()
    dtype = "uint16" if vocab_size < 1 << 16 else "int32"
    total = sum(len(document.text.encode("utf-8")) for document in documents)
    done = 0
    with TokenWriter(prefix, dtype) as writer:
        for batch in _batches(documents):
            encodings = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                writer.add(np.array([*encoding.ids, END_OF_SENTENCE], dtype=np.int64))
                done += len(document.text.encode("utf-8"))
            progress(f"{prefix.name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {writer.num_tokens} tokens")
    files = [sibling(prefix, ".bin"), sibling(prefix, ".idx"), prefix.parent / TOKENIZER_FILE]
    Manifest(
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=sha256_file(prefix.parent / TOKENIZER_FILE),
        vocab_size=vocab_size,
        dtype=dtype,
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        max_token_id=writer.max_token_id,
        text_bytes=total,
        files={path.name: FileRecord(path.stat().st_size, sha256_file(path)) for path in files},
        sources=_source_records(documents),
        arguments=arguments,
        corpus_sha256=fingerprint,
    ).write(prefix)


def _source_records(documents: Sequence[Document]) -> tuple[SourceRecord, ...]:
    records = []
    for name in dict.fromkeys(document.source for document in documents):
        sizes = [len(document.text.encode("utf-8")) for document in documents if document.source == name]
        info = SOURCES.get(name, SourceInfo("not stated", "given by the caller"))
        records.append(SourceRecord(name, len(sizes), sum(sizes), info.licence, info.origin))
    return tuple(records)
