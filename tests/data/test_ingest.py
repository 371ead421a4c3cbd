"""The whole way from text files to token files: what comes out, what is set aside, and that nothing else matters."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.draws import document_hash, document_id, is_heldout
from data.encode import Recipe
from data.fim import FimTokens, is_turned, parts
from data.ingest import Report, ingest
from data.inputs import InputError, PrepareError
from data.split import find_splits
from data.tokenizer_file import TokenizerError, load_tokenizer
from data.tokenizer_training import train_tokenizer
from data.tokens import TokenFile, problems

ROOT = Path(__file__).parents[2]
WORDS = ["the", "router", "picks", "专家", "expert", "für", "\n    return", "x_TD", "1024", "🙂", ".\n\n", ");\n"]


def text(number: int, length: int = 60) -> str:
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS, k=draw.randint(1, length)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A byte-level one, with DeepSeek's special names, and tokens that join punctuation and line breaks."""
    made = train_tokenizer([text(number) for number in range(200)], vocab_size=320)
    described = json.loads(made.to_str())
    pattern = {"Regex": r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\s+|\p{N}+"}
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    described["model"]["vocab"]["\u010a\u010a"] = 320  # two line breaks
    described["model"]["vocab"][".\u010a\u010a"] = 321
    described["model"]["merges"] += [["\u010a", "\u010a"], [".", "\u010a\u010a"]]
    for token in described["added_tokens"]:
        token["special"] = "fim" not in token["content"]  # as in DeepSeek's file
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(described), encoding="utf-8")
    assert find_splits(load_tokenizer(path)).num_joined
    return str(path)


def json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in texts), encoding="utf-8")
    return path


