from dataclasses import replace

import pytest

from parallel.plan.hardware import HardwareError
from parallel.plan.kernels import Calibration, Machine
from tests.parallel.plan.jobs import h800

# DeepGEMM, README of its first release, H800: M, N, K -> TFLOPS
DENSE = {
    (4096, 2112, 7168): 1058,
    (4096, 24576, 1536): 990,
    (4096, 32768, 512): 590,
    (4096, 7168, 16384): 1358,
    (4096, 4096, 7168): 1304,
    (4096, 7168, 2048): 1025,
}
GROUPED = {(8192, 4096, 7168): 1297, (8192, 7168, 2048): 1099}  # 4 groups, M each


@pytest.mark.parametrize("shape", DENSE)
def test_products_against_deepgemm(shape):
    m, n, k = shape
    seconds = Machine(h800(), 132).gemm(m, n, k, fp8=True)
    assert 2 * m * n * k / seconds / 1e12 == pytest.approx(DENSE[shape], rel=0.055)


@pytest.mark.parametrize("shape", GROUPED)
def test_grouped_products_against_deepgemm(shape):
    m, n, k = shape
    seconds = Machine(h800(), 132).gemm(4 * m, n, k, fp8=True, kind="grouped_gemm")
    assert 2 * 4 * m * n * k / seconds / 1e12 == pytest.approx(GROUPED[shape], rel=0.055)


def test_fewer_sms_are_whole_waves_slower():
    """128 tiles are one wave on 132 SMs and two on 112."""
    full, fewer = (Machine(h800(), sms).gemm(4096, 512, 7168, fp8=True) for sms in (132, 112))
    assert fewer == pytest.approx(2 * full)


def test_calibration_scales_its_class_alone():
    plain, slow = (Machine(h800(), 132, Calibration("x", factors)) for factors in ({}, {"linear_gemm": 2.0}))
    assert slow.gemm(256, 256, 256, fp8=True) == 2 * plain.gemm(256, 256, 256, fp8=True)
    assert slow.stream("norm", 1e9) == plain.stream("norm", 1e9)
    assert slow.grouped(256, 256, 256, fp8=True, groups=2) == plain.grouped(256, 256, 256, fp8=True, groups=2)


def test_bf16_takes_twice_the_time():
    machine = Machine(h800(), 132)
    one, two = (machine.gemm(4096, 4096, 16384, fp8=fp8) for fp8 in (True, False))
    assert 1.9 < two / one < 2.1


@pytest.mark.parametrize(
    ("there", "expert", "left"), [(132, 64, 112), (132, 1, 132), (40, 2, 20), (20, 2, 20), (1, 2, 1)]
)
def test_the_all_to_all_takes_sms_only_where_there_are_enough(there, expert, left):
    """A CPU's threads are its SMs: 20 fewer were none, or less."""
    hardware = replace(h800(), num_sms=there)
    machine = Machine.beside_all_to_all(hardware, expert=expert)
    assert machine.num_sms == left and machine.gemm(64, 64, 64, fp8=False) > 0


def test_fp32_products_run_at_their_own_peak():
    """67 of 989 TFLOPS, without TF32, which torch does not use unasked."""
    bf16, fp32 = (Machine(h800(), 132, fp32=wide) for wide in (False, True))
    ratio = 989.4 / 67
    assert fp32.gemm(4096, 4096, 4096, fp8=False) == pytest.approx(
        ratio * bf16.gemm(4096, 4096, 4096, fp8=False), rel=0.1
    )
    assert fp32.attention(1e12, backward=True) == pytest.approx(ratio * bf16.attention(1e12, backward=True))
    assert fp32.gemm(256, 256, 256, fp8=True) == bf16.gemm(256, 256, 256, fp8=True)
    with pytest.raises(HardwareError, match="H800 has no fp32_flops: add to its file"):
        Machine(replace(h800(), fp32_flops=None), 132, fp32=True)
