import errno
import io
import json
import os
import re
import resource
import sys
import sysconfig
from contextlib import contextmanager

import pytest

from data.ingest import Report
from data.stream import TokenStream
from data.tokenizer_training import train_tokenizer
from data.tokens import Manifest, TokenFile
from launcher.__main__ import main
from launcher.check.recipe import check_data
from launcher.commands.prepare import PrepareDisplay
from launcher.config import compose


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
    (
        ["--tokenizer", "t.json", "--text-key", "t", "--workers", "0", "--shard-tokens", "9", "--licence", "MIT"],
        "--tokenizer and --text-key and --workers and --shard-tokens and --licence: only with INPUT",
    ),
    (
        ["x.jsonl", "--out", "o", "--tokenizer", "t.json", "--corpus", "stdlib", "--vocab-size", "300"],
        "--corpus and --vocab-size: only without INPUT",
    ),
    (["x.jsonl", "--verify", "a/train", "--seed", "0"], "INPUT and --seed: not with --verify"),
    (["--adopt", "a/train"], "--tokenizer: needed with --adopt"),
    (["--adopt", "a/train", "--tokenizer", "t", "--out", "o"], "--out: not with --adopt"),
    (["--fim-rate", "2", "--seed", "0"], "fim_rate is 2.0: it must lie in [0, 1]"),
    (["--verify", "nowhere/train"], "nowhere/train.json: No such file"),
])  # fmt: skip
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(["prepare", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_misplaced_and_missing_arguments_are_named_together(capsys):
    assert main(["prepare", "x.jsonl", "--vocab-size", "300"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    """A few files in the place of the standard library."""
    (tmp_path / "lib").mkdir()
    for number in range(60):
        (tmp_path / "lib" / f"m{number}.py").write_text(f"def f{number}(x):\n    return x * {number * number}\n" * 3)
    real = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *rest: str(tmp_path / "lib" if name == "stdlib" else real(name, *rest))
    )
    return ["prepare", "--corpus", "stdlib", "--vocab-size", "300", "--out", str(tmp_path / "out")]


HELD_OUT = ["--heldout-fraction", "0.2"]


def test_a_corpus_is_turned_and_held_out_as_asked(small_stdlib, tmp_path, capsys):
    def arguments(*more: str) -> dict:
        assert main([*small_stdlib, *HELD_OUT, *more]) == 0
        return dict(Manifest.read(tmp_path / "out" / "train").arguments)

    arguments()
    capsys.readouterr()
    found = arguments("--fim-rate", "0.5", "--seed", "7")
    assert "nothing to do" not in capsys.readouterr().out  # other arguments are other data
    assert (found["fim_rate"], found["heldout_fraction"], found["seed"]) == (0.5, 0.2, 7)
    assert Manifest.read(tmp_path / "out" / "train").counts["turned"] > 5
    prepared = TokenStream(tmp_path / "out" / "train").prepared
    assert prepared is not None and prepared.rate == 0.5
    assert main([*small_stdlib, *HELD_OUT, "--split-rate", "0.5"]) == 2  # refused aloud, not dropped
    assert "set the split rate to 0" in capsys.readouterr().err


def test_json_of_a_corpus(small_stdlib, tmp_path, capsys):
    for rebuilt in (True, False):
        assert main([*small_stdlib, *HELD_OUT, "--json"]) == 0
        out, err = capsys.readouterr()
        result = json.loads(out)
        assert result["rebuilt"] is rebuilt and result["documents"] + result["heldout_documents"] == 60
        assert result["train"] == str(tmp_path / "out" / "train") and "exact duplicates" in err


def test_a_run_that_asks_for_more_turning_names_a_command_that_works(small_stdlib, tmp_path):
    run = [
        "experiment=tiny", "train.device=cpu", "model.vocab_size=300", f"data.prefix={tmp_path}/out/train",
        "optim.fim_rate=[{shape: constant, value: 0.1}]", "data.sequence_length=32",
    ]  # fmt: skip
    assert main([*small_stdlib, *HELD_OUT]) == 0
    (message,) = check_data(compose(run))
    command = message.split("`")[1].split()
    assert command == ["expertpipe", *small_stdlib, "--fim-rate", "0.1"]
    assert main([*command[1:], *HELD_OUT]) == 0
    assert check_data(compose(run)) == []


def test_all_mistakes_of_the_inputs_are_named(inputs, tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "no"), str(tmp_path / "nor"), *inputs[1:]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def one_line(capsys, argv: list[str]) -> str:
    """What main says of a mistake: exit code 2, one line, no traceback."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) == 1, err
    return err


def test_parquet_without_pyarrow(inputs, tmp_path, monkeypatch, capsys):
    for name in "bc":
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    err = one_line(capsys, ["prepare", str(tmp_path / "b.parquet"), str(tmp_path / "c.parquet"), *inputs])
    assert "b.parquet: parquet needs pyarrow" in err and "pip install 'expertpipe[data]'" in err


def test_a_corpus_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "use the corpus 'stdlib'" in one_line(capsys, ["prepare", "--corpus", "full", "--out", str(tmp_path / "o")])


def test_inputs_that_may_not_be_read(inputs, tmp_path, monkeypatch, capsys):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.jsonl") and real(path, mode))
    assert "a.jsonl: may not be read" in one_line(capsys, ["prepare", *inputs, "--workers", "0"])


def test_a_folder_that_may_not_be_read(inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("open")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    err = one_line(capsys, ["prepare", str(tmp_path / "texts"), *inputs[1:], "--workers", "0"])
    assert "texts/closed: Permission denied" in err


def test_an_input_that_fails_while_it_is_read(inputs, tmp_path, monkeypatch, capsys):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as during:
        during.setattr("data.inputs.open", refuse, raising=False)
        err = one_line(capsys, ["prepare", *inputs, "--workers", "0"])
    assert "a.jsonl: Permission denied; when that is put right, the same command continues" in err
    assert main(["prepare", *inputs, "--workers", "0"]) == 0


@contextmanager
def files_of_at_most(num_bytes: int):
    """The system refuses to write more to a file, with an error that names none, as a full disk's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(inputs, tmp_path, monkeypatch, capsys):
    argv = ["prepare", *inputs, "--workers", "0", "--heldout-fraction", "0.2"]

    def full(self, ids, *, name):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as during:
        during.setattr("data.assemble.TokenWriter.add", full)
        assert f"{tmp_path / 'out'}: No space left on device" in one_line(capsys, argv)
    for num_bytes in (500, 1500):  # of a shard, of the tokenizer beside it
        with files_of_at_most(num_bytes):
            assert f"{tmp_path / 'out'}: File too large" in one_line(capsys, argv)
    assert not list((tmp_path / "out").glob("*.bin.tmp-*"))
    assert main(argv) == 0
    assert main([*argv, "--out", str(tmp_path / "straight")]) == 0
    for name in ("train.bin", "heldout.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_corpus_on_a_full_disk(small_stdlib, tmp_path, capsys):
    with files_of_at_most(1500):
        assert "File too large" in one_line(capsys, [*small_stdlib, *HELD_OUT])


def test_json_of_an_adoption(inputs, tmp_path, capsys):
    assert main(["prepare", *inputs, "--workers", "0", "--heldout-fraction", "0"]) == 0
    (tmp_path / "out" / "train.json").unlink()
    capsys.readouterr()
    prefix = str(tmp_path / "out" / "train")
    assert main(["prepare", "--adopt", prefix, "--tokenizer", str(tmp_path / "t.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "train": prefix, "heldout": None, "tokens": TokenFile(prefix).num_tokens, "documents": 40,
        "documents_ended": 40, "tokenizer": "tokenizer.json",
    }  # fmt: skip


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
