"""Sends that leave when what they carry has been computed, while the rank goes on."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from parallel.pipeline.slept import SleptDevice
from parallel.pipeline.slept_lanes import SleptLanes
from tests.distributed import run_distributed

PIECE = 0.2


class Lanes:
    def __init__(self) -> None:
        self.down, self.up = dist.group.WORLD, dist.new_group()


def one_rank() -> dict[str, float]:
    """Rank 0 issues two pieces and a send after each; rank 1 says when each arrived, on the machine's one clock."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    device = SleptDevice(sends=True)
    lanes = SleptLanes(Lanes(), device)  # type: ignore[arg-type]
    first, second = torch.full((2,), 1.0), torch.full((2,), 2.0)
    dist.barrier()
    found = {}
    if dist.get_rank() == 0:
        found["start"] = time.perf_counter()
        sent = []
        for tensor in (first, second):
            device.compute(PIECE)
            device.result_leaves()
            sent.append(lanes.down.send([tensor], 1, 0))
        found["issued"] = time.perf_counter()
        assert not sent[0].is_completed()
        assert all(one.wait() for one in sent) and all(one.is_completed() for one in sent)
    else:
        for name, value in (("first", 1.0), ("second", 2.0)):
            tensor = torch.zeros(2)
            lanes.down.recv([tensor], 0, 0).wait()
            found[name] = time.perf_counter()
            assert tensor.tolist() == [value, value]
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_a_send_leaves_when_its_tensor_is_computed_and_the_rank_goes_on() -> None:
    sender, receiver = run_distributed(2, one_rank)
    assert sender["issued"] - sender["start"] < PIECE / 2
    assert receiver["first"] - sender["start"] >= PIECE
    assert receiver["second"] - sender["start"] >= 2 * PIECE


class Broken:
    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> None:
        raise RuntimeError("connection closed by peer")


def test_a_send_that_fails_is_raised_where_it_is_waited_for() -> None:
    class Cut:
        down = up = Broken()

    sending = SleptLanes(Cut(), SleptDevice(sends=True)).up.send([torch.zeros(1)], 1, 0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="connection closed"):
        sending.wait()
