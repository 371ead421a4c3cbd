import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.split import find_splits, is_joined, joined_tokens, special_id, vocabulary_size
from data.tokenizer_file import DEEPSEEK, find_tokenizer, load_tokenizer

PIECES = ["x", "end", ".", ".\n", ".\n\n", ");\n", "。\n", " {\n", "\n", "\r\n", " ", "!?\n", "专", "a.\nb"]


@pytest.fixture(scope="module")
def tokenizer():
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=200)) for _ in range(50)]
    made = Tokenizer(models.BPE())
    pattern = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\s+"  # as DeepSeek's: line breaks stay with punctuation
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return made


@pytest.mark.parametrize(("text", "joined"), [
    (".\n", True), ("。\n\n", True), (" {\n", True), (");\r\n", True), (". \n", True), ("$\n", True),
    (".", False), ("\n", False), ("\n.", False), (".\nx", False), ("a\n", False), (" \n", False), ("", False),
    ("1\n", False), ("\ufffd\n", False), (".\n.\n", False),
])  # fmt: skip
def test_what_counts_as_joined(text, joined):
    assert is_joined(text) == joined


def test_table_is_complete(tokenizer):
    expected = {
        token for token in range(vocabulary_size(tokenizer))
        if is_joined(tokenizer.decode([token], skip_special_tokens=False))
    }  # fmt: skip
    assert set(joined_tokens(tokenizer)) == expected and len(expected) > 3
    splits = find_splits(tokenizer)
    assert {int(token) for token in np.flatnonzero(splits.length)} == expected


@settings(max_examples=80, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    name=st.integers(0, 2**64 - 1),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_splitting_does_not_change_the_text(tokenizer, text, name, rate):
    splits = find_splits(tokenizer)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    out = splits.apply(ids, name, rate=rate, seed=3)
    assert tokenizer.decode(out.tolist(), skip_special_tokens=False) == text
    joined = np.count_nonzero(splits.length[ids])
    if rate == 0 or joined == 0:
        assert np.array_equal(out, ids)
    if rate == 1:
        assert len(out) >= len(ids) + joined


def test_rate_and_independence(tokenizer):
    splits = find_splits(tokenizer)
    token = int(np.flatnonzero(splits.length)[0])
    ids = np.full(20_000, token)
    grown = len(splits.apply(ids, 1, rate=0.1, seed=0)) - len(ids)
    per_split = int(splits.length[token]) - 1
    assert abs(grown / per_split - 2000) < 5 * 1800**0.5
    # the k-th joined token has its own draw: what stands between does not matter
    other = np.concatenate([[7, 7], ids[:50]])
    assert np.array_equal(splits.apply(other, 1, rate=0.1, seed=0)[2:], splits.apply(ids[:50], 1, rate=0.1, seed=0))


def test_deepseek():
    path = find_tokenizer("deepseek")
    tokenizer = load_tokenizer(path)
    splits = find_splits(tokenizer)
    assert splits.num_joined == 797 and vocabulary_size(tokenizer) == 128815
    assert splits.length[339] == 2 and tokenizer.decode([339]) == ".\n\n"
    names = [special_id(tokenizer, DEEPSEEK[key]) for key in ("end_of_sentence", "begin", "hole", "end")]
    assert names == [1, 128801, 128800, 128802]
    quoted = "".join(DEEPSEEK[key][0] for key in DEEPSEEK)
    assert not {*names} & {*tokenizer.encode(quoted, add_special_tokens=False).ids}
