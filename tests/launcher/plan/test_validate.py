import json

from launcher.__main__ import main
from launcher.plan.validate import all_rows


def test_rows_and_what_does_not_hold(capsys):
    assert main(["plan", "--validate", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all({"check", "published", "predicted", "relative_error", "bar", "holds"} <= set(row) for row in rows)
    for row in rows:
        assert row["holds"] == (abs(row["predicted"] / row["published"] - 1) <= row["bar"])
        assert row["holds"] or row["explained"], row["check"]
    failing = {row["check"] for row in rows if not row["holds"]}
    assert failing == {
        "ISCA: 1W, s", "ISCA: step, from the trace alone", "report: GPU-hours of the extension",
        "own engine, layer: step, s",
    }  # fmt: skip


def test_the_pair_is_predicted_without_the_trace():
    """Only the published side of the trace's rows comes from the calibration file."""
    rows = {row.check: row for row in all_rows()}
    pair = rows["trace: pair of 4 layers, ms"]
    assert pair.published == 129.012 and pair.predicted != pair.published
