"""Each saver saves bytes, and its error is what its format costs: the comparison sees which is which."""

from tests.bench.fp8_savers import savers
from tests.model.fp8.test_memory import WIDER


def test_every_saver_saves_and_says_what_it_costs() -> None:
    rows = {row.switch.partition("=")[0]: row for row in savers(WIDER)}
    assert list(rows) == [
        "train.precision", "fp8.input_cache", "fp8.recompute_swiglu", "fp8.attention_cache",
        "parallel.recompute", "optim.moments"
    ]  # fmt: skip
    assert rows["train.precision"].error > 5e-2
    assert all(row.after <= row.before for row in rows.values())
    assert all(rows[name].after < rows[name].before for name in rows if name != "fp8.input_cache")
    # A number changes only where it underflows in its new tile.
    assert rows["fp8.input_cache"].error < 1e-4
    # E4M3 in what both products of the SwiGLU's gradient read; E5M6 before a rounding that there is without it too.
    assert 3e-2 < rows["fp8.recompute_swiglu"].error < 1e-1 and 1e-2 < rows["fp8.attention_cache"].error < 4e-2
    assert rows["parallel.recompute"].error == 0
    assert 0 < rows["optim.moments"].error < 2e-2
