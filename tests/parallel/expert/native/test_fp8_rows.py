"""FP8 rows: every value against the nearest E4M3 number, and the back end with them."""

import pytest
import torch

from parallel.expert.native import fp8_rows
from parallel.expert.native.dispatcher import Geometry, NativeConfig
from parallel.expert.native.host import NativeHostDispatcher
from tests.parallel.expert.native.reference import arrived, on_threads, routing


@pytest.mark.parametrize("hidden", [128, 256, 64, 200])
def test_scale_is_the_least_power_of_two_and_rounding_is_nearest(hidden: int) -> None:
    x = torch.randn(50, hidden) * torch.exp2(torch.randint(-20, 20, (50, 1)))
    x[0], x[1, :10] = 0, -448.0
    x = x.bfloat16()
    back = fp8_rows.unpack(fp8_rows.pack(x), hidden=hidden, dtype=torch.float32)
    for start in range(0, hidden, fp8_rows.TILE):
        tile, out = x[:, start : start + 128].double(), back[:, start : start + 128].double()
        largest = tile.abs().amax(1, keepdim=True)
        scale = torch.exp2(torch.ceil(torch.log2((largest / 448).clamp_min(2.0**-126))))
        scale[largest == 0] = 1
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        codes = codes[codes.isfinite()]
        nearest = (tile[..., None] / scale[..., None] - codes).abs().amin(-1) * scale
        assert torch.equal((out - tile).abs(), nearest)


def test_not_a_number_stays_one() -> None:
    x = torch.tensor([[float("nan"), float("inf"), 1.0] + [0.5] * 125])
    back = fp8_rows.unpack(fp8_rows.pack(x), hidden=128, dtype=torch.float32)
    assert back[0, :2].isnan().all()


def test_rows_arrive_as_packed() -> None:
    sent = [routing(r, tokens=11, hidden=256, experts=8, top_k=3, dtype=torch.bfloat16) for r in range(4)]
    geometry = Geometry(num_ranks=4, num_nodes=2, num_experts=8, hidden_size=256, top_k=3)
    dispatchers = NativeHostDispatcher.in_process(geometry, NativeConfig(dispatch_wire="fp8", timeout_seconds=60))
    got = on_threads(dispatchers, lambda d: d.dispatch(*vars(sent[d.rank]).values()).wait())
    for rank, result in enumerate(got):
        rows, weights, counts = arrived(sent, rank, 8)
        expected = fp8_rows.unpack(fp8_rows.pack(rows), hidden=256, dtype=torch.bfloat16)
        assert torch.equal(result.rows_RD, expected) and torch.equal(result.weights_R, weights)
        assert result.counts == counts and result.rows_RD.dtype == torch.bfloat16
    counters = [dispatcher.machine.counters() for dispatcher in dispatchers]
    per_token = {c["dispatch_rail_bytes"] / c["dispatch_rail_tokens"] for c in counters}
    assert per_token == {16 + 48 + 256 + 16}  # header, 3 copies of 12 bytes rounded up, values, exponents rounded up
    for dispatcher in dispatchers:
        dispatcher.close()