def run(inputs, out: Path, recipe: Recipe, workers: int = 0, **options):
    return ingest([str(path) for path in inputs], out, recipe, workers=workers, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def decoded(out: Path, name: str, tokenizer: str) -> list[str]:
    """The original texts of a set without duplicates, whatever was done to them."""
    made = load_tokenizer(tokenizer)
    fim = FimTokens(begin=3, hole=4, end=5, end_of_sentence=1)
    found = []
    for shard in sorted(out.glob(f"{name}*.bin")):
        for ids in TokenFile(shard.with_suffix("")).documents():
            assert ids[-1] == 1
            split = parts(ids, fim)
            ordered = np.concatenate([split.prefix, split.middle, split.suffix]) if split else ids[:-1]
            found.append(made.decode(ordered.tolist(), skip_special_tokens=False))
    return found


def test_every_document_survives_turned_and_split(tmp_path, tokenizer):
    texts = [text(number) for number in range(250)]
    texts = [*texts[:100], *texts[40:80], *texts[100:], *texts[10:20]]  # the first of equal ones stays, where it is
    path = json_lines(tmp_path / "a.jsonl", texts)
    recipe = Recipe(tokenizer, heldout_fraction=0.1, fim_rate=0.5, split_rate=0.5)
    done = run([path], tmp_path / "out", recipe)
    unique = list(dict.fromkeys(texts))
    names = {value: document_id(document_hash(value.encode())) for value in unique}
    heldout = [value for value in unique if is_heldout(value.encode(), 0.1)]
    assert decoded(tmp_path / "out", "train", tokenizer) == [value for value in unique if value not in heldout]
    assert decoded(tmp_path / "out", "heldout", tokenizer) == heldout and heldout
    counts = done.train.counts
    turned = [value for value in unique if value not in heldout and is_turned(names[value], rate=0.5, seed=0)]
    assert counts["turned"] == len(turned) > 50 and counts["tokens_split"] > 5
    assert counts["duplicates"] == 300 - len(unique) >= 50
    assert np.fromfile(tmp_path / "out" / "train.ids", dtype="<u8").tolist() == [
        names[value] for value in unique if value not in heldout
    ]
    assert done.heldout is not None and done.heldout.counts["turned"] == done.heldout.counts["tokens_split"] == 0
    for name in ("train", "heldout"):
        assert problems(tmp_path / "out" / name, 400, 8, hashes=True) == []
        assert problems(tmp_path / "out" / name, 400, 8) == []
    assert not (tmp_path / "out" / ".work").exists()


def test_workers_units_and_order_leave_no_trace(tmp_path, tokenizer, monkeypatch):
    texts = [text(number) for number in range(120)]
    path = json_lines(tmp_path / "a.jsonl", texts)
    recipe = Recipe(tokenizer, fim_rate=0.3, split_rate=0.3, heldout_fraction=0.2)
    run([path], tmp_path / "one", recipe)
    monkeypatch.setattr("data.inputs.MIN_UNIT_BYTES", 777)
    run([path], tmp_path / "small", recipe)
    run([path], tmp_path / "many", recipe, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "small") == contents(tmp_path / "many")
    json_lines(path, texts[::-1])
    run([path], tmp_path / "reversed", recipe)
    for name in ("train", "heldout"):
        backwards = [ids.tolist() for ids in TokenFile(tmp_path / "reversed" / name).documents()]
        forwards = [ids.tolist() for ids in TokenFile(tmp_path / "one" / name).documents()]
        assert sorted(backwards) == sorted(forwards)


def test_all_kinds_of_input_give_the_same_documents(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = list(dict.fromkeys(text(number) for number in range(60)))
    recipe = Recipe(tokenizer, heldout_fraction=0.0)
    plain = json_lines(tmp_path / "a.jsonl", texts)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "c.parquet"
    pq.write_table(pa.table({"other": list(range(len(texts))), "text": texts}), table, row_group_size=7)
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    for number, value in enumerate(texts):
        (folder / "sub" / f"{number:03d}.txt").write_bytes(value.encode())
    expected = None
    for path in (plain, packed, table, folder):
        out = tmp_path / f"out-{path.name}"
        done = run([path], out, recipe)
        assert done.heldout is None and done.train.sources[0].documents == len(texts)
        tokens = (out / "train.bin").read_bytes(), (out / "train.ids").read_bytes()
        expected = expected or tokens
        assert tokens == expected
    done = run([plain, table], tmp_path / "both", recipe)
    assert [source.documents for source in done.train.sources] == [len(texts), 0]
    assert done.train.counts["duplicates"] == len(texts)


def test_shards_hold_the_same_stream(tmp_path, tokenizer):
    path = json_lines(tmp_path / "a.jsonl", [text(number) for number in range(100)])
    recipe = Recipe(tokenizer, heldout_fraction=0.0)
    whole = run([path], tmp_path / "whole", recipe).train
    cut = run([path], tmp_path / "cut", recipe, shard_tokens=500).train
    assert len(cut.shards) > 3 and not whole.shards and cut.num_tokens == whole.num_tokens
    shards = [TokenFile(shard) for shard in cut.shard_prefixes(tmp_path / "cut" / "train")]
    assert all(shard.num_tokens <= 500 for shard in shards)
    together = np.concatenate([shard.tokens for shard in shards])
    assert np.array_equal(together, TokenFile(tmp_path / "whole" / "train").tokens)
    assert problems(tmp_path / "cut" / "train", 400, 8, hashes=True) == []
    (tmp_path / "cut" / f"{cut.shards[1]}.bin").write_bytes(b"")
    (tmp_path / "cut" / f"{cut.shards[2]}.idx").unlink()
    assert len(problems(tmp_path / "cut" / "train", 400, 8)) == 2


BAD = [
    (b'{"text": \n', "corrupt JSON", 0),
    (b'{"text": "\xff"}\n', "invalid UTF-8", 10),
    (b'{"txt": "x"}\n', "no text key", 0),
    (b"[1]\n", "no text key", 0),
    (b'{"text": ""}\n', "empty document", 0),
    (b'{"text": " \\n"}\n', "empty document", 0),
    (b'{"text": 3}\n', "text is no string", 0),
    (b'{"text": "\\ud800"}\n', "invalid Unicode", 0),
    (b"\n", "empty line", 0),
]


def test_bad_lines_are_set_aside_with_their_place(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("data.inputs.MIN_UNIT_BYTES", 50)  # lines must be counted across units
    raw, expected = b"", []
    for number, (line, reason, at) in enumerate(BAD * 3):
        raw += json.dumps({"text": text(number)}).encode() + b"\n"
        expected.append((2 * number + 2, len(raw) + at, reason))
        raw += line
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + raw.rstrip(b"\n"))  # a byte order mark in front, no line break at the end
    done = run([path], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.0))
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    expected = [(line, offset + 3, reason) for line, offset, reason in expected]
    assert expected.pop()[2] == "empty line"  # the last line break was taken away
    assert [(reject["line"], reject["byte_offset"], reject["reason"]) for reject in rejects] == expected
    assert all(reject["file"] == str(path) for reject in rejects)
    assert done.train.num_documents == len(BAD) * 3
    assert sum(value for key, value in done.train.counts.items() if key.startswith("rejected: ")) == len(expected)


def test_files_that_hold_no_text_are_set_aside(tmp_path, tokenizer):
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("hidden")
    (folder / "good.txt").write_text("good text")
    (folder / "bad.bin").write_bytes(b"abc\xff\xfe")
    (folder / "empty.txt").write_text("")
    (folder / "link.txt").symlink_to(folder / "good.txt")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 2000)[:-30])
    flipped = bytearray(gzip.compress("".join(f'{{"text": "{text(n)!r}"}}\n' for n in range(99)).encode()))
    flipped[len(flipped) // 2] ^= 0xFF
    (folder / "flipped.jsonl.gz").write_bytes(flipped)
    done = run([folder], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.0))
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    found = {(Path(reject["file"]).name, reject["reason"], reject["byte_offset"]) for reject in rejects}
    assert ("flipped.jsonl.gz", "damaged gzip", None) in found
    assert {row for row in found if row[0] != "flipped.jsonl.gz"} == {
        (".git", "hidden folder", None),
        ("link.txt", "symbolic link", None),
        ("bad.bin", "invalid UTF-8", 3),
        ("empty.txt", "empty document", 0),
        ("cut.jsonl.gz", "damaged gzip", None),
    }
    assert done.train.counts["rejected: symbolic link"] == 1


