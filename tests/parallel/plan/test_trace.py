import gzip
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
    assert calibrate(found, {"norm": 20e-6, "dispatch": 0.0}, source="x").factors == {"norm": pytest.approx(1.5)}


def test_a_predicted_class_without_kernels_is_refused_with_the_longest_unknown_names(tmp_path):
    events = [event("layer_norm", 0, 30), event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", 0, 500)]
    events += [event(f"mystery_{i}", 600 + i, i) for i in range(1, 5)]
    found = read_trace(write(tmp_path / "t.json", events), layers=1, local_experts=1)
    with pytest.raises(HardwareError) as error:
        calibrate(found, dict.fromkeys(("norm", "dispatch", "combine", "elementwise"), 1e-5), source="trace t.json")
    said = str(error.value)
    assert said.startswith("trace t.json: no kernels of dispatch, combine, which the shapes have")
    assert "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage) (0.5 ms), mystery_4 (0.004 ms), mystery_3" in said
    assert "mystery_2" not in said and "\n" not in said


def test_a_class_is_missing_though_every_name_is_known(tmp_path):
    found = read_trace(write(tmp_path / "t.json", [event("layer_norm", 0, 30)]), layers=1, local_experts=1)
    with pytest.raises(HardwareError, match=r"no kernels of attention, .* every kernel is of another class"):
        calibrate(found, {"norm": 1e-5, "attention": 1.0}, source="x")


@pytest.mark.parametrize(("microseconds", "holds"), [(19, True), (30, False)])
def test_a_little_of_no_known_class_is_elementwise_and_more_is_refused(tmp_path, microseconds, holds):
    events = [event("layer_norm", 0, 980), event("mystery", 980, microseconds)]
    found = read_trace(write(tmp_path / "t.json", events), layers=1, local_experts=1)
    assert found.unknown == {"mystery": pytest.approx(microseconds * 1e-6)}
    assert found.classes["elementwise"] == pytest.approx(microseconds * 1e-6)
    if holds:
        assert calibrate(found, {"norm": 980e-6}, source="x").factors == {"norm": pytest.approx(1)}
    else:
        with pytest.raises(HardwareError, match=r"3% of the kernels' time is of no known class.*mystery \(0.03 ms\)"):
            calibrate(found, {"norm": 980e-6}, source="x")


def test_a_librarys_products_are_the_routers_only_beside_products_with_names(tmp_path):
    """cuBLAS computes every product of a BF16 run, and only the router's where FP8 has kernels of its own."""
    library = event("sm90_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize128x128x64_cublas", 0, 40)
    alone = read_trace(write(tmp_path / "a.json", [library]), layers=1, local_experts=1).classes
    assert (alone["linear_gemm"], alone["elementwise"]) == pytest.approx((40e-6, 0))
    fp8 = event("fp8_ptp128c::GemmKernel", 50, 70)
    beside = read_trace(write(tmp_path / "b.json", [library, fp8]), layers=1, local_experts=1).classes
    assert (beside["linear_gemm"], beside["elementwise"]) == pytest.approx((70e-6, 40e-6))


def test_collectives_of_no_layer_count_nowhere(tmp_path):
    events = [event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 0, 900), event("layer_norm", 0, 30)]
    found = read_trace(write(tmp_path / "t.json", events), layers=1, local_experts=1)
    assert sum(found.classes.values()) == pytest.approx(30e-6) and not found.unknown
    assert found.transfer_busy == 0 and found.compute_busy == pytest.approx(30e-6)


def test_layers_are_counted_by_the_backwards_of_attention(tmp_path):
    names = ("flash::FlashAttnBwd<flash::Mainloop>", "flash::FlashAttnBwdPreprocess<1>", "compute_attn_ws")
    events = [event(name, 100 * i + 10 * j, 5) for i in range(3) for j, name in enumerate(names)]
    path = write(tmp_path / "t.json", events)
    assert read_trace(path, local_experts=1).layers == 3
    with pytest.raises(HardwareError, match="3 layers by the backwards of attention in it, not 4"):
        read_trace(path, layers=4, local_experts=1)
    with pytest.raises(HardwareError, match="by which its layers are counted"):
        read_trace(write(tmp_path / "none.json", [event("layer_norm", 0, 30)]), local_experts=1)


@pytest.mark.parametrize(("layers", "local"), [(2, 1), (1, 5)])
def test_weight_gradients_of_other_layers_or_experts_are_refused(tmp_path, layers, local):
    weights = [event("fp8_dptp128c_acc::GemmKernel", 10 * i, 10) for i in range(9)]
    path = write(tmp_path / "t.json", weights)
    assert read_trace(path, layers=1, local_experts=1).layers == 1
    with pytest.raises(HardwareError, match="9 kernels of weight gradients are not as many in each of"):
        read_trace(path, layers=layers, local_experts=local)


def test_a_gzipped_trace_and_events_that_have_no_time(tmp_path):
    good = event("layer_norm", 0, 30)
    timeless = {key: value for key, value in good.items() if key != "ts"}
    plain = write(tmp_path / "t.json", [good, timeless, {**good, "dur": None}, {**good, "ts": "soon"}])
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    for file in (plain, path):
        found = read_trace(file, layers=1, local_experts=1)
        assert found.num_kernels == 1 and found.classes["norm"] == pytest.approx(30e-6)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(HardwareError, match=r"t\.json\.gz: not a profiler trace"):
        read_trace(path, layers=1, local_experts=1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": []}', '{"traceEvents": [{"cat": "cpu_op"}]}'])
def test_what_is_no_trace_is_refused(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(HardwareError, match=r"t\.json"):
        read_trace(path, layers=4, local_experts=4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void flash::compute_attn_ws<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("dpsk::grouped_gemm::cuda::utils::transpose<512>", "quantise"),
        ("void cuda::per_token_cast_to_fp8", "quantise"),
        ("ncclDevKernel_Broadcast_RING_LL", "outside"),
        ("void deep_ep::intranode::dispatch<4, 768>", "dispatch"),
        ("void deep_ep::intranode::cached_notify_combine<4>", "wait"),
        ("ep_combine_kernel", "combine"),
        ("cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<1>>", "grouped_gemm"),
        ("void deep_gemm::fp8_gemm_kernel<1u, (deep_gemm::GemmType)1>", "grouped_gemm"),
        ("void deep_gemm::fp8_gemm_kernel<1u, (deep_gemm::GemmType)0>", "gemm"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "library"),
        ("void at::native::vectorized_elementwise_kernel", "elementwise"),
        ("ncclDevKernel_SendRecv", "unknown"),
        ("somebody_elses_kernel", "unknown"),
    ],
)
def test_names(name, kind):
    assert class_of(name) == kind
