"""Token files that another program has made, such as Megatron-LM's preprocess_data.py: what they lack is a manifest.

PREFIX.bin and PREFIX.idx are read, checked and left as they are; PREFIX.json comes beside them, and their tokenizer if
it is not there already. A set held out cannot be cut from them: text kept apart is tokenised and adopted by itself.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index import CHUNK, TokenFile, TokenFileError, sha256_file, sibling
from data.inputs import named_os_errors
from data.split import special_id, vocabulary_size
from data.token_bytes import token_bytes
from data.tokenizer_file import (
    DEEPSEEK,
    TOKENIZER_FILE,
    TokenizerError,
    copy_tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from data.tokens import WORK_FOLDER, FileRecord, Manifest, SourceRecord

ADOPTED = "token files of another program"  # the origin, in the manifest


@dataclass(frozen=True)
class Adopted:
    """What was found. num_ended: documents that end with the end of sentence; None if the tokenizer names none."""

    manifest: Manifest
    num_ended: int | None


@dataclass
class _Counts:
    largest: int = -1
    ended: int = 0
    text_bytes: int = 0


def adopt(prefix: str | Path, tokenizer: str | Path, *, licence: str = "not stated") -> Adopted:
    """Reads every byte of PREFIX.bin and .idx, and writes the manifest that `prepare` would have written beside them.

    tokenizer: as `find_tokenizer` takes it. licence: of the text. The manifest's text_bytes is 0, for not known, where
    the tokenizer is not a byte-level one. Raises TokenFileError for damaged files, ids that are not the tokenizer's and
    a manifest that is there already, TokenizerError for the tokenizer, PrepareError for what the system refuses.
    """
    path = sibling(prefix, ".json")
    if path.exists():
        raise TokenFileError(
            f"{path}: is there already: `expertpipe prepare --verify {prefix}` compares it with the files"
        )
    if (path.parent / WORK_FOLDER).exists():
        raise TokenFileError(
            f"{path.parent / WORK_FOLDER}: of a preparation that was stopped: the same command continues it"
        )
    with named_os_errors(prefix):
        source = find_tokenizer(tokenizer)
        made = load_tokenizer(source)
        vocab_size, end = vocabulary_size(made), special_id(made, DEEPSEEK["end_of_sentence"])
        file = TokenFile(prefix, scan=True)
        counts = _count(file, vocab_size, -1 if end is None else end, _text_bytes(source, vocab_size), str(tokenizer))
        beside = _beside(prefix, source)
        names = [sibling(prefix, ending) for ending in (".bin", ".idx")] + [beside]
        files = {name.name: FileRecord(name.stat().st_size, sha256_file(name)) for name in names}
        manifest = Manifest(
            tokenizer_file=beside.name,
            tokenizer_sha256=files[beside.name].sha256,
            vocab_size=vocab_size,
            dtype=file.dtype.name,
            num_tokens=file.num_tokens,
            num_documents=file.num_documents,
            max_token_id=counts.largest,
            text_bytes=counts.text_bytes,
            files=files,
            sources=(SourceRecord(Path(prefix).name, file.num_documents, counts.text_bytes, licence, ADOPTED),),
            arguments={"tokenizer": files[beside.name].sha256, "end_of_sentence": end},
            corpus_sha256=hashlib.sha256(files[names[0].name].sha256.encode()).hexdigest(),
            counts={"documents_read": file.num_documents, "documents_ended": counts.ended},
        )
        manifest.write(prefix)
    return Adopted(manifest, None if end is None else counts.ended)


def _text_bytes(tokenizer: Path, vocab_size: int) -> np.ndarray:
    """Bytes of text that each id stands for [vocab_size], 0 where nobody can say."""
    sizes = np.zeros(vocab_size, dtype=np.int64)
    try:
        found = token_bytes(tokenizer)
    except TokenizerError:
        return sizes
    sizes[: len(found)] = found[:vocab_size]
    return sizes


def _count(file: TokenFile, vocab_size: int, end: int, sizes: np.ndarray, tokenizer: str) -> _Counts:
    """One pass over the tokens; TokenFileError for none at all and for an id outside the vocabulary."""
    if not file.num_tokens:
        raise TokenFileError(f"{file.prefix}.bin: holds no token; check the prefix")
    counts = _Counts()
    for begin in range(0, file.num_tokens, CHUNK):
        part = file.tokens[begin : begin + CHUNK]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            at = file.first_outside(vocab_size) or 0
            raise TokenFileError(
                f"{file.prefix}.bin: byte {at * file.dtype.itemsize}: id {int(file.tokens[at])}, tokenizer {tokenizer} "
                f"has {vocab_size}: give the tokenizer that these files were made with"
            )
        counts.largest = max(counts.largest, high)
        counts.text_bytes += int(sizes[part].sum())
        _, starts = file.documents_at(begin, begin + len(part))
        ends = np.unique(starts[1:])  # of an empty document the one before it again
        ends = ends[(begin < ends) & (ends <= begin + len(part))]
        counts.ended += int(np.count_nonzero(part[ends - 1 - begin] == end))
    return counts


def _beside(prefix: str | Path, tokenizer: Path) -> Path:
    """The tokenizer in the folder of the data: where it lies already, else as a copy under a name that is free."""
    folder, sha256 = sibling(prefix, ".json").parent, sha256_file(tokenizer)
    if tokenizer.resolve().parent == folder.resolve():
        return folder / tokenizer.name
    for target in (folder / TOKENIZER_FILE, sibling(prefix, f".{TOKENIZER_FILE}")):
        if not target.exists():
            copy_tokenizer(tokenizer, target)
            return target
        if sha256_file(target) == sha256:
            return target
    raise TokenFileError(f"{target}: another tokenizer than {tokenizer}: move it away, or give that one")
