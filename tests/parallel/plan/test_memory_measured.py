"""Predicted memory against the tensors that a run really allocates, on gloo processes."""

from pathlib import Path
from typing import Any

import pytest

from tests.bench.memory_measured import CASES, Case, compare
from tests.launcher.spine import write_tokens

BAR = 0.05


def check(case: Case, folder: Path) -> None:
    ratios = [pair.ratio for pair in compare(case, write_tokens(str(folder / "tokens")))]
    print(f"{case.name:<66}{' '.join(sorted({f'{ratio:.3f}' for ratio in ratios}))}")
    assert all(abs(ratio - 1) < BAR for ratio in ratios), (case.name, ratios)


def test_a_pipeline_of_two(tmp_path: Path) -> None:
    check(Case("1f1b", data=1, expert=1), tmp_path)


# What the formula does not reach yet, with what was measured.
MISSED = {
    "overlap=all": "halves of a chunk under two-stage dispatch hold 6% more than predicted",
    "recompute=attend": "a rank holds 5.3% more than predicted",
    "recompute=layer": "a rank holds 5 to 6% more than predicted",
}


def marked(case: Case) -> Any:
    """The case, expected to fail where it is known to."""
    reasons = [reason for part, reason in MISSED.items() if part in case.name]
    return pytest.param(case, marks=pytest.mark.xfail(reason=reasons[0])) if reasons else case


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [marked(case) for case in CASES], ids=lambda case: case.name.replace(" ", "-"))
def test_every_schedule_precision_and_recomputation(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
