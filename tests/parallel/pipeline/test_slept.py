"""The slept device against times worked out by hand."""

import time

import pytest

from parallel.pipeline.slept import SleptDevice

MS = 1e-3


def test_pieces_follow_each_other_whatever_the_rank_does_meanwhile() -> None:
    device, start = SleptDevice(), time.perf_counter()
    device.compute(200 * MS)
    time.sleep(150 * MS)  # overhead of the rank while the device is busy
    device.compute(200 * MS)
    device.synchronize()
    assert 400 * MS <= time.perf_counter() - start < 550 * MS


def test_nothing_starts_before_its_input_is_here() -> None:
    device, start = SleptDevice(), time.perf_counter()
    device.compute(5 * MS)
    time.sleep(20 * MS)  # waiting for a message longer than the device is busy
    device.compute(20 * MS)
    device.synchronize()
    assert time.perf_counter() - start >= 40 * MS


def test_after_a_result_has_left_the_rank_is_waited_for() -> None:
    device, start = SleptDevice(), time.perf_counter()
    device.compute(5 * MS)
    device.synchronize()
    time.sleep(20 * MS)
    device.compute(20 * MS)
    device.synchronize()
    assert time.perf_counter() - start >= 45 * MS


def test_a_blocking_device_makes_the_rank_sleep_through_every_piece() -> None:
    device, start = SleptDevice(blocking=True), time.perf_counter()
    device.compute(10 * MS)
    assert time.perf_counter() - start >= 10 * MS
    time.sleep(10 * MS)
    device.compute(10 * MS)
    assert time.perf_counter() - start >= 30 * MS


@pytest.mark.parametrize("serial", [False, True])
def test_transfers_run_beside_computation_unless_serial(serial: bool) -> None:
    device, start = SleptDevice(serial=serial), time.perf_counter()
    device.compute(5 * MS)
    first = device.transfer(20 * MS)
    assert device.transfer(10 * MS) == pytest.approx(first + 10 * MS)
    device.compute(20 * MS)
    device.synchronize()
    now = time.perf_counter()
    assert first - start >= 25 * MS
    assert now - start >= (55 if serial else 25) * MS
    device.compute(1 * MS, after=first + 40 * MS)
    device.synchronize()
    assert time.perf_counter() >= first + 41 * MS
