import json
import os
import resource
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.tokens import (
    FileRecord,
    Manifest,
    SourceRecord,
    TokenFile,
    TokenFileError,
    TokenWriter,
    accept,
    problems,
    sha256_file,
)

DOCUMENTS = ([5, 6, 7], [8], [9, 10])


def write(prefix: Path, documents=DOCUMENTS, dtype="uint16") -> Path:
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document))
    return prefix


def manifest_for(prefix: Path, **changes) -> Manifest:
    token_file = TokenFile(prefix)
    paths = [Path(f"{prefix}.{ending}") for ending in ("bin", "idx")]
    manifest = Manifest(
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        vocab_size=16,
        dtype=token_file.dtype.name,
        num_tokens=token_file.num_tokens,
        num_documents=token_file.num_documents,
        max_token_id=int(token_file.tokens.max()),
        text_bytes=12,
        files={path.name: FileRecord(path.stat().st_size, sha256_file(path)) for path in paths},
        sources=(SourceRecord("made up", 3, 12, "CC0-1.0", "this test"),),
        arguments={"seed": 1},
        corpus_sha256="1" * 64,
    )
    return replace(manifest, **changes)


def test_bytes_of_the_format(tmp_path):
    write(tmp_path / "a")
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + b"\x08" + struct.pack("<QQ", 3, 4)
    assert len(header) == 34
    body = struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == header + body
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 5, 6, 7, 8, 9, 10)


def test_reads_documents_of_several_sequences(tmp_path):
    # hand-assembled: 3 sequences in 2 documents, as Megatron writes them when a document is split into sentences
    (tmp_path / "a.bin").write_bytes(struct.pack("<6i", 5, 6, 7, 8, 9, 10))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    body = struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 12, 16) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "a.idx").write_bytes(header + body)
    token_file = TokenFile(tmp_path / "a")
    assert (token_file.num_tokens, token_file.num_sequences, token_file.num_documents) == (6, 3, 2)
    assert [document.tolist() for document in token_file.documents()] == [[5, 6, 7, 8], [9, 10]]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=30), max_size=20),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_round_trip(tmp_path, documents, dtype):
    token_file = TokenFile(write(tmp_path / "corpus.v2", documents, dtype))
    assert token_file.dtype == dtype and token_file.num_documents == len(documents)
    assert [document.tolist() for document in token_file.documents()] == documents
    assert token_file.tokens.tolist() == [token for document in documents for token in document]


def test_chunked_index(tmp_path, monkeypatch):
    monkeypatch.setattr("data.index.CHUNK", 2)
    monkeypatch.setattr("data.tokens.CHUNK", 2)  # several chunks, the last one short
    documents = [[number] * (number + 1) for number in range(7)]
    assert [part.tolist() for part in TokenFile(write(tmp_path / "a", documents)).documents()] == documents


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([70000], "id 70000 does not fit uint16"),
        ([-1], "id -1"),
        ([], "length >= 1"),
        ([[1]], "length >= 1"),
        ([0.5], "float64"),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path, document, message):
    with pytest.raises(TokenFileError, match=message), TokenWriter(tmp_path / "a", "uint16") as writer:
        writer.add(np.array([1, 2]))
        writer.add(np.array(document))
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_float_dtype(tmp_path):
    with pytest.raises(TokenFileError, match="float32"):
        TokenWriter(tmp_path / "a", "float32")


def test_failed_writer_keeps_the_old_file(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "a", "uint16") as writer:
        writer.add(np.array([1]))
        raise RuntimeError
    assert TokenFile(tmp_path / "a").num_tokens == 6


