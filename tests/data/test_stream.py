import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.encode import Recipe
from data.fim import is_turned
from data.index import TokenFileError
from data.ingest import ingest
from data.stream import TokenStream
from data.tokenizer_file import load_tokenizer
from data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The same 60 documents as one shard and as many, half of them turned."""
    root = tmp_path_factory.mktemp("stream")
    texts = [f"{number}: " + "the router picks an expert. " * (1 + number % 7) for number in range(60)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (root / "t.json").write_text(train_tokenizer(texts, vocab_size=280).to_str())
    for name, rate, shard in (("whole", 0.5, 10**6), ("cut", 0.5, 100), ("low", 0.2, 10**6), ("none", 0.0, 10**6)):
        recipe = Recipe(str(root / "t.json"), heldout_fraction=0.0, fim_rate=rate)
        ingest([str(root / "a.jsonl")], root / name, recipe, workers=0, shard_tokens=shard)
    return root


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_shards_cannot_be_told_from_one_file(prepared, data):
    whole, cut = TokenStream(prepared / "whole" / "train"), TokenStream(prepared / "cut" / "train")
    assert cut.num_tokens == whole.num_tokens and cut.num_documents == whole.num_documents == 60
    start = data.draw(st.integers(0, whole.num_tokens - 1))
    length = data.draw(st.integers(1, whole.num_tokens - start))
    rows = [np.empty(length, dtype=np.int64) for _ in range(2)]
    for stream, row in zip((whole, cut), rows, strict=True):
        stream.copy(start, row)
    assert np.array_equal(rows[0], rows[1])
    (first, starts), (first_cut, starts_cut) = (stream.documents(start, length) for stream in (whole, cut))
    assert first == first_cut and np.array_equal(starts, starts_cut)
    rate = data.draw(st.sampled_from([0.0, 0.1, 0.3, 0.5]))
    for stream, row in zip((whole, cut), rows, strict=True):
        stream.turn_back(start, row, rate)
    assert np.array_equal(rows[0], rows[1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_lower_rate_is_what_preparing_at_it_gives(prepared, data):
    """Read at 0.2 from data prepared at 0.5, every document is the one prepared at 0.2, plus three ends of sentence."""
    high, low = TokenStream(prepared / "whole" / "train"), TokenStream(prepared / "low" / "train")
    assert high.prepared is not None
    number = data.draw(st.integers(0, 59))
    _, starts = high.documents(0, high.num_tokens)
    begin, end = int(starts[number]), int(starts[number + 1])
    row = np.empty(end - begin, dtype=np.int64)
    high.copy(begin, row)
    was_turned = row[0] == high.prepared.tokens.begin
    high.turn_back(begin, row, 0.2)
    _, low_starts = low.documents(0, low.num_tokens)
    expected = np.empty(int(low_starts[number + 1] - low_starts[number]), dtype=np.int64)
    low.copy(int(low_starts[number]), expected)
    if was_turned and row[0] != high.prepared.tokens.begin:
        # cut into parts, a text has other tokens than whole: the text is what is equal
        made = load_tokenizer(prepared / "t.json")
        assert made.decode(row[:-4].tolist()) == made.decode(expected[:-1].tolist())
        assert row[-4:].tolist() == [1, 1, 1, 1]
    else:
        assert np.array_equal(row, expected)
    # and any piece of the stream is that piece of the whole
    low_edge = data.draw(st.integers(begin, end - 1))
    high_edge = data.draw(st.integers(low_edge + 1, end))
    piece = np.empty(high_edge - low_edge, dtype=np.int64)
    high.copy(low_edge, piece)
    high.turn_back(low_edge, piece, 0.2)
    assert np.array_equal(piece, row[low_edge - begin : high_edge - begin])


def test_which_documents_are_turned(prepared):
    stream = TokenStream(prepared / "whole" / "train")
    ids = np.fromfile(prepared / "whole" / "train.ids", dtype="<u8").tolist()
    _, starts = stream.documents(0, stream.num_tokens)
    for rate in (0.0, 0.2, 0.5):
        row = np.empty(stream.num_tokens, dtype=np.int64)
        stream.copy(0, row)
        stream.turn_back(0, row, rate)
        found = [bool(row[begin] == 3) for begin in starts[:-1]]
        assert found == [is_turned(name, rate=rate, seed=0) for name in ids]


def test_a_higher_rate_is_refused(prepared):
    TokenStream(prepared / "whole" / "train").require_rate(0.5)
    TokenStream(prepared / "none" / "train").require_rate(0.0)
    with pytest.raises(TokenFileError, match=r"a FIM rate of 0.5, which a run can lower but not raise to 0.6"):
        TokenStream(prepared / "whole" / "train").require_rate(0.6)
    with pytest.raises(TokenFileError, match=r"a FIM rate of 0.0"):
        TokenStream(prepared / "none" / "train").require_rate(0.1)


def test_damage_is_named(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared / "whole", tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "train.json").read_text())
    (tmp_path / "a" / "train.ids").write_bytes(b"\0" * 16)
    with pytest.raises(TokenFileError, match=r"train.ids: byte 16: 16 bytes, its manifest says 480"):
        TokenStream(tmp_path / "a" / "train")
    manifest["files"]["train.ids"]["bytes"] = 16
    (tmp_path / "a" / "train.json").write_text(json.dumps(manifest))
    with pytest.raises(TokenFileError, match=r"train.ids: byte 16: 16 bytes where 60 documents need 480"):
        TokenStream(tmp_path / "a" / "train")
    (Path(tmp_path) / "a" / "train.bin").unlink()
    os.truncate(tmp_path / "a" / "train.idx", 20)
    with pytest.raises(TokenFileError) as caught:
        TokenStream(tmp_path / "a" / "train")
    assert "train.bin: No such file" in str(caught.value) and "train.idx: byte 20" in str(caught.value)
