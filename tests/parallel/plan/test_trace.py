import json

import pytest

from parallel.plan.hardware import HardwareError
from parallel.plan.trace import calibrate, class_of, read_trace


def event(name, ts, dur, stream=7):
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "tid": stream}


def write(path, events):
    path.write_text(json.dumps({"deviceProperties": [{"name": "NVIDIA H800"}], "traceEvents": events}))
    return path


def test_classes_busy_times_and_span(tmp_path):
    # one layer with one local expert: weight gradients are shared 2, expert 2, attention 5 by their order
    weights = [event("fp8_dptp128c_acc::GemmKernel", 1000 + 10 * i, 10) for i in range(9)]
    events = [
        event("m_grouped_fp8_ptp128c::GemmKernel", 0, 100),
        event("fp8_ptp128c::GemmKernel", 100, 50),
        event("per_token_cast_to_fp8", 150, 20),
        event("ep::internode::dispatch<false>", 0, 400, 27),
        event("ep::internode::cached_notify", 400, 100, 27),
        event("ep::internode::combine<false>", 500, 300, 27),
        {"ph": "X", "cat": "cpu_op", "name": "flash", "ts": 0, "dur": 9999},
        *weights,
    ]
    found = read_trace(write(tmp_path / "t.json", events), layers=1, local_experts=1)
    assert found.seconds == pytest.approx(1090e-6)
    assert found.classes["grouped_gemm"] == pytest.approx(120e-6)
    assert found.classes["linear_gemm"] == pytest.approx(120e-6)
    assert found.classes["attention"] == 0  # the host's operation is no kernel
    assert (found.classes["dispatch"], found.classes["wait"]) == pytest.approx((400e-6, 100e-6))
    assert found.transfer_busy == pytest.approx(800e-6)
    assert found.compute_busy == pytest.approx((170 + 90) * 1e-6)


def test_products_on_two_streams_count_once(tmp_path):
    events = [event("m_grouped", 0, 100), event("fp8_ptp128c", 0, 100, 7), event("fp8_ptp128c", 50, 100, 23)]
    found = read_trace(write(tmp_path / "t.json", events), layers=1, local_experts=1)
    assert found.classes["linear_gemm"] == pytest.approx(150e-6)


def test_calibration_is_measured_over_predicted(tmp_path):
    found = read_trace(write(tmp_path / "t.json", [event("layer_norm", 0, 30)]), layers=1, local_experts=1)
    assert calibrate(found, {"norm": 20e-6, "attention": 1.0}, source="x").factors == {"norm": pytest.approx(1.5)}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": []}', '{"traceEvents": [{"cat": "cpu_op"}]}'])
def test_what_is_no_trace_is_refused(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(HardwareError, match=r"t\.json"):
        read_trace(path, layers=4, local_experts=4)


def test_names():
    assert class_of("void flash::compute_attn_ws<...>") == "attention"
    assert class_of("dpsk::grouped_gemm::cuda::utils::transpose<512>") == "quantise"
    assert class_of("at::native::add") == "elementwise"
