import json
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.plan.validate import all_rows, independence
from parallel.pipeline.actions import Action
from parallel.plan.published import Row, _weights_alone


def test_rows_and_what_does_not_hold(capsys):
    assert main(["plan", "--validate", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"check", "published", "predicted", "relative_error", "bar", "holds"} <= set(row) for row in rows)
    for row in rows:
        assert row["holds"] == (abs(row["predicted"] / row["published"] - 1) <= row["bar"])
        assert row["holds"] or row["explained"], row["check"]
        assert (row["verdict"] == "forecast") == row["check"].startswith("own engine")
    failing = {row["check"]: row["verdict"] for row in rows if not row["holds"]}
    assert failing == {
        "ISCA: 1W, s": "explained", "ISCA: step, from the trace alone": "calibrated",
        "report: GPU-hours of the extension": "explained", "own engine, layer: step, s": "forecast",
    }  # fmt: skip
    assert {row["check"] for row in rows if row["restates"]} == {
        "ISCA: tokens a day, 1e9", "ISCA: MFU causal", "ISCA: MFU full", "report: GPU-hours per 1T tokens",
    }  # fmt: skip
    for row in rows:
        assert row["independent"] == (
            row["verdict"] != "forecast" and not row["restates"] and "1F1B" not in row["check"]
            and row["verdict"] != "calibrated"
        ), row["check"]  # fmt: skip


def test_what_rows_within_their_bars_rest_on_is_told():
    rows = [Row(f"row {n}", 100.0, 100.0, 0.03) for n in range(3)]
    rows += [Row("same", 100.0, 100.0, 0.03, restates="row 0"), Row("fit", 100.0, 100.0, 0.03, calibrated=True)]
    rows += [Row("wrong", 100.0, 90.0, 0.03), Row("later", 100.0, 100.0, 0.03, forecast=True)]
    said = independence(rows)
    assert said.startswith("5 rows are within their bars, 3 of them independent: same restate")
    assert said.endswith("fitted to fit")


def test_what_the_calibration_was_fitted_to_is_not_explained():
    row = Row("row", 100.0, 90.0, 0.03, "words", effect=10.0, calibrated=True)
    assert row.verdict == "calibrated" and not row.independent


@pytest.fixture(scope="module")
def by_check():
    return {row.check: row for row in all_rows()}


def test_the_extensions_hours_hang_on_one_number_that_is_not_published(by_check):
    """Each choice that the report leaves open with its size; one of them alone, a whole number of ranks, has to fit."""
    row = by_check["report: GPU-hours of the extension"]
    assert abs((row.predicted + row.effect) / row.published - 1) <= row.bar
    assert "over twice as many" in row.explained and "stretches in order" in row.explained
    assert "32K over 16 ranks instead of 8" in row.explained and "says of neither" in row.explained


def steps(kind, seconds):
    return [SimpleNamespace(step=Action(kind, 0, 0), start=0.0, end=seconds)]


def two_ends(first, middle) -> Any:
    """A plan of three ranks; each of 1F, 1B and 1W by its seconds at the ends and in the middle."""

    def rank(table):
        return [timed for kind, seconds in zip("FBW", table, strict=True) for timed in steps(kind, seconds)]

    return SimpleNamespace(timeline=SimpleNamespace(ranks=[rank(first), rank(middle), rank(first)]))


@pytest.mark.parametrize(
    ("ends", "middle", "said", "explains"),
    [
        ((1.13, 1.99, 0.48), (1.13, 1.99, 0.24), "all three are within 10%", True),
        ((0.80, 1.99, 0.48), (1.13, 1.99, 0.24), "no mean between the two has all three within 10%", False),
    ],
)
def test_ranks_that_explain_1w_must_fit_1f_and_1b_as_well(ends, middle, said, explains):
    effect = _weights_alone(two_ends(ends, middle))
    assert said in effect.words and "1F" in effect.words and "1B" in effect.words
    assert (effect.size > 0) == explains


@pytest.mark.parametrize(
    ("predicted", "words", "effect", "verdict"),
    [
        (97.1, "", 0.0, "yes"),
        (90.0, "", 20.0, "NO"),  # a size without a name
        (90.0, "words alone", 0.0, "NO"),
        (90.0, "too small", 6.9, "NO"),
        (90.0, "just enough", 7.1, "explained"),
        (90.0, "more than enough", 50.0, "explained"),
        (90.0, "the wrong way", -50.0, "NO"),
        (110.0, "the other way", -8.0, "explained"),
    ],
)
def test_an_effect_explains_what_its_size_brings_within_the_bar(predicted, words, effect, verdict):
    assert Row("row", 100.0, predicted, 0.03, words, effect).verdict == verdict


def test_the_pair_is_predicted_without_the_trace(by_check):
    """Only the published side of the trace's rows comes from the calibration file."""
    pair = by_check["trace: pair of 4 layers, ms"]
    assert pair.published == 129.012 and pair.predicted != pair.published
