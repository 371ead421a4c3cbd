"""Text that is on this machine, with a tokenizer of its own, as one more source of `data.ingest`.

    documents -> OUT/.text/SOURCE.jsonl -> a tokenizer trained on a sample of the training part -> ingest -> OUT

What is done to a document, the held-out split, duplicates, rejects and manifests are ingest's; here are only the
collecting and the tokenizer. The text of the corpus is held in memory, which suits those of data/corpus.py (12 to
54 MB). Two preparations of the same documents with the same arguments write the same bytes.
"""

import filecmp
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.corpus import SOURCES, Document, SourceInfo, collect
from data.draws import is_heldout
from data.encode import Recipe
from data.ingest import TEXT_FOLDER, Report, ingest, require_possible
from data.inputs import PrepareError, Reject, Source, named_os_errors
from data.tokenizer_file import TOKENIZER_FILE, load_tokenizer
from data.tokenizer_training import MIN_VOCAB_SIZE, TOKENIZER_SAMPLE_BYTES, train_tokenizer
from data.tokens import Manifest, TokenFile, TokenFileError, sha256_file, sibling

_STAGES = {"encode": "tokenising", "deduplicate": "looking for duplicates", "write": "writing"}


@dataclass(frozen=True)
class Prepared:
    """Where the token files are; rebuilt is False if they were there already."""

    train_prefix: str
    heldout_prefix: str
    tokenizer_path: Path
    train: Manifest
    heldout: Manifest
    rejects_path: Path
    rebuilt: bool


def _silent(message: str) -> None:
    del message


def prepare(
    *,
    corpus: str | Iterable[Document],
    out_dir: str | Path,
    vocab_size: int,
    heldout_fraction: float = 0.02,
    fim_rate: float = 0.0,
    split_rate: float = 0.0,
    seed: int = 0,
    progress: Callable[[str], None] = _silent,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Tokenises a named corpus (data/corpus.py) or given documents into `out_dir`; does nothing if that is done.

    vocab_size: upper limit; a small corpus may give fewer, see the manifest. heldout_fraction: chance of a document to
    be held out, decided by its content alone. fim_rate, split_rate, seed: see data.encode.Recipe; the tokenizer made
    here has the markers, but no token to split. progress: called with one line of text now and then. cache_dir: for
    fetched corpora. A killed call leaves no manifest; the same call continues it.
    Raises PrepareError or InputError for arguments, too few documents and what the system refuses, TokenizerError for
    a split_rate above 0, CorpusError for a source that cannot be had.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise PrepareError(f"vocab_size is {vocab_size}, 256 bytes and the special tokens need {MIN_VOCAB_SIZE}")
    if not 0 < heldout_fraction < 1:
        raise PrepareError(f"heldout_fraction is {heldout_fraction}, it must lie between 0 and 1")
    recipe = Recipe("", heldout_fraction=heldout_fraction, fim_rate=fim_rate, split_rate=split_rate, seed=seed)
    require_possible(recipe)  # before a tokenizer is trained for it
    out, rejects = Path(out_dir), list[Reject]()
    with named_os_errors(out):
        found = collect(corpus, cache_dir=cache_dir, rejects=rejects) if isinstance(corpus, str) else corpus
        documents = list(found)
        training = _training_part(documents, heldout_fraction)
        sources = _write_text(documents, out / TEXT_FOLDER)
        tokenizer = _tokenizer(training, sources, vocab_size, heldout_fraction, progress)
    done = ingest(
        sources,
        out,
        replace(recipe, tokenizer=str(tokenizer)),
        workers=0,  # the tokenizers package has threads; processes would take longer to start than a corpus to encode
        rejects=rejects,
        on_progress=lambda report: progress(_line(report)),
    )
    assert done.heldout is not None
    if not done.rebuilt:
        progress(f"{out}: complete, made from the same documents and arguments; nothing to do")
    aside = sum(count for reason, count in done.train.counts.items() if reason.startswith("rejected: "))
    duplicates = done.train.counts["duplicates"]
    progress(f"{duplicates} exact duplicates left out, {aside} files set aside, see {done.rejects_path}")
    names = (str(out / "train"), str(out / "heldout"), out / TOKENIZER_FILE)
    return Prepared(*names, done.train, done.heldout, done.rejects_path, done.rebuilt)


def _line(report: Report) -> str:
    share = 100 * report.done / max(1, report.total)
    return f"{_STAGES[report.stage]:<23}{share:4.0f}%  {report.documents} documents  {report.tokens} tokens"


def _training_part(documents: Sequence[Document], fraction: float) -> list[str]:
    """Every different text of the training set; PrepareError if it or the held-out set is empty."""
    parts: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for document in documents:
        try:
            raw = document.text.encode("utf-8")
        except UnicodeEncodeError:
            continue  # ingest sets it aside, as it does what is blank
        if raw.strip():
            parts[is_heldout(raw, fraction)][document.text] = None
    for heldout, part in parts.items():
        if not part:
            raise PrepareError(
                f"no document of {len(documents)} fell into the {'heldout' if heldout else 'train'} set; "
                f"change heldout_fraction (now {fraction}) or give more documents"
            )
    return list(parts[False])


def _write_text(documents: Sequence[Document], folder: Path) -> list[Source]:
    """A file of JSON lines for each source, in the order in which they come; one that would be equal stays."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for name in dict.fromkeys(document.source for document in documents):
        made, path = folder / f"{name}.tmp", folder / f"{name}.jsonl"
        with open(made, "w", encoding="utf-8", newline="\n") as stream:
            for document in documents:
                if document.source == name:
                    stream.write(json.dumps({"text": document.text, "path": document.path_label}) + "\n")
        if path.exists() and filecmp.cmp(made, path, shallow=False):
            made.unlink()  # the time of an unchanged input says that nothing has to be made again
        else:
            os.replace(made, path)
        info = SOURCES.get(name, SourceInfo("not stated", "given by the caller"))
        sources.append(Source(str(path), name, info.licence, info.origin))
    return sources


def _tokenizer(
    training: Sequence[str],
    sources: Sequence[Source],
    vocab_size: int,
    fraction: float,
    progress: Callable[[str], None],
) -> Path:
    """A tokenizer trained on a sample of these texts, or the one that an earlier call has trained on the same."""
    folder = Path(sources[0].path).parent
    path, marker = folder / TOKENIZER_FILE, folder / "tokenizer-of.json"
    key = json.dumps([vocab_size, fraction, TOKENIZER_SAMPLE_BYTES, [sha256_file(source.path) for source in sources]])
    if path.exists() and marker.exists() and marker.read_text(encoding="utf-8").split("\n") == [key, sha256_file(path)]:
        return path
    marker.unlink(missing_ok=True)
    tokenizer = train_tokenizer(training, vocab_size=vocab_size, progress=progress)
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    marker.write_text("\n".join([key, sha256_file(path)]), encoding="utf-8")
    return path


def texts(prefix: str | Path) -> Iterator[str]:
    """The documents of a prepared set as text, exactly as they were before tokenising.

    Raises TokenFileError if the tokenizer beside the data is not the one its manifest names.
    """
    manifest = Manifest.read(prefix)
    path = sibling(prefix, ".json").parent / manifest.tokenizer_file
    if not path.is_file() or sha256_file(path) != manifest.tokenizer_sha256:
        raise TokenFileError(f"{path}: missing, or not the tokenizer {prefix}.json names; prepare the data again")
    tokenizer = load_tokenizer(path)
    for shard in manifest.shard_prefixes(prefix):
        for ids in TokenFile(shard).documents():
            yield tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False)