def test_a_writer_on_a_full_disk_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            TokenWriter(tmp_path / "a", "uint16", with_ids=True) as writer,
        ):
            writer.add(np.arange(400))
            writer.add(np.arange(40_000))
            writer.add(np.arange(400))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_whose_time_cannot_be_renewed(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a")
    manifest_for(prefix).write(prefix)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    (message,) = accept(prefix)
    assert message.startswith(f"{prefix}.json: Permission denied: every file is as it says")


def test_the_first_id_outside_a_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("data.index.CHUNK", 2)
    raw = bytearray(Path(f"{write(tmp_path / 'a', [[5, 6, 7, 8], [3, 4], [9, 2]], 'int32')}.bin").read_bytes())
    struct.pack_into("<i", raw, 20, -1)
    (tmp_path / "a.bin").write_bytes(raw)
    file = TokenFile(tmp_path / "a")
    assert [file.first_outside(size) for size in (5, 7, 8, 9, 70_000)] == [0, 2, 3, 5, 5]
    assert TokenFile(write(tmp_path / "b")).first_outside(70_000) is None  # beyond what uint16 holds


def patched(offset: int, form: str, *values):
    def corrupt(raw: bytearray) -> bytearray:
        struct.pack_into(form, raw, offset, *values)
        return raw

    return corrupt


CORRUPTIONS = [
    (".idx", patched(0, "<B", 0), "a.idx: byte 0: magic"),
    (".idx", lambda raw: raw[:20], "a.idx: byte 20: truncated inside the 34-byte header"),
    (".idx", patched(9, "<Q", 2), "a.idx: byte 9: version 2"),
    (".idx", patched(17, "<B", 7), "a.idx: byte 17: dtype code 7"),
    (".idx", patched(18, "<Q", 1 << 60), "a.idx: byte 102: 102 bytes where the counts at byte 18"),
    (".idx", patched(26, "<Q", 0), "a.idx: byte 26: 0 document indices"),
    (".idx", lambda raw: raw[:-1], "a.idx: byte 101: 101 bytes where the counts"),
    (".idx", lambda raw: raw + b"\0\0\0", "multimodal"),
    (".idx", lambda raw: raw + b"\0", "a.idx: byte 102: 103 bytes where"),
    (".idx", patched(34, "<i", -1), "a.idx: byte 46: sequence 0"),
    (".idx", patched(54, "<q", 4), "a.idx: byte 54: sequence 1"),
    (".idx", patched(70, "<q", 1), "a.idx: byte 70: document indices run from 1 to 3"),
    (".idx", patched(86, "<q", 0), "a.idx: byte 86: document index 2 goes back to 0"),
    (".idx", patched(94, "<q", 2), "a.idx: byte 70: document indices run from 0 to 2"),
    (".idx", patched(42, "<i", 3), "a.bin: byte 12: truncated: 12 bytes where .idx needs 14"),
    (".bin", lambda raw: raw[:-1], "a.bin: byte 11: truncated: 11 bytes where .idx needs 12"),
    (".bin", lambda raw: raw + b"\0", "a.bin: byte 12: longer"),
]


@pytest.mark.parametrize(("ending", "corrupt", "message"), CORRUPTIONS, ids=[case[2][:40] for case in CORRUPTIONS])
def test_corruption_is_named(tmp_path, ending, corrupt, message):
    prefix = write(tmp_path / "a")
    path = Path(f"{prefix}{ending}")
    path.write_bytes(corrupt(bytearray(path.read_bytes())))
    with pytest.raises(TokenFileError) as caught:
        TokenFile(prefix)
    assert message in str(caught.value)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_file_is_named(tmp_path, ending):
    prefix = write(tmp_path / "a")
    Path(f"{prefix}{ending}").unlink()
    with pytest.raises(TokenFileError, match=rf"a\{ending}: No such file"):
        TokenFile(prefix)


def test_manifest_round_trip(tmp_path):
    prefix = write(tmp_path / "a")
    manifest = manifest_for(prefix)
    manifest.write(prefix)
    assert Manifest.read(prefix) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("num_tokens"), "keys"),
        (lambda value: value.update(colour=1), "colour"),
        (lambda value: value.update(num_tokens="6"), "'num_tokens' is '6'"),
        (lambda value: value.update(num_tokens=True), "'num_tokens' is True"),
        (lambda value: value.update(text_bytes=-1), "'text_bytes' is -1"),
        (lambda value: value.update(format=9), "format 9"),
        (lambda value: value.update(files=[]), "'files'"),
        (lambda value: value.update(sources={}), "'sources'"),
        (lambda value: value["files"].update({"../b": value["files"].pop("a.bin")}), "holds a folder"),
        (lambda value: value["files"]["a.bin"].pop("sha256"), "'a.bin'"),
        (lambda value: value["sources"].append(3), "source 1"),
    ],
)
def test_damaged_manifest_is_named(tmp_path, change, message):
    prefix = write(tmp_path / "a")
    manifest_for(prefix).write(prefix)
    path = tmp_path / "a.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(TokenFileError, match=message) as caught:
        Manifest.read(prefix)
    assert str(path) in str(caught.value)
    assert problems(prefix, 16, 2) == [str(caught.value)]


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[]", b"null"])
def test_manifest_that_is_no_manifest(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    (message,) = problems(tmp_path / "a", 16, 2)
    assert "a.json" in message and "prepare the data again" in message


def test_problems_none(tmp_path):
    prefix = write(tmp_path / "a")
    manifest_for(prefix).write(prefix)
    assert problems(prefix, 11, 5, hashes=True) == []


def test_problems_are_all_returned(tmp_path):
    prefix = write(tmp_path / "a")
    manifest_for(prefix).write(prefix)
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"\0")
    Path(f"{prefix}.idx").unlink()
    found = problems(prefix, 10, 6)
    assert len(found) == 4
    for message, parts in zip(
        found,
        [
            ("a.bin", "13 bytes", "12"),
            ("a.idx", "No such file"),
            ("a.json", "10, the model's", "at least 11"),
            ("a.json", "6 tokens", "7"),
        ],
        strict=True,
    ):
        assert all(part in message for part in parts)


