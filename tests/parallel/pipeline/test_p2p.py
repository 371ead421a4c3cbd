"""Messages between two processes: right whatever the order of consumption, and a silent peer is named in time."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.mesh import Groups, Mesh
from parallel.pipeline.actions import Message
from parallel.pipeline.p2p import Mailbox, PipelineError, incoming_messages
from parallel.pipeline.schedules import build
from tests.distributed import run_distributed

TIMEOUT_SECONDS = 2
MICROBATCHES = 9  # more than the mailbox posts ahead


def shape(message: Message) -> tuple[int, ...]:
    """A shape of its own for every micro-batch."""
    return (message.microbatch + 1, 3)


def tensor(message: Message) -> torch.Tensor:
    return torch.full(shape(message), float(10 * message.microbatch + (message.kind == "B")))


def mailbox(mesh: Mesh, groups: Groups) -> Mailbox:
    schedule = build("1f1b", num_ranks=2, num_microbatches=MICROBATCHES)
    incoming = incoming_messages(schedule, mesh.pipeline_rank)
    return Mailbox(
        schedule, mesh, groups, incoming=incoming, shape=shape, dtype=torch.float32, device=torch.device("cpu")
    )


def exchange(mesh: Mesh, groups: Groups, order: list[int]) -> list[bool]:
    """Every activation down and every gradient up at once; received in `order`, sent as the schedule says."""
    box, received = mailbox(mesh, groups), []
    kinds = ("F", "B") if mesh.rank == 0 else ("B", "F")
    stages = {"F": 1, "B": 0}
    for number in range(MICROBATCHES):
        message = Message(kinds[0], stages[kinds[0]], number)
        box.send(message, tensor(message))
    for number in order:
        message = Message(kinds[1], stages[kinds[1]], number)
        received.append(torch.equal(box.receive(message), tensor(message)))
    box.finish()
    return received


def one_rank(orders: list[list[int]]) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = Mesh(ParallelConfig(pipeline=2), dist.get_rank())
    groups = Groups(mesh, [(0,), (1,)], timeout=timedelta(seconds=TIMEOUT_SECONDS))
    result: dict[str, Any] = {"received": [exchange(mesh, groups, order) for order in orders]}
    dist.barrier()
    box, start = mailbox(mesh, groups), time.monotonic()
    if mesh.rank == 1:  # rank 0 sends micro-batch 0 and then nothing
        box.receive(Message("F", 1, 0))
        try:
            box.receive(Message("F", 1, 2))
        except PipelineError as error:
            result["error"] = str(error)
    else:
        box.send(Message("F", 1, 0), tensor(Message("F", 1, 0)))
    result["seconds"] = time.monotonic() - start
    dist.barrier()  # alive all the while
    return result


ORDERS = [list(range(MICROBATCHES)), list(reversed(range(MICROBATCHES))), [4, 0, 8, 1, 7, 2, 6, 3, 5]]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(2, one_rank, ORDERS)


@pytest.mark.parametrize("index", range(len(ORDERS)))
def test_messages_arrive_right_in_any_order_of_consumption(ranks: Any, index: int) -> None:
    """Both directions between one pair of ranks at the same time, each message with a shape of its own."""
    for rank in ranks:
        assert rank["received"][index] == [True] * MICROBATCHES


def test_a_peer_that_never_sends_is_named_within_the_timeout(ranks: Any) -> None:
    """The group's 2 seconds, not the 60 of the world."""
    error = ranks[1]["error"]
    assert error.startswith("rank 1 ")
    assert "the activation for stage 1 micro-batch 2 from pipeline rank 0 (rank 0)" in error
    assert TIMEOUT_SECONDS - 0.1 <= ranks[1]["seconds"] < TIMEOUT_SECONDS + 10
