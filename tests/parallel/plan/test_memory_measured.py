"""Predicted memory against the tensors that a run really allocates, on gloo processes."""

from pathlib import Path

import pytest

from tests.bench.memory_measured import CASES, Case, compare, ratios
from tests.launcher.spine import write_tokens

BAR = 0.05


def check(case: Case, folder: Path) -> None:
    found = compare(case, write_tokens(str(folder / "tokens")))
    print(f"{case.name:<66}{ratios(found)}")
    assert all(abs(pair.ratio - 1) < BAR for pair in found), (case.name, ratios(found))


def test_a_pipeline_of_two(tmp_path: Path) -> None:
    check(Case("1f1b", data=1, expert=1), tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_every_schedule_precision_and_recomputation(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