def test_an_id_beyond_the_vocabulary_is_named_with_its_byte(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a")
    manifest_for(prefix).write(prefix)
    (message,) = problems(prefix, 8, 2)
    assert f"a.json: the largest token id is 10 (first beyond: 8 at byte 6 of {prefix}.bin), the model's" in message
    monkeypatch.setattr("data.tokens.VERIFY_BYTES", 0)
    assert "the largest token id is 10, the model's vocab_size is 8" in problems(prefix, 8, 2)[0]


def test_problems_behind_right_sizes(tmp_path):
    prefix = write(tmp_path / "a")
    manifest_for(prefix, num_documents=2).write(prefix)
    assert "3 documents" in problems(prefix, 16, 2)[0]
    manifest_for(prefix).write(prefix)
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    raw[0] ^= 1
    (tmp_path / "a.bin").write_bytes(raw)
    os.utime(tmp_path / "a.bin", ns=(0, 0))
    assert problems(prefix, 16, 2) == []  # sizes and times only: a flipped bit needs hashes
    assert "a.bin: SHA-256 differs" in problems(prefix, 16, 2, hashes=True)[0]
    (tmp_path / "a.idx").write_bytes(b"\0" * 102)
    os.utime(tmp_path / "a.idx", ns=(0, 0))
    assert "magic" in problems(prefix, 16, 2)[0]


def test_a_copy_with_new_times_is_read_if_it_is_small(tmp_path, caplog):
    (tmp_path / "from").mkdir()
    prefix = write(tmp_path / "from" / "a")
    manifest_for(prefix).write(prefix)
    to = tmp_path / "to"
    to.mkdir()
    for name in ("a.json", "a.bin", "a.idx"):  # as `cp -r` does, the manifest first
        (to / name).write_bytes((tmp_path / "from" / name).read_bytes())
        os.utime(to / name)
    assert problems(to / "a", 16, 2) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{to}/a.json: 2 files newer than it, as after a copy: read and found equal (114 bytes)"
    ]
    assert problems(to / "a", 16, 2) == [] and len(caplog.records) == 1  # once
    raw = bytearray((to / "a.bin").read_bytes())
    raw[0] ^= 1
    (to / "a.bin").write_bytes(raw)
    for _ in range(2):
        (message,) = problems(to / "a", 16, 2)
        assert message.startswith(f"{to}/a.bin: changed after its manifest was written, and its SHA-256 differs")


