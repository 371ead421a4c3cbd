"""Token files without a manifest: adopted, they are what `prepare` would have made; refused, nothing is written."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data.adopt import adopt
from data.config import DataConfig
from data.encode import Recipe
from data.index import TokenFile, TokenFileError
from data.ingest import ingest
from data.loader import Loader
from data.prepare import texts
from data.tokenizer_file import TokenizerError
from data.tokenizer_training import train_tokenizer
from data.tokens import Manifest, TokenWriter, problems, sha256_file

TEXTS = [f"{number}: " + "the router picks an expert. " * (1 + number % 7) for number in range(60)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "t.json"
    path.write_text(train_tokenizer(TEXTS, vocab_size=280).to_str())
    return path


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Path) -> Path:
    """Prefix of what `prepare` makes of the texts."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = Recipe(str(tokenizer), heldout_fraction=0.0)
    ingest([str(tmp_path / "a.jsonl")], tmp_path / "ours", recipe, workers=0)
    return tmp_path / "ours" / "train"


@pytest.fixture
def foreign(prepared: Path, tmp_path: Path) -> Path:
    """Prefix of the same tokens without anything beside them."""
    (tmp_path / "theirs").mkdir()
    for ending in (".bin", ".idx"):
        shutil.copy(f"{prepared}{ending}", tmp_path / "theirs" / f"text_document{ending}")
    return tmp_path / "theirs" / "text_document"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_adopted_data_is_read_as_prepared_data(prepared: Path, foreign: Path, tokenizer: Path) -> None:
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(foreign.parent.iterdir())]
    done = adopt(foreign, tokenizer, licence="MIT")
    assert [
        (Path(f"{foreign}{end}").read_bytes(), Path(f"{foreign}{end}").stat().st_mtime_ns) for end in (".bin", ".idx")
    ] == before
    assert names(foreign.parent) == ["text_document.bin", "text_document.idx", "text_document.json", "tokenizer.json"]
    assert problems(foreign, 280, 8) == problems(foreign, 280, 8, hashes=True) == []
    ours, theirs = Manifest.read(prepared), Manifest.read(foreign)
    assert done.manifest == theirs and done.num_ended == theirs.num_documents == 60
    for key in ("tokenizer_sha256", "vocab_size", "dtype", "num_tokens", "max_token_id", "text_bytes", "corpus_sha256"):
        assert getattr(theirs, key) == getattr(ours, key), key
    assert (theirs.sources[0].name, theirs.sources[0].licence) == ("text_document", "MIT")
    assert str(foreign.parent) not in Path(f"{foreign}.json").read_text()  # no path of this machine
    ids = np.arange(40)
    windows = [
        Loader(DataConfig(str(prefix), sequence_length=16, document_mask=mask)).windows(ids)
        for prefix in (prepared, foreign) for mask in (False, True)
    ]  # fmt: skip
    assert all(np.array_equal(windows[0], other) for other in windows)
    assert list(texts(foreign)) == TEXTS


def test_documents_in_many_parts_are_counted_once(foreign: Path, tokenizer: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.adopt.CHUNK", 7)
    assert adopt(foreign, tokenizer).num_ended == 60


def test_documents_without_an_end_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    with TokenWriter(tmp_path / "a", "int32") as writer:
        for ids in ([7, 8, 1], [7, 1, 8], [9]):
            writer.add(np.array(ids))
    done = adopt(tmp_path / "a", tokenizer)
    assert done.num_ended == done.manifest.counts["documents_ended"] == 1 and done.manifest.dtype == "int32"


def test_ids_of_another_tokenizer(foreign: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(train_tokenizer(TEXTS, vocab_size=265).to_str())
    tokens = TokenFile(foreign).tokens
    at = int(np.argmax(tokens >= 265))
    with pytest.raises(TokenFileError, match=rf"byte {2 * at}: id {tokens[at]}, tokenizer .*small.json has 265"):
        adopt(foreign, small)
    with pytest.raises(TokenizerError, match="no such file"):
        adopt(foreign, tmp_path / "none.json")
    assert names(foreign.parent) == ["text_document.bin", "text_document.idx"]


def test_what_cannot_be_adopted(foreign: Path, prepared: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match=r"train.json: is there already: `expertpipe prepare --verify"):
        adopt(prepared, tokenizer)
    with pytest.raises(TokenFileError, match="No such file"):
        adopt(tmp_path / "nothing", tokenizer)
    with TokenWriter(tmp_path / "empty", "uint16"):
        pass
    with pytest.raises(TokenFileError, match=r"empty.bin: holds no token"):
        adopt(tmp_path / "empty", tokenizer)
    (foreign.parent / ".work").mkdir()
    with pytest.raises(TokenFileError, match="of a preparation that was stopped"):
        adopt(foreign, tokenizer)
    (foreign.parent / ".work").rmdir()
    raw = Path(f"{foreign}.bin").read_bytes()
    Path(f"{foreign}.bin").write_bytes(raw[:-2])
    with pytest.raises(TokenFileError, match="truncated"):
        adopt(foreign, tokenizer)
    assert names(foreign.parent) == ["text_document.bin", "text_document.idx"]


def test_the_tokenizer_lies_beside_the_data(foreign: Path, tokenizer: Path) -> None:
    folder = foreign.parent
    (folder / "tokenizer.json").write_text("{}")  # of something else
    assert adopt(foreign, tokenizer).manifest.tokenizer_file == "text_document.tokenizer.json"
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert sha256_file(folder / "text_document.tokenizer.json") == sha256_file(tokenizer)
    os.remove(f"{foreign}.json")
    (folder / "text_document.tokenizer.json").write_text("[]")
    with pytest.raises(TokenFileError, match="another tokenizer than"):
        adopt(foreign, tokenizer)
    shutil.copy(tokenizer, folder / "own.json")
    assert adopt(foreign, folder / "own.json").manifest.tokenizer_file == "own.json"
    assert problems(foreign, 280, 8) == []


def test_a_tokenizer_that_is_not_byte_level(tmp_path: Path) -> None:
    """Its tokens stand for no fixed number of bytes, and it names no end of sentence."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(tmp_path / "words.json"))
    with TokenWriter(tmp_path / "a", "uint16") as writer:
        writer.add(np.array([0, 1, 1]))
    done = adopt(tmp_path / "a", tmp_path / "words.json")
    assert (done.num_ended, done.manifest.text_bytes, done.manifest.vocab_size) == (None, 0, 2)
    assert problems(tmp_path / "a", 2, 1) == []
