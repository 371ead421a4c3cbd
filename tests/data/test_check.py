import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.check import config_problems
from data.config import DataConfig, DataPhase, SourceConfig
from data.index import TokenFileError
from data.loader import Loader
from data.tokens import FileRecord, Manifest, TokenFile, TokenWriter, sha256_file


def source(prefix: Path, tokenizer: str = "0") -> str:
    with TokenWriter(prefix, "uint16") as writer:
        writer.add(np.arange(100))
    paths = [Path(f"{prefix}.{ending}") for ending in ("bin", "idx")]
    Manifest(
        tokenizer_file="tokenizer.json", tokenizer_sha256=tokenizer * 64, vocab_size=100, dtype="uint16",
        num_tokens=100, num_documents=1, max_token_id=int(TokenFile(prefix).tokens.max()), text_bytes=300,
        files={path.name: FileRecord(path.stat().st_size, sha256_file(path)) for path in paths},
        sources=(), arguments={}, corpus_sha256="1" * 64,
    ).write(prefix)  # fmt: skip
    return str(prefix)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    blend = tuple(SourceConfig(source(tmp_path / name)) for name in "bc")
    return DataConfig(source(tmp_path / "a"), sequence_length=20, blend=blend)


def test_a_good_blend_has_none(config):
    assert config_problems(config, 100) == []
    Loader(config)


def test_all_problems_at_once(config, tmp_path):
    source(tmp_path / "b", tokenizer="7")
    (tmp_path / "c.bin").write_bytes(b"\0" * 7)
    bad = replace(config, weight=0.0, document_mask=True, phases=(DataPhase(50, sequence_length=100),))
    found = config_problems(bad, 99)
    for part in (
        "data: weight 0.0 of", "data.phases.0.from_tokens=50: not reached", "data.document_mask=true: ",
        "a.json: the largest token id is 99 (first beyond: 99 at byte ", "the model's vocab_size is 99; set",
        "a.json: 100 tokens, one window needs 101",
        "c.bin: byte 7: 7 bytes, its manifest says 200",
        f"b.json: tokenizer {'7' * 12}, {tmp_path}/a.json has {'0' * 12}",
    ):  # fmt: skip
        assert any(part in message for message in found), (part, found)


def test_other_tokenizers_are_refused_by_the_loader(config, tmp_path):
    source(tmp_path / "b", tokenizer="7")
    with pytest.raises(TokenFileError, match="prepare all sources of a blend with one tokenizer"):
        Loader(config)


def test_a_missing_source_is_named(config, tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({}))
    assert any("b.json: manifest: keys []" in message for message in config_problems(config, 100))