def test_changed_since_its_manifest_until_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tokens.VERIFY_BYTES", 11)  # more must be asked for
    prefix = write(tmp_path / "a")
    manifest_for(prefix).write(prefix)
    later = (tmp_path / "a.json").stat().st_mtime_ns + 1
    os.utime(tmp_path / "a.bin", ns=(later, later))
    (message,) = problems(prefix, 16, 2)
    assert "a.bin: changed after its manifest" in message and f"--verify {prefix}" in message
    os.utime(tmp_path / "a.bin", ns=(later, later))
    assert accept(prefix) == [] and problems(prefix, 16, 2) == []
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    raw[0] ^= 1
    (tmp_path / "a.bin").write_bytes(raw)
    assert "SHA-256 differs" in accept(prefix)[0] and problems(prefix, 16, 2) != []


def test_an_id_beyond_the_manifest_is_found_with_its_byte(tmp_path):
    prefix = write(tmp_path / "a", ([5, 6], [40, 7]))
    manifest_for(prefix, max_token_id=10, num_documents=2).write(prefix)
    assert problems(prefix, 16, 2) == []
    (message,) = problems(prefix, 16, 2, hashes=True)
    assert "a.bin: byte 4: id 40" in message


def test_a_long_index_is_checked_at_its_ends_only(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a")
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into("<q", raw, 54, 4)  # sequence 1 of 3
    (tmp_path / "a.idx").write_bytes(raw)
    monkeypatch.setattr("data.index.SCAN_SEQUENCES", 2)
    assert TokenFile(prefix).num_tokens == 6
    with pytest.raises(TokenFileError, match="sequence 1"):
        TokenFile(prefix, scan=True)
    for offset, form, value, message in (
        (34, "<i", -1, "sequence 0"),
        (42, "<i", -1, "sequence 2"),
        (42, "<i", 1, "a.bin: byte 10: longer"),
        (62, "<q", -4, "sequence 2"),
        (94, "<q", 2, "run from 0 to 2"),
    ):
        bad = bytearray(raw)
        struct.pack_into(form, bad, offset, value)
        (tmp_path / "a.idx").write_bytes(bad)
        with pytest.raises(TokenFileError, match=message):
            TokenFile(prefix)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.integers(1, 9), min_size=1, max_size=12), data=st.data())
def test_documents_of_a_range(tmp_path, documents, data):
    token_file = TokenFile(write(tmp_path / "a", [[number] * size for number, size in enumerate(documents)]))
    begin = data.draw(st.integers(0, token_file.num_tokens - 1))
    end = data.draw(st.integers(begin + 1, token_file.num_tokens))
    first, starts = token_file.documents_at(begin, end)
    tokens = token_file.tokens.tolist()
    assert first == tokens[begin] and first + len(starts) - 2 == tokens[end - 1]
    assert starts.tolist() == np.cumsum([0, *documents])[first : first + len(starts)].tolist()


def test_ids_beside_the_tokens(tmp_path):
    with TokenWriter(tmp_path / "a", "uint16", with_ids=True) as writer:
        writer.add(np.array([1, 2]), name=2**64 - 1)
        writer.add(np.array([3]), name=7)
    assert np.fromfile(tmp_path / "a.ids", dtype="<u8").tolist() == [2**64 - 1, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.ids", "a.idx"]
