import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.corpus import SOURCES, Document
from data.inputs import InputError, PrepareError
from data.prepare import prepare, texts
from data.stream import TokenStream
from data.tokenizer_file import TokenizerError, load_tokenizer
from data.tokenizer_training import END_OF_SENTENCE, SPECIAL_TOKENS, train_tokenizer
from data.tokens import TokenFile, TokenFileError, problems

WORDS = ["the", "router", "picks", "专家", "expert", "für", "\n    return", "x_TD", "1024", "🙂", "\r\n", "\t"]


def corpus(count: int = 120, seed: int = 0) -> list[Document]:
    draw = random.Random(seed)
    return [Document("made up", f"{i}.txt", " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))) for i in range(count)]


def run(out: Path, documents=None, **changes):
    messages: list[str] = []
    options = {"vocab_size": 300, "heldout_fraction": 0.2, "progress": messages.append} | changes
    return prepare(corpus=corpus() if documents is None else documents, out_dir=out, **options), messages


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(tmp_path_factory.mktemp("prepared") / "out")[0]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in corpus()], vocab_size=300)


def test_text_survives_exactly(done):
    given_texts = [document.text for document in corpus()]
    kept = [*texts(done.train_prefix), *texts(done.heldout_prefix)]
    assert sorted(kept) == sorted(given_texts)
    assert 0 < done.heldout.num_documents < done.train.num_documents
    for prefix, manifest in ((done.train_prefix, done.train), (done.heldout_prefix, done.heldout)):
        assert manifest.text_bytes == sum(len(text.encode()) for text in texts(prefix))
        assert manifest.sources[0].documents == manifest.num_documents
        assert [int(ids[-1]) for ids in TokenFile(prefix).documents()] == [END_OF_SENTENCE] * manifest.num_documents
        assert manifest.max_token_id == TokenFile(prefix).tokens.max() < manifest.vocab_size <= 300
        assert problems(prefix, 300, 32, hashes=True) == []


def test_special_tokens_have_deepseek_names_and_fixed_ids(done):
    assert SPECIAL_TOKENS[0] == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert SPECIAL_TOKENS[1] == "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert SPECIAL_TOKENS[2:4] == ("<\uff5c\u2581pad\u2581\uff5c>", "<\uff5cfim\u2581begin\uff5c>")
    tokenizer = load_tokenizer(done.tokenizer_path)
    assert [tokenizer.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4, 5]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "a"])).map("".join))
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert min(ids, default=6) >= len(SPECIAL_TOKENS)  # a text cannot forge an end of sentence
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_rerun_does_nothing_and_says_so(tmp_path):
    first, _ = run(tmp_path / "out")
    before = contents(tmp_path / "out")
    second, messages = run(tmp_path / "out", iter(corpus()))
    assert first.rebuilt and not second.rebuilt and "nothing to do" in messages[-2]
    assert not any("training a tokenizer" in message for message in messages)
    assert contents(tmp_path / "out") == before and second.train == first.train


def test_same_input_same_bytes(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 280}, {"heldout_fraction": 0.3}, {"documents": corpus(121)}, {"fim_rate": 0.5}, {"seed": 1}],
)
def test_other_input_is_prepared_again(tmp_path, change):
    run(tmp_path / "out")
    again, _ = run(tmp_path / "out", **change)
    other, _ = run(tmp_path / "other", **change)
    assert again.rebuilt and contents(tmp_path / "out") == contents(tmp_path / "other")
    assert again.train == other.train


@pytest.mark.parametrize("name", ["train.bin", "heldout.idx", "tokenizer.json", "heldout.json"])
def test_damaged_output_is_prepared_again(tmp_path, name):
    run(tmp_path / "out")
    before = contents(tmp_path / "out")
    raw = bytearray(before[name])
    raw[len(raw) // 2] ^= 1
    (tmp_path / "out" / name).write_bytes(raw)
    again, _ = run(tmp_path / "out")
    assert again.rebuilt and contents(tmp_path / "out") == before


def test_interrupted_run_is_redone(tmp_path):
    run(tmp_path / "out")

    def stop(message: str) -> None:
        if message.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", corpus(121), progress=stop)
    assert not (tmp_path / "out" / "heldout.json").exists()
    assert not list((tmp_path / "out").glob("*tmp*"))
    again, _ = run(tmp_path / "out", corpus(121))
    assert again.rebuilt and again.train.num_documents + again.heldout.num_documents == 121


def test_turned_as_asked(tmp_path):
    result, _ = run(tmp_path / "out", fim_rate=0.5, seed=3)
    prepared = TokenStream(result.train_prefix).prepared
    assert prepared is not None and (prepared.rate, prepared.seed) == (0.5, 3)
    assert 20 < result.train.counts["turned"] < 80 and result.heldout.counts["turned"] == 0
    with pytest.raises(TokenizerError, match="no token joins punctuation and line breaks"):
        run(tmp_path / "out", split_rate=0.5)


def test_split_depends_on_the_content_alone(tmp_path, done):
    documents = corpus()
    random.Random(1).shuffle(documents)
    other, _ = run(tmp_path / "out", documents + corpus(40, seed=9))
    assert set(texts(done.heldout_prefix)) <= set(texts(other.heldout_prefix))
    assert set(texts(done.train_prefix)) <= set(texts(other.train_prefix))


def test_exact_duplicates_go(tmp_path):
    doubled = [*corpus(), *(Document("copy", document.path_label, document.text) for document in corpus())]
    result, messages = run(tmp_path / "out", doubled)
    assert result.train.num_documents + result.heldout.num_documents == 120
    assert "120 exact duplicates" in messages[-1]
    assert [(source.name, source.documents > 0) for source in result.train.sources] == [
        ("made up", True), ("copy", False),
    ]  # fmt: skip


def test_what_is_no_text_is_set_aside(tmp_path):
    bad = [Document("s", "a.txt", ""), Document("s", "b.txt", "x\ud800"), Document("s", "c.txt", " \n")]
    result, messages = run(tmp_path / "out", [*corpus(), *bad])
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reasons == ["empty document", "invalid Unicode", "empty document"]
    assert result.train.counts["rejected: empty document"] == 2 and "3 files set aside" in messages[-1]
    assert result.train.num_documents + result.heldout.num_documents == 120


def test_sources_keep_their_terms(tmp_path):
    documents = [replace(document, source="songci") for document in corpus()]
    result, _ = run(tmp_path / "out", documents)
    (source,) = result.train.sources
    assert (source.name, source.licence) == ("songci", SOURCES["songci"].licence)
    assert str(tmp_path) not in (tmp_path / "out" / "train.json").read_text()  # no path of this machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 261}, "need 262"),
        ({"heldout_fraction": 0.0}, "between 0 and 1"),
        ({"fim_rate": 1.5, "split_rate": -1}, "fim_rate is 1.5"),
        ({"heldout_fraction": 1e-9}, "fell into the heldout set"),
        ({"documents": []}, "fell into the train set"),
        ({"documents": [Document("s", "a.txt", "")]}, "no document of 1 fell into the train set"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, change, message):
    with pytest.raises((PrepareError, InputError), match=message):
        run(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_texts_refuse_another_tokenizer(tmp_path):
    result, _ = run(tmp_path / "out")
    result.tokenizer_path.write_text("{}")
    with pytest.raises(TokenFileError, match=r"tokenizer\.json"):
        next(texts(result.train_prefix))
