import lzma
import math
import random

import numpy as np
import pytest

from data.baselines import bits_per_byte, unigram_bits_per_byte, unigram_nats_per_token, xz_bits_per_byte
from data.corpus import Document
from data.prepare import prepare, texts
from data.tokens import TokenFile, TokenWriter


def token_file(prefix, tokens) -> TokenFile:
    with TokenWriter(prefix, "uint16") as writer:
        writer.add(np.array(tokens))
    return TokenFile(prefix)


def test_unigram_entropy_by_hand(tmp_path, monkeypatch):
    assert unigram_nats_per_token(token_file(tmp_path / "a", [3] * 9)) == pytest.approx(0, abs=1e-12)
    assert unigram_nats_per_token(token_file(tmp_path / "b", [0, 5, 7, 9] * 3)) == pytest.approx(math.log(4))
    skewed = token_file(tmp_path / "c", [1, 9, 1, 1])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_nats_per_token(skewed) == pytest.approx(expected)
    monkeypatch.setattr("data.baselines._CHUNK", 3)  # chunks with different largest ids
    assert unigram_nats_per_token(skewed) == pytest.approx(expected)


def test_bits_per_byte_by_hand():
    assert bits_per_byte(2 * math.log(2), num_tokens=10, text_bytes=40) == pytest.approx(0.5)


def test_xz_is_the_library_s_size():
    parts = ["to be ", "or not ", "zu sein für 专家 "] * 50
    raw = "".join(parts).encode()
    assert xz_bits_per_byte(parts) == 8 * len(lzma.compress(raw, preset=9)) / len(raw)
    with pytest.raises(ValueError, match="no text"):
        xz_bits_per_byte([])


def test_both_on_a_prepared_set(tmp_path):
    draw = random.Random(0)
    documents = [Document("s", str(i), "".join(draw.choices("abcdefgh \n", k=200))) for i in range(60)]
    done = prepare(corpus=documents, out_dir=tmp_path, vocab_size=262, heldout_fraction=0.5)
    # 10 equally likely letters, one token each: log2(10) bits a byte, and the ends of sentences on top
    unigram = unigram_bits_per_byte(TokenFile(done.heldout_prefix), done.heldout)
    assert math.log2(10) < unigram < math.log2(10) * 1.05
    assert math.log2(10) < xz_bits_per_byte(texts(done.heldout_prefix)) < 8
