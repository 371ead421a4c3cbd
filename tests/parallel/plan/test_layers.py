from dataclasses import replace

import pytest

from parallel.expert.cost import Links, seconds
from parallel.plan.kernels import DEEPEP_SMS, LINK_SHARE, Machine
from parallel.plan.layers import PHASES, layer_bill, transfers
from tests.parallel.plan.jobs import h800, small, v3_layer


def test_transfers_are_those_of_the_cost_model():
    shape, machine = v3_layer(), Machine(h800(), 132)
    found = transfers(shape, machine, sms=DEEPEP_SMS)
    expected = seconds(
        replace(shape.workload(), dtype="fp8", scale_bytes=1), Links(LINK_SHARE * 50e9, LINK_SHARE * 160e9)
    )
    assert (found.dispatch, found.combine) == pytest.approx((expected.dispatch, expected.combine))
    assert found.dispatch_grad == found.combine


def test_fewer_sms_carry_less():
    shape, machine = v3_layer(), Machine(h800(), 132)
    assert transfers(shape, machine, sms=12).dispatch == pytest.approx(
        2 * transfers(shape, machine, sms=DEEPEP_SMS).dispatch
    )


def test_no_expert_axis_no_transfers():
    assert transfers(v3_layer(expert=1), Machine(h800(), 132), sms=20).combine == 0


def test_once_an_expert_costs_twice_as_much_as_once_a_node():
    machine = Machine(h800(), 132)
    flat, node = (transfers(v3_layer(way=way), machine, sms=24).dispatch for way in ("expert", "node"))
    assert flat / node == pytest.approx(2.02, abs=0.03)  # parallel/expert/README.md


def test_recompute_moves_the_forward_into_the_backward():
    machine = Machine(h800(), 132)
    none, attend, layer = (layer_bill(v3_layer(recompute=r), machine, moe=True) for r in ("none", "attend", "layer"))
    assert attend.phase("attend_grad") == pytest.approx(none.phase("attend_grad") + none.phase("attend"))
    assert attend.phase("experts_grad") == none.phase("experts_grad")
    assert layer.phase("experts_grad") == pytest.approx(none.phase("experts_grad") + none.phase("experts"))
    assert all(none.phase(phase) == layer.phase(phase) for phase in PHASES[:3])


def test_bf16_has_nothing_to_quantise():
    bill = layer_bill(v3_layer(fp8=False), Machine(h800(), 132), moe=True)
    assert bill.kind("quantise") == 0 and bill.kind("grouped_gemm") > 0


def test_a_row_takes_the_bytes_of_its_wire():
    """parallel.expert.wire: FP8 with an exponent for each 128 values begun, whatever the width."""
    assert [v3_layer().row_bytes(wire) for wire in ("fp8", "bf16", "fp32")] == [7168 + 56, 2 * 7168, 4 * 7168]
    odd = replace(v3_layer().model, hidden_size=192)
    assert v3_layer(model=odd).row_bytes("fp8") == 192 + 2
    machine = Machine(h800(), 132)
    bf16, fp32 = (transfers(v3_layer(combine_wire=wire), machine, sms=24) for wire in ("bf16", "fp32"))
    assert fp32.combine == 2 * bf16.combine == fp32.dispatch_grad and fp32.dispatch == bf16.dispatch


def test_wires_of_a_run():
    """`model` is the run's own type; sums on the way back travel as `combine_wire` says."""

    def wires(precision, **changes):
        changes = {"dispatch_wire": "model", "dispatch_grad_wire": "model", **changes}
        shape = small(precision=precision).with_parallel(**changes).shape()
        return shape.dispatch_wire, shape.dispatch_grad_wire, shape.combine_wire

    assert wires("fp8") == wires("bf16") == ("bf16",) * 3
    assert wires("fp32") == ("fp32",) * 3
    assert wires("bf16", dispatch_wire="fp8", combine_wire="fp32") == ("fp8", "bf16", "fp32")
    assert wires("fp32", combine_wire="bf16")[2] == "bf16"
    assert wires("fp32", combine_wire="bf16", dispatcher="native")[2] == "fp32"
    assert small().with_parallel(dispatcher="deepep").shape().scale_bytes == 4


def test_fp32_moves_twice_the_bytes():
    bf16, fp32 = (layer_bill(v3_layer(fp8=False, element=n), Machine(h800(), 132), moe=True) for n in (2, 4))
    assert 1.9 < fp32.kind("norm") / bf16.kind("norm") <= 2
