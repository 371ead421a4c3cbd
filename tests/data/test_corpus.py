import gzip
import itertools
import json
import sysconfig
import tarfile
from pathlib import Path

import pytest

from data.corpus import CORPORA, SOURCES, CorpusError, collect, corpus_named
from data.inputs import Reject


def put(path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A stand-in for the standard library with one of everything that must stay out."""
    root = tmp_path / "lib"
    put(root / "b.py", b"b = 1\r\n")
    put(root / "a" / "z.py", "z = 'ü'\n".encode())
    put(root / "latin.py", b"x = '\xfc'\n")
    put(root / "empty.py", b"")
    put(root / "data.txt", b"no Python\n")
    for left_out in ("test/t.py", "a/tests/t.py", "idlelib/idle_test/t.py", "lib2to3/tests/t.py", "site-packages/p.py"):
        put(root / left_out, b"t = 1\n")
    put(root / "_sysconfigdata_x.py", b"prefix = 'somewhere'\n")
    put(root / "config-3.11" / "c.py", b"c = 1\n")
    (root / "link.py").symlink_to(root / "b.py")
    real = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *rest: str(root) if name == "stdlib" else real(name, *rest))
    return root


def test_stdlib_selection_and_counts(library):
    rejects: list[Reject] = []
    documents = list(collect("stdlib", rejects=rejects))
    assert [(document.path_label, document.text) for document in documents] == [
        ("a/z.py", "z = 'ü'\n"),
        ("b.py", "b = 1\r\n"),
    ]
    assert [(reject.file, reject.reason, reject.byte_offset) for reject in rejects] == [
        ("stdlib: empty.py", "empty document", 0),
        ("stdlib: latin.py", "invalid UTF-8", 5),
        ("stdlib: link.py", "symbolic link", None),
    ]


def test_real_stdlib():
    documents = list(itertools.islice(collect("stdlib"), 40))
    assert len(documents) == 40 and all(document.source == "stdlib" and document.text for document in documents)
    labels = [document.path_label for document in documents]
    assert labels == sorted(labels) and not any(Path(label).is_absolute() for label in labels)


def test_every_source_is_described():
    assert {source for sources in CORPORA.values() for source in sources} == set(SOURCES)


def test_a_corpus_is_known_by_its_origins():
    for name, sources in CORPORA.items():
        assert corpus_named([SOURCES[source].origin for source in sources]) == name
    assert corpus_named(["crawl.jsonl"]) is None and corpus_named([]) is None


def fill_cache(cache: Path) -> None:
    linux = cache / "linux-doc-6.1/usr/share/doc/linux-doc-6.1/Documentation"
    put(linux / "index.rst.gz", b"English\n")
    put(linux / "notes.txt", b"plain\n")
    put(linux / "schema.yaml.gz", b"no: text\n")
    put(linux / "translations/zh_CN/index.rst", "中文\n".encode())
    put(linux / "translations/it_IT/index.rst", b"italiano\n")
    put(cache / "perl-doc/usr/share/perl/5.36.0/pod/perlfunc.pod", b"=head1\n")
    poems = [{"author": "A", "rhythmic": f"T{number}", "paragraphs": ["x", "y"]} for number in range(21)]
    songs = cache / "chinese-poetry@2.0.1/package/dist/songci"
    put(songs / "ci.song.0.json", json.dumps(poems).encode())
    put(songs / "author.song.json", b"[]")


def test_full_from_a_filled_cache(library, tmp_path):
    fill_cache(tmp_path / "cache")
    documents = list(collect("full", cache_dir=tmp_path / "cache"))
    assert [(document.source, document.path_label) for document in documents] == [
        ("stdlib", "a/z.py"),
        ("stdlib", "b.py"),
        ("linux-doc", "index.rst"),
        ("linux-doc", "notes.txt"),
        ("linux-doc-zh", "translations/zh_CN/index.rst"),
        ("perl-doc", "5.36.0/pod/perlfunc.pod"),
        ("songci", "ci.song.0.json#0"),
        ("songci", "ci.song.0.json#20"),
    ]
    assert documents[-1].text == "T20 A\nx\ny\n" and documents[-2].text.startswith("T0 A\nx\ny\n\nT1 A\n")


def script(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_fetches_into_the_cache_once(library, tmp_path, monkeypatch):
    cache, programs = tmp_path / "cache", tmp_path / "bin"
    fill_cache(cache)
    (cache / "perl-doc").rename(tmp_path / "aside")
    script(programs / "apt-get", '[ "$1 $2" = "download perl-doc" ] && : > perl-doc_1_all.deb')
    script(programs / "dpkg-deb", '[ "$1 $2 $3" = "-x perl-doc_1_all.deb unpacked" ] && : > unpacked/done')
    monkeypatch.setenv("PATH", str(programs))
    list(collect("full", cache_dir=cache))
    assert [path.name for path in (cache / "perl-doc").iterdir()] == ["done"]
    assert not list(cache.glob(".fetch-*"))
    script(programs / "apt-get", "exit 1")
    list(collect("full", cache_dir=cache))


def test_fetches_the_poems_only(library, tmp_path, monkeypatch):
    cache, programs = tmp_path / "cache", tmp_path / "bin"
    fill_cache(cache)
    (cache / "chinese-poetry@2.0.1").rename(tmp_path / "aside")
    with tarfile.open(tmp_path / "poems.tgz", "w:gz") as tar:
        tar.add(tmp_path / "aside/package", "package")
        tar.add(tmp_path / "aside/package/dist/songci/author.song.json", "package/dist/other/x.json")
    script(programs / "npm", f"/bin/cp {tmp_path}/poems.tgz chinese-poetry-2.0.1.tgz")
    monkeypatch.setenv("PATH", str(programs))
    assert list(collect("full", cache_dir=cache))[-1].path_label == "ci.song.0.json#20"
    assert [path.name for path in (cache / "chinese-poetry@2.0.1/package/dist").iterdir()] == ["songci"]


@pytest.mark.parametrize(
    ("body", "message"),
    [(None, "could not run"), ("echo E: no such package >&2; exit 100", "failed (E: no such package)")],
)
def test_a_source_that_cannot_be_fetched_is_named(library, tmp_path, monkeypatch, body, message):
    programs = tmp_path / "bin"
    programs.mkdir()
    if body is not None:
        script(programs / "apt-get", body)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(CorpusError) as caught:
        collect("full", cache_dir=tmp_path / "cache")
    assert "source linux-doc-6.1: `apt-get download linux-doc-6.1`" in str(caught.value)
    assert message in str(caught.value) and "'stdlib'" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_corpus():
    with pytest.raises(CorpusError, match="no corpus 'pile'; there are full, stdlib"):
        collect("pile")
