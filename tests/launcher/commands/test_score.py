"""Losses and logits of `score` are those of a direct computation; what cannot be scored is said in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.corpus import Document
from data.prepare import prepare
from data.token_bytes import token_bytes
from data.tokenizer_file import load_tokenizer
from data.tokenizer_training import train_tokenizer
from data.tokens import TokenFile, TokenWriter
from launcher.__main__ import main
from launcher.checkpoint.state import Reader, checkpoints_dir
from launcher.commands.score import TOKENS_AT_ONCE
from launcher.inference import InferenceError, heldout_nats, load_model
from model.transformer import Transformer
from tests.launcher.checkpoint.states import whole_config, write_checkpoint
from tests.model.reference import TINY, build

KEYS = {
    "mean", "bits_per_byte", "text_bytes", "note", "num_tokens", "num_sequences", "sequence_length", "checkpoint",
    "ema",
}  # fmt: skip
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def run_dir(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(model, folder)
    return folder


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """More sequences than go through the model at once, the last batch smaller."""
    shape = (TOKENS_AT_ONCE // 96 + 7, 96)
    return np.random.default_rng(0).integers(0, TINY.vocab_size, shape).astype(np.uint16)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


def test_losses_and_logits_equal_a_direct_computation(
    model: Transformer, run_dir: Path, ids: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    result = cli(
        "score", "--checkpoint", str(run_dir), "--tokens", str(tmp_path / "ids.npy"),
        "--logits", str(tmp_path / "out.npy"), "--json",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    scored: dict[str, Any] = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    tokens = torch.from_numpy(ids.astype(np.int64))
    expected = model.logits(tokens)
    logits = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert logits.dtype == np.float32 and logits.shape == (*ids.shape, TINY.vocab_size)
    assert np.abs(logits - expected.numpy()).max() < 2e-5
    losses = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    per_sequence = losses.view(len(ids), -1).double().mean(1)
    assert scored.keys() == {"losses", *KEYS}
    assert (scored["bits_per_byte"], scored["note"]) == (None, "no tokenizer.json in the checkpoint")
    assert scored["num_tokens"] == ids[:, 1:].size
    assert np.abs(np.array(scored["losses"]) - per_sequence.numpy()).max() < 2e-6
    assert abs(scored["mean"] - per_sequence.mean().item()) < 1e-6
    assert (scored["num_sequences"], scored["sequence_length"]) == ids.shape
    assert scored["checkpoint"] == str(checkpoints_dir(whole_config(TINY, run_dir)) / "step-00000007")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "out.npy"]


def test_the_table_has_a_line_for_each_sequence(
    run_dir: Path, ids: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", ids[:3].astype(np.int64))
    checkpoint = run_dir / "checkpoints" / "step-00000007"
    assert main(["score", "--checkpoint", str(checkpoint), "--tokens", str(tmp_path / "ids.npy")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("3 sequences of 96 tokens")
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "2", "mean"]
    losses = [float(line.split()[1]) for line in lines[3:]]
    assert abs(np.mean(losses[:3]) - losses[3]) < 1e-5


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(5, np.int64), "shape [5]; score needs integer ids [num_sequences, S]"),
        (np.zeros((2, 3, 4), np.int64), "shape [2, 3, 4]"),
        (np.zeros((2, 8)), "holds float64; score needs integer ids"),
        (np.zeros((2, 8), bool), "holds bool"),
        (
            np.array([[1, 2], [3, 512]]),
            "id 512 at sequence 1, position 1: ids must be at least 0 and below the model's",
        ),
        (np.array([[1, -1], [3, 600]]), "id -1 at sequence 0, position 1"),
        (np.zeros((1, 257), np.int32), "sequences of 257 tokens; the model's max_position_embeddings is 256"),
        (np.zeros((4, 1), np.int32), "at least 2 tokens"),
        (np.zeros((0, 8), np.int32), "at least 1 sequence"),
        (np.array([[{}, 2], [3, 4]], dtype=object), "not an .npy file of integers"),
        (b"PK no array", "not an .npy file of integers"),
        (b"", "not an .npy file of integers"),
        (None, "no such file"),
    ],
)
def test_bad_ids_are_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], array: np.ndarray | bytes | None, said: str
) -> None:
    path = tmp_path / "ids.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array, allow_pickle=True)
    code = main(["score", "--checkpoint", str(run_dir), "--tokens", str(path), "--logits", str(tmp_path / "out.npy")])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1 and str(path) in err
    assert not (tmp_path / "out.npy").exists()


def test_mistakes_end_the_program_with_2_and_no_traceback(run_dir: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.full((1, 4), 512))
    for checkpoint in (run_dir, tmp_path):
        result = cli("score", "--checkpoint", str(checkpoint), "--tokens", str(tmp_path / "ids.npy"))
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("expertpipe: ") and result.stderr.count("\n") == 1


def test_heldout_loss_predicts_every_token_but_the_first(model: Transformer, run_dir: Path, tmp_path: Path) -> None:
    """Windows of 24 share one token; the last has 7 targets."""
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, 1 + 5 * 24 + 7).astype(np.uint16)
    with TokenWriter(tmp_path / "t", "uint16") as writer:
        writer.add(tokens[:50])
        writer.add(tokens[50:])
    nats, predicted = heldout_nats(load_model(run_dir), tmp_path / "t", 24, 2)
    assert predicted == len(tokens) - 1 == 127
    total = 0.0
    for start in range(0, predicted, 24):
        window = torch.from_numpy(tokens[start : start + 25].astype(np.int64))
        logits = model.logits(window[None, :-1])[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert abs(nats - total / predicted) < 2e-6


def test_a_set_in_shards_scores_as_in_one_file(
    model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out text in many files: the same loss and bytes, and the same refusals."""
    monkeypatch.setattr("launcher.commands.score.CHUNK", 64)
    texts = [f"document {i}: the router picks {i * i} experts\n" * (1 + i % 3) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "t.json").write_text(train_tokenizer(texts, vocab_size=300).to_str())
    step = write_checkpoint(model, tmp_path / "run", tokenizer=tmp_path / "t.json")

    def scored(name: str, *more: str) -> dict[str, Any]:
        recipe = ["--tokenizer", str(tmp_path / "t.json"), "--heldout-fraction", "0.4", "--workers", "0", *more]
        assert main(["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / name), *recipe]) == 0
        capsys.readouterr()
        assert main(["score", "--checkpoint", str(step), "--tokens", str(tmp_path / name / "heldout"), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    whole, cut = scored("whole"), scored("cut", "--shard-tokens", "90")
    assert len(list((tmp_path / "cut").glob("heldout-*.idx"))) > 3
    assert cut == whole and cut["text_bytes"] > 1000

    (tmp_path / "cut" / "heldout-00001.bin").write_bytes(b"")
    assert main(["score", "--checkpoint", str(step), "--tokens", str(tmp_path / "cut" / "heldout")]) == 2
    err = capsys.readouterr().err
    assert "heldout-00001.bin: byte 0: 0 bytes, its manifest says" in err and len(err.splitlines()) == 1


def test_heldout_data_must_fit_the_model(model: Transformer, tmp_path: Path) -> None:
    for name, tokens in (("long", np.zeros(300)), ("alien", np.array([3, 512, 4])), ("short", np.zeros(1))):
        with TokenWriter(tmp_path / name, "uint16") as writer:
            writer.add(tokens.astype(np.uint16))
    for name, said in (
        ("long", "max_position_embeddings is 256"),
        ("alien", r"alien.bin: byte 2: id 512, the model's vocab_size is 512"),
        ("short", "2"),
    ):
        with pytest.raises(InferenceError, match=said):
            heldout_nats(model, tmp_path / name, 257, 1)


def test_ema_reaches_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.__main__ import main
    from launcher.commands import score as module

    taken: list[dict[str, object]] = []
    monkeypatch.setattr(module, "score", lambda **arguments: taken.append(arguments) or 0)
    for flags in ([], ["--ema"]):
        assert main(["score", "--checkpoint", "a", "--tokens", "b.npy", *flags]) == 0
    assert [arguments["ema"] for arguments in taken] == [False, True]


def test_bits_per_byte_by_the_checkpoints_tokenizer(
    model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prepared set: all of it, in windows; the bytes are its manifest's but for the first token's."""
    texts = [f"document {i}: the router picks {i * i} experts\n" * (1 + i % 3) for i in range(60)]
    done = prepare(
        corpus=[Document("made up", f"{i}", text) for i, text in enumerate(texts)], out_dir=tmp_path / "data",
        vocab_size=300, heldout_fraction=0.3,
    )  # fmt: skip
    write_checkpoint(model, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-00000007"
    (step / "tokenizer.json").write_bytes(done.tokenizer_path.read_bytes())
    config = Reader(step, verify=False).config
    assert main(["score", "--checkpoint", str(step), "--tokens", done.heldout_prefix, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored.keys() == KEYS
    nats, predicted = heldout_nats(load_model(step), done.heldout_prefix, config.data.sequence_length, 4)
    first = token_bytes(done.tokenizer_path)[TokenFile(done.heldout_prefix).tokens[0]]
    assert scored["text_bytes"] == done.heldout.text_bytes - first
    assert scored["mean"] == pytest.approx(nats, rel=1e-6) and scored["num_tokens"] == predicted
    assert scored["bits_per_byte"] == pytest.approx(nats * predicted / np.log(2) / scored["text_bytes"])

    ids = np.asarray(TokenFile(done.heldout_prefix).tokens[:80]).reshape(4, 20)
    np.save(tmp_path / "ids.npy", ids)
    assert main(["score", "--checkpoint", str(step), "--tokens", str(tmp_path / "ids.npy"), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    decoded = load_tokenizer(done.tokenizer_path)
    pieces = [decoded.decode([token], skip_special_tokens=True) for token in ids[:, 1:].flatten().tolist()]
    assert scored["text_bytes"] == sum(len(piece.encode()) for piece in pieces)  # ASCII: every token is a text
    assert scored["bits_per_byte"] == pytest.approx(scored["mean"] * 76 / np.log(2) / scored["text_bytes"])
    assert main(["score", "--checkpoint", str(step), "--tokens", str(tmp_path / "ids.npy")]) == 0
    assert f"{scored['bits_per_byte']:.4f} bits a byte" in capsys.readouterr().out

    np.save(tmp_path / "ids.npy", np.array([[1, 500]]))
    assert main(["score", "--checkpoint", str(step), "--tokens", str(tmp_path / "ids.npy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["note"].startswith("id 500 is none of the")
    (step / "tokenizer.json").write_text("{}")
    assert main(["score", "--checkpoint", str(step), "--tokens", done.heldout_prefix]) == 2
    assert "another tokenizer than" in capsys.readouterr().err
