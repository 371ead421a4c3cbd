"""The average equals the recurrence, whatever happens to the masters meanwhile."""

import threading

import pytest
import torch

from optim.ema import EMA


def test_the_average_is_the_recurrence_in_fp64() -> None:
    draw = torch.Generator().manual_seed(0)
    masters = [torch.randn(1000, generator=draw), torch.randn(7, generator=draw)]
    ema = EMA(masters, decay=0.9)
    expected = [master.double() for master in masters]
    for _ in range(50):
        for master in masters:
            master.add_(torch.randn(master.shape, generator=draw))
        ema.update()
        expected = [0.9 * old + 0.1 * new.double() for old, new in zip(expected, masters, strict=True)]
        for master in masters:
            master.add_(1e3).sub_(1e3)  # changes while the thread may be at work
    for average, wanted in zip(ema.averages(), expected, strict=True):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), wanted, rtol=1e-5, atol=1e-5)


def test_an_update_does_not_wait_for_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    master, gate = torch.zeros(4), threading.Event()
    ema = EMA([master], decay=0.5)
    plain = ema._average
    monkeypatch.setattr(ema, "_average", lambda copied: (gate.wait(20), plain(copied))[1])
    master.fill_(2.0)
    ema.update()  # returns although the average is held up
    master.fill_(100.0)
    gate.set()
    assert ema.averages()[0].tolist() == [1.0] * 4


def test_an_average_that_fails_is_raised() -> None:
    ema = EMA([torch.zeros(4)], decay=0.5)
    ema._averages = [torch.zeros(3)]
    ema.update()
    with pytest.raises(RuntimeError):
        ema.wait()


def test_restart_forgets() -> None:
    master = torch.zeros(3)
    ema = EMA([master], decay=0.5)
    master.fill_(4.0)
    ema.update()
    ema.restart()
    assert torch.equal(ema.averages()[0], master)


def test_a_wrong_decay_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        EMA([torch.zeros(1)], decay=1.0)
