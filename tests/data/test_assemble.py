"""Removal of exact duplicates: the first stays, every document is read once, whatever the number of parts."""

from pathlib import Path

import numpy as np
import pytest

from data import assemble
from data.assemble import documents, kept, mark_duplicates
from data.encode import DOCUMENT, unit_path


def write_units(work: Path, sizes: list[int]) -> list[list[tuple[int, int]]]:
    """Units of documents of few different hashes, some equal in one half only; gives the hashes."""
    draw = np.random.default_rng(0)
    found = []
    for unit, size in enumerate(sizes):
        records = np.zeros(size, dtype=DOCUMENT)
        records["name"] = draw.integers(2**63, 2**63 + 9, size, dtype=np.uint64)
        records["rest"] = draw.integers(0, 5, size)
        records.tofile(unit_path(work, unit, "docs"))
        found.append(list(zip(records["name"].tolist(), records["rest"].tolist(), strict=True)))
    return found


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_the_first_of_equal_ones_stays(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "_PARTITION_DOCUMENTS", at_once)
    hashes = write_units(tmp_path, [20, 0, 3, 30, 1])
    (tmp_path / "part-000000").write_bytes(b"what a killed call left")
    seen: set[tuple[int, int]] = set()
    expected = [[not (pair in seen or seen.add(pair)) for pair in unit] for unit in hashes]
    reports: list[tuple[int, int]] = []
    duplicates = mark_duplicates(tmp_path, len(hashes), lambda *report: reports.append(report))
    assert [kept(tmp_path, unit).tolist() for unit in range(len(hashes))] == expected
    assert duplicates == 54 - len(seen) > 10
    assert reports[0] == (0, 108) and reports[-1] == (108, 108) and reports == sorted(reports)
    assert not list(tmp_path.glob("part-*"))


def test_every_unit_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty parts do not read twenty times."""
    monkeypatch.setattr(assemble, "_PARTITION_DOCUMENTS", 10)
    write_units(tmp_path, [10] * 20)
    read: list[int] = []

    def counting(work: Path, unit: int) -> np.ndarray:
        found = documents(work, unit)
        read.append(unit)
        return found

    monkeypatch.setattr(assemble, "documents", counting)
    mark_duplicates(tmp_path, 20)
    assert len(read) == 2 * 20  # once for its size, once for its hashes


def test_nothing_to_compare(tmp_path: Path) -> None:
    write_units(tmp_path, [0, 0])
    assert mark_duplicates(tmp_path, 2) == 0
