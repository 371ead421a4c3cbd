"""FP8 rows: packed and unpacked as the wire defines, and the back end with them."""

import pytest
import torch

from parallel.expert.native import fp8_rows
from parallel.expert.native.dispatcher import Geometry, NativeConfig
from parallel.expert.native.host import NativeHostDispatcher
from parallel.expert.wire import QUANTISER, decode, encode
from tests.parallel.expert.native.reference import arrived, on_threads, routing


@pytest.mark.parametrize("hidden", [128, 256, 64, 200])
def test_unpacks_to_what_the_wire_defines(hidden: int) -> None:
    x = (torch.randn(50, hidden) * torch.exp2(torch.randint(-20, 20, (50, 1)))).bfloat16()
    x[0], x[1, 3] = 0, torch.nan
    packed = fp8_rows.pack(x)
    assert packed.shape[1] % 16 == 0 and packed.shape[1] - hidden - -(-hidden // 128) < 16
    expected = decode(encode(x, "fp8"), "fp8", torch.bfloat16)
    back = fp8_rows.unpack(packed, hidden=hidden, dtype=torch.bfloat16)
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


def test_rows_arrive_as_packed() -> None:
    sent = [routing(r, tokens=11, hidden=256, experts=8, top_k=3, dtype=torch.bfloat16) for r in range(4)]
    geometry = Geometry(num_ranks=4, num_nodes=2, num_experts=8, hidden_size=256, top_k=3)
    dispatchers = NativeHostDispatcher.in_process(geometry, NativeConfig(dispatch_wire="fp8", timeout_seconds=60))
    got = on_threads(dispatchers, lambda d: d.dispatch(*vars(sent[d.rank]).values()).wait())
    again = on_threads(
        dispatchers, lambda d: d.dispatch(QUANTISER.quantise(sent[d.rank].x_TD), handle=got[d.rank].handle).wait()
    )
    for rank, result in enumerate(got):
        assert torch.equal(again[rank].rows_RD, result.rows_RD)  # quantised by the caller
        rows, weights, counts = arrived(sent, rank, 8)
        expected = fp8_rows.unpack(fp8_rows.pack(rows), hidden=256, dtype=torch.bfloat16)
        assert torch.equal(result.rows_RD, expected) and torch.equal(result.weights_R, weights)
        assert result.counts == counts and result.rows_RD.dtype == torch.bfloat16
    counters = [dispatcher.machine.counters() for dispatcher in dispatchers]
    per_token = {c["dispatch_rail_bytes"] / c["dispatch_rail_tokens"] for c in counters}
    assert per_token == {16 + 48 + 256 + 16}  # header, 3 copies of 12 bytes rounded up, values, exponents rounded up
    for dispatcher in dispatchers:
        dispatcher.close()
