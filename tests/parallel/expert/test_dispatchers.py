"""What the configuration names is what is constructed, and what does not fit is refused in one line."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from launcher.check.layout import check_nodes
from launcher.check.run import check_choices
from launcher.config import compose
from model.dispatch import LocalDispatcher
from parallel.config import DISPATCHERS, ParallelConfig, wire_problems
from parallel.expert.collective import CollectiveDispatcher
from parallel.expert.deepep import DeepEPError
from parallel.expert.dispatchers import DispatcherError, Tokens, build_dispatcher, ranks_per_node
from parallel.expert.flat import FlatDispatcher
from parallel.expert.placement import PlacementError
from tests.distributed import run_distributed

TOKENS = Tokens(num_experts=8, top_k=2, hidden_size=16)
TIMEOUT = timedelta(seconds=60)


@pytest.mark.parametrize(
    ("group", "host", "expected"), [(8, 4, 4), (8, 8, 8), (2, 4, 2), (4, 1, 1), (4, None, 4), (64, 8, 8)]
)
def test_groups_of_whole_nodes_or_inside_one(group: int, host: int | None, expected: int) -> None:
    assert ranks_per_node(ParallelConfig(ranks_per_node=host), group) == expected


@pytest.mark.parametrize(("group", "host", "fits"), [(6, 4, "4 or 8"), (3, 8, "2 or 4")])
def test_groups_across_nodes_are_refused(group: int, host: int, fits: str) -> None:
    with pytest.raises(PlacementError, match=f"expert={group} .*ranks_per_node={host}: use parallel.expert={fits}$"):
        ranks_per_node(ParallelConfig(ranks_per_node=host), group)


def construct() -> tuple[str, ...]:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    world: Any = dist.group.WORLD
    alone: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    config = ParallelConfig(ranks_per_node=1, dispatch_wire="fp8")
    made = [
        build_dispatcher(config, world, TOKENS, timeout=TIMEOUT),
        build_dispatcher(ParallelConfig(dispatcher="flat"), world, TOKENS, timeout=TIMEOUT),
        build_dispatcher(config, alone, TOKENS, timeout=TIMEOUT),
    ]
    with pytest.raises(DispatcherError) as caught:
        build_dispatcher(ParallelConfig(dispatcher="rsync"), world, TOKENS, timeout=TIMEOUT)
    with pytest.raises(DispatcherError, match="needs the most tokens of a rank"):
        build_dispatcher(ParallelConfig(dispatcher="deepep"), world, TOKENS, timeout=TIMEOUT)
    with pytest.raises(DeepEPError) as missing:
        sized = replace(TOKENS, max_tokens=64)
        build_dispatcher(ParallelConfig(dispatcher="deepep"), world, sized, timeout=TIMEOUT)
    dist.barrier()
    return *(type(dispatcher).__name__ for dispatcher in made), str(caught.value), str(missing.value)


NO_DEEPEP = "dispatcher=deepep: deep_ep is not installed"


def test_names() -> None:
    classes = tuple(made.__name__ for made in (CollectiveDispatcher, FlatDispatcher, LocalDispatcher))
    words = "parallel.dispatcher=rsync: use flat, collective, native_host, native, deepep"
    for *names, unknown, missing in run_distributed(2, construct):
        assert (*names, unknown) == (*classes, words)
        assert missing.startswith(NO_DEEPEP) and "2.30.4" in missing and "\n" not in missing, missing


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"dispatcher": "flat", "dispatch_wire": "fp8"},
         "parallel.dispatch_wire=fp8 needs parallel.dispatcher=collective, not flat"),
        ({"dispatcher": "native_host", "dispatch_wire": "bf16", "dispatch_grad_wire": "bf16"},
         "parallel.dispatch_wire=bf16 with native_host: use model or fp8"),
        ({"dispatcher": "native_host", "dispatch_wire": "fp8"},
         "parallel.dispatch_grad_wire=model with native_host: use fp8, as parallel.dispatch_wire"),
        ({"dispatcher": "deepep", "combine_wire": "fp32"}, "parallel.combine_wire=fp32 with deepep: use model or bf16"),
    ],
)  # fmt: skip
def test_wires_that_a_dispatcher_does_not_have(chosen: dict[str, str], message: str) -> None:
    assert wire_problems(ParallelConfig(**chosen)) == [message]  # type: ignore[arg-type]


def sms_of(name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a back end that needs a GPU is told."""
    seen: dict[str, Any] = {}
    record = lambda *_, **given: seen.update(given)  # noqa: E731
    monkeypatch.setattr("parallel.expert.deepep.DeepEPDispatcher", record)
    monkeypatch.setattr("parallel.expert.native.gpu.NativeGpuDispatcher", record)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    config = ParallelConfig(dispatcher=name, num_sms=6)
    build_dispatcher(config, None, replace(TOKENS, max_tokens=64), timeout=TIMEOUT)  # type: ignore[arg-type]
    return seen["num_sms"]


@pytest.mark.parametrize("name", ["native", "deepep"])
def test_sms_are_configured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sms_of(name, monkeypatch) == 6


def test_the_default_is_collective_in_code_and_files() -> None:
    assert ParallelConfig().dispatcher == "collective"
    for path in (Path(__file__).parents[3] / "configs" / "parallel").glob("*.yaml"):
        parallel = yaml.safe_load(path.read_text())
        dispatcher = "flat" if path.stem == "tiny_dualpipe" else "collective"  # the demo's: one node, cheaper there
        assert (parallel["dispatcher"], parallel["num_sms"]) == (dispatcher, ParallelConfig().num_sms), path.name


def test_the_check_of_a_run_says_the_same() -> None:
    run = compose(["experiment=tiny"])
    assert check_nodes(run) == []
    parallel = ParallelConfig(expert=4, data=8, dispatcher="collective", ranks_per_node=3)
    (message,) = check_nodes(replace(run, parallel=parallel))
    assert message.startswith(
        "parallel.expert=4 is neither whole nodes of parallel.ranks_per_node=3 nor inside one: use "
    )
    (odd,) = check_nodes(replace(run, parallel=replace(run.parallel, dispatcher="deepep", num_sms=21)))
    assert odd == "parallel.num_sms=21: deepep takes SMs in pairs, use 22"
    (choice,) = check_choices(replace(run, parallel=replace(parallel, dispatcher="rsync")))
    assert all(name in choice for name in DISPATCHERS)
