import pytest

from parallel.expert.cost import Links, seconds
from parallel.plan.kernels import DEEPEP_SMS, LINK_SHARE, Machine
from parallel.plan.layers import PHASES, layer_bill, transfers
from tests.parallel.plan.jobs import h800, v3_layer


def test_transfers_are_those_of_the_cost_model():
    shape, machine = v3_layer(), Machine(h800(), 132)
    found = transfers(shape, machine, sms=DEEPEP_SMS)
    expected = seconds(shape.workload(fp8=True), Links(LINK_SHARE * 50e9, LINK_SHARE * 160e9))
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
