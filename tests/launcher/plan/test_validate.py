import json

import pytest

from launcher.__main__ import main
from launcher.plan.validate import all_rows
from parallel.plan.published import Row


def test_rows_and_what_does_not_hold(capsys):
    assert main(["plan", "--validate", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"check", "published", "predicted", "relative_error", "bar", "holds"} <= set(row) for row in rows)
    for row in rows:
        assert row["holds"] == (abs(row["predicted"] / row["published"] - 1) <= row["bar"])
        assert row["holds"] or row["explained"], row["check"]
        assert row["verdict"] in ("yes", "explained", "forecast"), row["check"]
        assert (row["verdict"] == "forecast") == row["check"].startswith("own engine")
    failing = {row["check"] for row in rows if not row["holds"]}
    assert failing == {
        "ISCA: 1W, s", "ISCA: step, from the trace alone", "report: GPU-hours of the extension",
        "own engine, layer: step, s",
    }  # fmt: skip


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


def test_the_pair_is_predicted_without_the_trace():
    """Only the published side of the trace's rows comes from the calibration file."""
    rows = {row.check: row for row in all_rows()}
    pair = rows["trace: pair of 4 layers, ms"]
    assert pair.published == 129.012 and pair.predicted != pair.published