def test_bad_rows_of_parquet(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([b"one", None, b"\xff", b"", b"two"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    done = run([tmp_path / "a.parquet"], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.0))
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (2, "empty document"), (3, "invalid UTF-8"), (4, "empty document"),
    ]  # fmt: skip
    assert done.train.num_documents == 2


def test_inputs_that_cannot_work_are_named_together(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"content": ["x"], "text": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    (tmp_path / "c.jsonl.zst").write_bytes(b"")
    names = ["a.parquet", "b.parquet", "c.jsonl.zst", "missing"]
    with pytest.raises(InputError) as caught:
        run([tmp_path / name for name in names], tmp_path / "out", Recipe(tokenizer))
    assert len(caught.value.errors) == 4
    for name, part in zip(names, ("int64", "no parquet file", "zstd", "no such file"), strict=True):
        assert any(name in error and part in error for error in caught.value.errors)
    with pytest.raises(InputError, match=r"no column 'body', there are content, text"):
        run([tmp_path / "a.parquet"], tmp_path / "out", Recipe(tokenizer, text_key="body"))
    with pytest.raises(InputError) as caught:
        run([tmp_path], tmp_path / "out", Recipe(tokenizer, fim_rate=2, split_rate=-1), workers=-1)
    assert len(caught.value.errors) == 3
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_cannot_work_are_refused(tmp_path, tokenizer):
    path = json_lines(tmp_path / "a.jsonl", ["x"])
    described = json.loads(Path(tokenizer).read_text())

    def altered(**changes) -> str:
        (tmp_path / "t.json").write_text(json.dumps(described | changes))
        return str(tmp_path / "t.json")

    for name, message in ((tmp_path / "none.json", "No such file"), (path, "no tokenizers file")):
        with pytest.raises(TokenizerError, match=message):
            run([path], tmp_path / "out", Recipe(str(name)))
    for changes, rate, message in (
        ({"added_tokens": []}, 0.0, "no token ends a document"),
        ({"added_tokens": described["added_tokens"][:2]}, 0.1, "no fill-in-the-middle"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         0.1, "do not decode"),
    ):  # fmt: skip
        with pytest.raises(TokenizerError, match=message):
            run([path], tmp_path / "out", Recipe(altered(**changes), fim_rate=rate))


def test_a_quoted_marker_is_text(tmp_path, tokenizer):
    quoted = "<\uff5cfim\u2581begin\uff5c>a<\uff5cfim\u2581hole\uff5c>b<\uff5cend\u2581of\u2581sentence\uff5c>"
    run([json_lines(tmp_path / "a.jsonl", [quoted])], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.0))
    (ids,) = TokenFile(tmp_path / "out" / "train").documents()
    assert min(ids[:-1]) > 5 and decoded(tmp_path / "out", "train", tokenizer) == [quoted]


def test_stopped_in_any_stage_it_continues_to_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    path = json_lines(tmp_path / "a.jsonl", [text(number % 70) for number in range(80)])
    recipe = Recipe(tokenizer, fim_rate=0.3, heldout_fraction=0.1)
    run([path], tmp_path / "straight", recipe, shard_tokens=900)
    expected = contents(tmp_path / "straight")
    monkeypatch.setattr("data.inputs.MIN_UNIT_BYTES", 4000)
    monkeypatch.setattr("data.assemble._PARTITION_DOCUMENTS", 30)  # duplicates in several parts
    reports: list[Report] = []
    run([path], tmp_path / "again", recipe, shard_tokens=900, on_progress=reports.append)
    for stop in range(1, len(reports)):
        seen = 0

        def interrupt(report: Report, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt

        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            run([path], out, recipe, shard_tokens=900, on_progress=interrupt)
        assert not (out / "train.json").exists()
        later: list[Report] = []
        run([path], out, recipe, shard_tokens=900, on_progress=later.append)
        assert later[0].done >= reports[min(stop, len(reports)) - 1].done or reports[stop - 1].stage != "encode"
        assert contents(out) == expected


def test_repeated_call_does_nothing_until_something_changes(tmp_path, tokenizer):
    path = json_lines(tmp_path / "a.jsonl", [text(number) for number in range(30)])
    recipe = Recipe(tokenizer, heldout_fraction=0.2)
    assert run([path], tmp_path / "out", recipe).rebuilt
    before = contents(tmp_path / "out")
    assert not run([path], tmp_path / "out", recipe).rebuilt and contents(tmp_path / "out") == before
    os.utime(tmp_path / "out" / "train.bin")  # as after a copy
    assert not run([path], tmp_path / "out", recipe).rebuilt
    assert problems(tmp_path / "out" / "train", 400, 8) == []
    assert run([path], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.3)).rebuilt
    assert not run([path], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.3)).rebuilt
    json_lines(path, [text(number) for number in range(31)])
    done = run([path], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.3))
    assert done.rebuilt and done.train.counts["documents_read"] == 31
    os.utime(path)  # touched: cannot be told from changed without reading it
    assert run([path], tmp_path / "out", Recipe(tokenizer, heldout_fraction=0.3)).rebuilt


