"""Hops as arithmetic, and that the dispatchers create these groups and use them in this order."""

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from parallel.expert.collective import CollectiveDispatcher
from parallel.expert.flat import FlatDispatcher
from parallel.expert.hops import ALL, memberships, stages
from parallel.pipeline.phases import TRANSFERS
from tests.distributed import run_distributed
from tests.parallel.expert.routings import EXPERTS, Case, routing


def test_rails_join_equal_places_of_the_nodes() -> None:
    found = memberships(range(100, 112), 4)
    assert list(found[0]) == ["dispatch rail", "dispatch node", "combine node", "combine rail"]
    assert found[6]["dispatch rail"] == found[6]["combine rail"] == (102, 106, 110)
    assert found[6]["dispatch node"] == found[6]["combine node"] == (104, 105, 106, 107)
    for me, groups in enumerate(found):
        assert all(100 + me in ranks for ranks in groups.values())
        for hop, ranks in groups.items():
            assert all(found[rank - 100][hop] == ranks for rank in ranks)


def test_every_transfer_of_a_dispatcher_with_collectives_has_stages() -> None:
    for dispatcher in ("flat", "collective"):
        assert all(stages(dispatcher, kind) for kind in TRANSFERS)
    assert not any(stages(dispatcher, kind) for dispatcher in ("native", "native_host", "deepep") for kind in TRANSFERS)


def used(dispatcher: str) -> tuple[list[tuple[int, ...]], dict[str, list[tuple[int, ...]]]]:
    """Groups that a dispatcher creates, and those of the collectives of each kind of transfer, repeats left out."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world = dist.group.WORLD
    assert world is not None
    created: list[tuple[int, ...]] = []
    seen: list[tuple[int, ...]] = []
    new_group, all_to_all = dist.new_group, dist.all_to_all_single

    def create(ranks: list[int], **options: Any) -> Any:
        created.append(tuple(ranks))
        return new_group(ranks, **options)

    def send(*tensors: Any, group: Any, **options: Any) -> Any:
        ranks = tuple(dist.get_process_group_ranks(group))
        seen.extend([ranks] * (seen[-1:] != [ranks]))
        return all_to_all(*tensors, group=group, **options)

    dist.new_group, dist.all_to_all_single = create, send  # type: ignore[assignment]
    tested: Any = FlatDispatcher(world, EXPERTS)
    if dispatcher == "collective":
        tested = CollectiveDispatcher(world, EXPERTS, ranks_per_node=2)
    given, found = routing(Case((6,)), dist.get_rank()), {}
    sent = tested.dispatch(given.x, given.ids, given.weights).wait()
    found["dispatch"] = seen.copy()
    for kind, start in (
        ("combine", lambda: tested.combine(sent.rows_RD, sent.handle)),
        ("combine_grad", lambda: tested.dispatch(given.x, handle=sent.handle)),
        ("dispatch_grad", lambda: tested.combine(sent.rows_RD, sent.handle, sent.weights_R)),
    ):
        seen.clear()
        start().wait()
        found[kind] = seen.copy()
    dist.barrier()
    dist.destroy_process_group()
    return created, found


@pytest.mark.parametrize("dispatcher", ["flat", "collective"])
def test_the_dispatcher_uses_these_hops_in_this_order(dispatcher: str) -> None:
    groups = memberships(range(4), 2)
    for rank, (created, found) in enumerate(run_distributed(4, used, dispatcher)):
        assert created == (list(groups[rank].values()) if dispatcher == "collective" else [])
        of = {**groups[rank], ALL: (0, 1, 2, 3)}
        assert found == {kind: [of[hop] for hop in stages(dispatcher, kind)] for kind in TRANSFERS}
