import json
from pathlib import Path

import pytest

from data.token_bytes import token_bytes
from data.tokenizer_file import TokenizerError, find_tokenizer, load_tokenizer
from data.tokens import TokenFile
from tests.data.test_prepare import run


def test_bytes_of_a_set_are_its_manifests(tmp_path):
    done, _ = run(tmp_path / "out")
    sizes = token_bytes(done.tokenizer_path)
    for prefix, manifest in ((done.train_prefix, done.train), (done.heldout_prefix, done.heldout)):
        assert sizes[TokenFile(prefix).tokens].sum() == manifest.text_bytes
    assert len(sizes) == done.train.vocab_size and not sizes[:6].any() and sizes[6:].min() == 1


def test_deepseeks_tokenizer():
    path = find_tokenizer("deepseek")
    text = "def f(x):\n\n    return '专家 \U0001f642', ''.join(x).\n\n"
    ids = load_tokenizer(path).encode(text, add_special_tokens=False).ids
    sizes = token_bytes(path)
    assert sizes[ids].sum() == len(text.encode()) and not sizes[[0, 1, 2, 128800, 128801, 128802]].any()


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"model": {"vocab": {"a": 0}}, "decoder": {"type": "Metaspace"}}, "not a byte-level tokenizer"),
        ({"model": {"vocab": {"a": 0}}, "normalizer": {"type": "NFC"}, "decoder": {"type": "ByteLevel"}}, "byte-level"),
        ([], "no tokenizers file"),
    ],
)
def test_others_are_refused(tmp_path: Path, described, message):
    (tmp_path / "t.json").write_text(json.dumps(described))
    with pytest.raises(TokenizerError, match=message):
        token_bytes(tmp_path / "t.json")
    with pytest.raises(TokenizerError, match="no tokenizers file"):
        token_bytes(tmp_path / "none.json")
