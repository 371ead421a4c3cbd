import io
import json
import re

import pytest

from data.ingest import Report
from data.tokenizer_training import train_tokenizer
from data.tokens import TokenFile
from launcher.__main__ import main
from launcher.commands.prepare import PrepareDisplay


@pytest.fixture
def inputs(tmp_path):
    lines = [json.dumps({"text": f"document number {number} of a small corpus"}) for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{", lines[0]]) + "\n")
    made = train_tokenizer([json.loads(line)["text"] for line in lines], vocab_size=300)
    (tmp_path / "t.json").write_text(made.to_str())
    return [str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "t.json"), "--out", str(tmp_path / "out")]


def test_from_lines_to_token_files(inputs, tmp_path, capsys):
    assert main(["prepare", *inputs, "--workers", "0", "--heldout-fraction", "0.2"]) == 0
    out = capsys.readouterr().out
    train, heldout = (TokenFile(tmp_path / "out" / name).num_documents for name in ("train", "heldout"))
    assert train + heldout == 40 and heldout
    assert re.search(rf"{train} documents, .* tokens, .* bytes a token", out)
    assert "1 exact duplicates left out" in out and "1 set aside: 1 corrupt JSON" in out
    assert "tokenising" in out and "100%" in out and max(map(len, out.splitlines())) < 200
    assert main(["prepare", *inputs, "--workers", "0", "--heldout-fraction", "0.2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rebuilt"] is False and result["documents"] == train and result["rejected"] == {"corrupt JSON": 1}


def test_workers_default_to_processes(inputs, tmp_path, capsys):
    assert main(["prepare", *inputs, "--json", "--fim-rate", "0.5", "--heldout-fraction", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == 40 and result["heldout"] is None and result["duplicates"] == 1


@pytest.mark.parametrize(("argv", "message"), [
    (["x.jsonl"], "--out and --tokenizer: needed with INPUT"),
    (["x.jsonl", "--out", "o", "--tokenizer", "none.json"], "none.json: no such file"),
    (["--verify", "nowhere/train"], "nowhere/train.json: No such file"),
])  # fmt: skip
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(["prepare", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_all_mistakes_of_the_inputs_are_named(inputs, tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "no"), str(tmp_path / "nor"), *inputs[1:]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_verify_reads_every_byte(inputs, tmp_path, capsys):
    assert main(["prepare", *inputs, "--workers", "0"]) == 0
    prefix = tmp_path / "out" / "train"
    assert main(["prepare", "--verify", str(prefix)]) == 0
    raw = bytearray((tmp_path / "out" / "train.bin").read_bytes())
    raw[3] ^= 1
    (tmp_path / "out" / "train.bin").write_bytes(raw)
    (tmp_path / "out" / "train.ids").write_bytes(b"")
    capsys.readouterr()
    assert main(["prepare", "--verify", str(prefix)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_bar_on_a_terminal():
    stream = io.StringIO()
    with PrepareDisplay(stream, live=True) as display:
        for done in (0, 50, 100):
            display.report(Report("encode", done, 100, done, 10 * done, 0))
        display.report(Report("write", 1000, 1000, 100, 1000, 0))
    shown = stream.getvalue()
    assert "tokenising" in shown and "100%" in shown and "ETA" in shown and "writing" in shown