def test_nothing_to_train_on(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{\n" * 3)
    with pytest.raises(PrepareError, match="3 rejects, see"):
        run([path], tmp_path / "out", Recipe(tokenizer))
    json_lines(path, ["x"])
    with pytest.raises(PrepareError, match="every document was held out"):
        run([path], tmp_path / "out", Recipe(tokenizer, heldout_fraction=1.0))
    with pytest.raises(PrepareError, match="the output folder holds inputs"):
        run([path], tmp_path, Recipe(tokenizer))


@pytest.mark.slow
def test_killed_by_a_signal_at_random_times(tmp_path, tokenizer):
    """SIGKILL to the whole process group, again and again, then one call to the end: the same bytes."""
    path = json_lines(tmp_path / "a.jsonl", [text(number, 3000) for number in range(4000)])
    command = [
        sys.executable, "-m", "launcher", "prepare", str(path), "--tokenizer", tokenizer, "--fim-rate", "0.1",
        "--split-rate", "0.1", "--workers", "2", "--shard-tokens", "300000",
    ]  # fmt: skip
    subprocess.run([*command, "--out", str(tmp_path / "straight")], check=True, cwd=ROOT)
    kills = 0
    for seconds in (2.5, 4.0, 5.5, 7.0):
        with subprocess.Popen([*command, "--out", str(tmp_path / "killed")], cwd=ROOT, start_new_session=True) as child:
            deadline = time.monotonic() + seconds
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                kills += 1
    assert kills
    subprocess.run([*command, "--out", str(tmp_path / "killed")], check=True, cwd=ROOT)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
