"""The clock: inner phases are theirs, the sum is the wall time, also when something raises."""

import time

import pytest

from launcher.record.clock import BACKWARD, PHASES, PhaseClock
from parallel.pipeline.phases import backward_program, forward_program


def test_inner_phases_are_taken_out_of_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = PhaseClock()
    with clock.phase("messages"):
        now[0] += 1
        with clock.phase("forward"):
            now[0] += 2
            with clock.phase("all_to_all"):
                now[0] += 4
        now[0] += 8
        with pytest.raises(OSError), clock.phase("data"):
            now[0] += 16
            raise OSError
    now[0] += 32
    clock.rows = 7
    assert clock.take_rows() == 7 and clock.take_rows() == 0
    wall, phases, rows = clock.take()
    expected = {"messages": 9.0, "forward": 2.0, "all_to_all": 4.0, "data": 16.0, "other": 32.0}
    assert phases == dict.fromkeys(PHASES, 0.0) | expected
    assert (wall, rows) == (63.0, 7)
    assert clock.take() == (0.0, dict.fromkeys(PHASES, 0.0), 0)


def test_every_phase_of_a_chunk_is_forward_or_backward() -> None:
    forward = {phase.kind for phase in forward_program(3, halves=2)}
    backward = {phase.kind for phase in backward_program(3, halves=2, weights=True)}
    assert backward == set(BACKWARD)
    assert forward.isdisjoint(BACKWARD) and "experts" in forward
