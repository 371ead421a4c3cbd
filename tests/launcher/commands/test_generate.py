"""Continuations: the likeliest tokens at temperature 0, the same text for the same seed, never beyond the positions."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer_file import load_tokenizer
from data.tokenizer_training import END_OF_SENTENCE
from launcher.__main__ import main
from launcher.commands.generate import sample
from launcher.inference import InferenceError
from model.transformer import Transformer
from tests.launcher.checkpoint.states import prepared, write_checkpoint
from tests.model.reference import TINY, build

ROOT = Path(__file__).parents[3]
PROMPT = "the expert picks"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(replace(TINY, max_position_embeddings=12), std=0.2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(prepared(tmp_path_factory.mktemp("data"))).with_name("tokenizer.json")


@pytest.fixture(scope="module")
def run_dir(model: Transformer, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(model, folder, tokenizer=tokenizer_file)
    return folder


def likeliest(model: Transformer, tokenizer: Any, count: int) -> str:
    """By hand: the model's own logits of the last 12 tokens, ids of the tokenizer only."""
    ids = [END_OF_SENTENCE, *tokenizer.encode(PROMPT).ids]
    start = len(ids)
    for _ in range(count):
        logits = model.logits(torch.tensor([ids[-12:]]))[0, -1, : tokenizer.get_vocab_size()]
        if int(logits.argmax()) == END_OF_SENTENCE:
            break
        ids.append(int(logits.argmax()))
    return tokenizer.decode(ids[start:])


def test_the_command_prints_the_likeliest_continuation(model: Transformer, run_dir: Path, tokenizer_file: Path) -> None:
    command = ["generate", "--checkpoint", str(run_dir), "--prompt", PROMPT, "--max-new-tokens", "20"]
    result = subprocess.run(
        [sys.executable, "-m", "launcher", *command, "--temperature", "0"],
        capture_output=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == likeliest(model, load_tokenizer(tokenizer_file), 20) + "\n"


def test_a_seed_is_a_text(model: Transformer, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    texts = [sample(model, tokenizer, PROMPT, max_new_tokens=30, temperature=1.0, seed=seed) for seed in (1, 2, 1, 3)]
    assert texts[0] == texts[2] and len(set(texts)) == 3
    assert all(isinstance(sample(model, tokenizer, "", max_new_tokens=3, seed=seed), str) for seed in range(3))


def test_the_document_ends_where_the_model_says(tokenizer_file: Path) -> None:
    """A model whose every prediction is the end of sentence continues with nothing."""
    ending = build(TINY)
    with torch.no_grad():
        assert ending.lm_head is not None and ending.norm is not None and ending.embed_tokens is not None
        ending.lm_head.weight.zero_()
        state = ending.norm(ending.run_layers(None, _batch(load_tokenizer(tokenizer_file).encode("the").ids)))[0, -1]
        ending.lm_head.weight[END_OF_SENTENCE] = state
    assert sample(ending, load_tokenizer(tokenizer_file), "the", max_new_tokens=5, temperature=0) == ""


def _batch(ids: list[int]) -> Any:
    from model.transformer import Microbatch

    return Microbatch(torch.tensor([[END_OF_SENTENCE, *ids, 0]]))


def test_frequencies_follow_the_logits(model: Transformer, tokenizer_file: Path) -> None:
    """The first token over many seeds, against softmax(logits / temperature)."""
    tokenizer, temperature, draws = load_tokenizer(tokenizer_file), 0.7, 300
    ids = torch.tensor([[END_OF_SENTENCE, *tokenizer.encode(PROMPT).ids][-12:]])
    expected_V = (model.logits(ids)[0, -1, : tokenizer.get_vocab_size()] / temperature).softmax(0)
    # several ids may be the same text: bytes that are no character on their own
    texts = ["" if i == END_OF_SENTENCE else tokenizer.decode([i]) for i in range(len(expected_V))]
    text = texts[int(expected_V.argmax())]
    hits = sum(
        sample(model, tokenizer, PROMPT, max_new_tokens=1, temperature=temperature, seed=seed) == text
        for seed in range(draws)
    )
    probability = expected_V[torch.tensor([t == text for t in texts])].sum().item()
    assert 0.02 < probability < 0.98
    assert abs(hits / draws - probability) < 4 * (probability * (1 - probability) / draws) ** 0.5


def test_what_does_not_fit_is_refused(
    model: Transformer, run_dir: Path, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    for count, temperature in ((0, 1.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(InferenceError, match="use 1 or more"):
            sample(model, tokenizer, PROMPT, max_new_tokens=count, temperature=temperature)
    with pytest.raises(InferenceError, match="the model 100"):
        sample(build(replace(TINY, vocab_size=100)), tokenizer, PROMPT)
    write_checkpoint(model, tmp_path / "bare")
    assert main(["generate", "--checkpoint", str(tmp_path / "bare")]) == 2
    assert "tokenizer.json: no such file; copy" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
