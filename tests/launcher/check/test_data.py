"""Rules on prepared data by what its manifest says of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.corpus import CORPORA, SOURCES
from data.tokenizer_training import train_tokenizer
from data.tokens import TokenWriter
from launcher.__main__ import main
from launcher.check.recipe import check_data, prepare_command
from launcher.config import compose
from tests.data.test_check import source


def from_corpus(prefix: Path, corpus: str, vocab_size: int) -> str:
    """Prefix of token files whose manifest says that they come from a corpus of this machine."""
    name = source(prefix)
    path = Path(f"{prefix}.json")
    sources = [
        {"name": part, "documents": 1, "bytes": 3, "licence": "x", "origin": SOURCES[part].origin}
        for part in CORPORA[corpus]
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sources": sources, "vocab_size": vocab_size}))
    return name


def run_on(prefix: str, *overrides: str) -> list[str]:
    return check_data(compose(["experiment=tiny", f"data.prefix={prefix}", "data.sequence_length=32", *overrides]))


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_tokenizer_made_for_a_far_smaller_model(corpus: str, tmp_path: Path) -> None:
    prefix = from_corpus(tmp_path / "train", corpus, 4096)
    (message,) = run_on(prefix, "model.vocab_size=16384")
    assert message == (
        f"model.vocab_size=16384: the tokenizer of {prefix}.json has 4096 tokens, less than half of that: prepare the "
        f"data with `expertpipe prepare --corpus {corpus} --vocab-size 16384 --out {tmp_path}`, or use "
        "model.vocab_size=4096"
    )
    for vocab_size in (4096, 8192):  # the demo's and bench85m's
        assert run_on(prefix, f"model.vocab_size={vocab_size}") == []
    assert "INPUT... " in run_on(prefix, "model.vocab_size=129280")[0]  # more than is made here


def test_token_files_without_a_manifest_come_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files made elsewhere: refused with a command, after which the run can start."""
    texts = [f"{number}: the router picks an expert" for number in range(50)]
    tokenizer = train_tokenizer(texts, vocab_size=280)
    (tmp_path / "t.json").write_text(tokenizer.to_str())
    with TokenWriter(tmp_path / "text_document", "uint16") as writer:
        for text in texts:
            writer.add(np.array([*tokenizer.encode(text).ids, 1]))
    (message,) = run_on(f"{tmp_path}/text_document", "model.vocab_size=280")
    assert "token files without a manifest" in message and message.startswith("data.prefix=")
    command = message.split("`")[1].replace("TOKENIZER", str(tmp_path / "t.json")).split()
    assert command[:3] == ["expertpipe", "prepare", "--adopt"]
    assert main(command[1:]) == 0
    out = capsys.readouterr().out
    assert "50 documents" in out and "50 of the documents end" in out and "no held-out set" in out
    assert run_on(f"{tmp_path}/text_document", "model.vocab_size=280") == []
    assert main(["prepare", "--verify", f"{tmp_path}/text_document"]) == 0
    assert main(command[1:]) == 2  # never over a manifest
    assert "is there already" in capsys.readouterr().err


def test_a_stopped_preparation_is_no_foreign_file(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "train", "uint16") as writer:
        writer.add(np.array([1, 2]))
    (tmp_path / ".work").mkdir()
    (message,) = run_on(f"{tmp_path}/train")
    assert "its preparation was stopped: the same `expertpipe prepare` command continues it" in message


def test_a_small_tokenizer_of_the_users_own_is_theirs_to_choose(tmp_path: Path) -> None:
    assert run_on(source(tmp_path / "train"), "model.vocab_size=129280") == []


def test_the_command_for_more_turning_is_whole_where_it_can_be(tmp_path: Path) -> None:
    prefix = from_corpus(tmp_path / "train", "full", 4096)
    (message,) = run_on(prefix, "optim.fim_rate=[{shape: constant, value: 0.1}]")
    command = f"`expertpipe prepare --corpus full --vocab-size 4096 --out {tmp_path} --fim-rate 0.1`"
    assert command in message and message.startswith("optim.fim_rate reaches 0.1")


@pytest.mark.parametrize(
    ("folder", "corpus"), [("full", "full"), ("full-4096", "full"), ("stdlib-8192", "stdlib"), ("x", "stdlib")]
)
def test_the_corpus_by_the_folders_name(folder: str, corpus: str) -> None:
    config = compose(["experiment=tiny", f"data.prefix=runs/data/{folder}/train"])
    assert f"--corpus {corpus} --vocab-size 4096 --out runs/data/{folder}" in prepare_command(config)
