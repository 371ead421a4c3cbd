"""Pre-flight checks: a slow, wrong or silent rank is found and named, and nothing is found where all is well."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from launcher.commands import preflight
from launcher.preflight import axes, experts, host, pairs
from launcher.preflight.team import Team
from launcher.preflight.verdict import Nodes, Row, blame, differing, rounds, slow, table
from launcher.runtime import process_group
from parallel.expert.roll_call import ExpertError
from tests.distributed import run_distributed
from tests.launcher.spine import config

ROOT = Path(__file__).parents[3]
FOUR = Nodes(("n1", "n1", "n2", "n2"))
ALL = [pair for met in rounds(4) for pair in met]
SLEEP = 1.2  # of a slow rank, in each exchange
SLOW = 0.025  # share of the median: best of five, 40 times the median, is no work beside these tests


# --- who is to blame (no processes) --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8])
def test_rounds_hold_every_pair_once(number: int) -> None:
    found = [pair for met in rounds(number) for pair in met]
    assert sorted(found) == [(a, b) for a in range(number) for b in range(a + 1, number)]
    assert all(len({rank for pair in met for rank in pair}) == 2 * len(met) for met in rounds(number))


def said(bad_pairs: dict[tuple[int, int], str], tested: list[tuple[int, int]] = ALL) -> list[str]:
    return [one.words for one in blame(bad_pairs, tested, FOUR)]


def test_a_rank_a_pair_and_a_node_are_told_apart() -> None:
    of_two = {pair: "slow" for pair in ALL if 2 in pair}
    assert said(of_two) == ["rank 2 on n2: 3 of its 3 pairs: slow"]
    assert said({(1, 2): "slow"}) == ["between rank 1 on n1 and rank 2 on n2: slow"]
    of_node = {pair: "slow" for pair in ALL if 2 in pair or 3 in pair}
    assert said(of_node) == ["node n2: all its ranks (2, 3): slow"]
    assert said({}) == []
    rails = [(0, 1), (2, 3), (0, 2), (1, 3)]
    assert said({(2, 3): "slow", (0, 2): "slow"}, rails) == ["rank 2 on n2: 2 of its 2 pairs: slow"]


def test_slow_is_relative_to_the_median() -> None:
    assert slow({(0, 1): 1.0, (0, 2): 1.9, (1, 2): 1.0}, 0.5) == {}
    assert slow({(0, 1): 1.0, (0, 2): 4.0, (1, 2): 1.0}, 0.5) == {(0, 2): "0.25 of the median speed"}
    assert slow({(0, 1): 1.0, (0, 2): 4.0}, 0.5) == {(0, 2): "0.25 of the median speed"}
    assert slow({(0, 1): 4.0}, 0.5) == {}


def test_the_odd_version_is_named_with_what_most_have() -> None:
    facts = [{"NCCL": "2.29.7"}, {"NCCL": "2.29.7"}, {"NCCL": "2.27.1"}, {"NCCL": "2.29.7"}]
    assert differing(facts, FOUR) == ["ranks 2 on n2: NCCL 2.27.1, most have 2.29.7"]


def test_pairs_between_nodes_are_rails() -> None:
    kinds: dict[str, list[tuple[int, int]]] = {}
    for kind, met in pairs.schedule(FOUR):
        kinds.setdefault(kind, []).extend(met)
    assert kinds == {"pairs in nodes": [(0, 1), (2, 3)], "pairs between nodes": [(0, 2), (1, 3)]}
    uneven = [kind for kind, _ in pairs.schedule(Nodes(("n1", "n1", "n2")))]
    assert set(uneven) == {"all pairs"}


def test_the_table_is_one_line_a_check() -> None:
    rows = [Row("clocks", "one node"), Row("storage", "1 GiB/s", ("rank 1 on n1: no space",))]
    assert table("tiny: 2 ranks", rows).splitlines() == [
        "tiny: 2 ranks", "  clocks   ok   one node", "  storage  BAD  1 GiB/s"
    ]  # fmt: skip


# --- planted faults, four processes ----------------------------------------------------------------------------------


def planted(rank: int, faults: list[str]) -> None:
    """Break one thing on one rank for each word, in this process only."""
    swap, now, gather, versions = pairs.swap, host.now, axes.all_gather, host.versions
    if "slow rank" in faults and rank == 2:
        pairs.swap = lambda *args: (time.sleep(SLEEP), swap(*args))  # type: ignore
    if "slow pair" in faults and rank in (1, 3):
        pairs.swap = lambda sent, got, peer: (time.sleep(SLEEP * (rank + peer == 4)), swap(sent, got, peer))  # type: ignore
    if "wrong bytes" in faults and rank == 3:
        pairs.swap = lambda sent, got, peer: swap(sent + 1, got, peer)
    if "wrong part" in faults and rank == 1:
        axes.all_gather = lambda group, out, parts, me: gather(group, out, parts + 1, me)
    if "clock" in faults and rank == 2:
        host.now = lambda: now() + 30.0
    if "library" in faults and rank == 3:
        host.versions = lambda: versions() | {"torch": "2.12.1"}
    if "disk" in faults and rank == 1:
        host.os.fsync = _no_space
    if "experts" in faults and rank == 1:
        experts.build_dispatcher = _wrong_combine(experts.build_dispatcher)  # type: ignore
    if "silent" in faults and rank == 3:
        pairs.swap = _stand_still


def _stand_still(*args: Any) -> None:
    time.sleep(40)
    raise ExpertError("stood still")


def _no_space(number: int) -> None:
    raise OSError(28, "No space left on device")


def _wrong_combine(build: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        dispatcher = build(*args, **kwargs)
        combine = dispatcher.combine
        dispatcher.combine = lambda rows, handle, weights=None: combine(rows * 1.5, handle, weights)
        return dispatcher

    return made


def examined(faults: list[str], run_dir: str, dispatcher: str, precision: str) -> list[Row] | str:
    """The rows that this rank gets, two ranks being a node each; or why it could not go on."""
    from dataclasses import replace

    rank, seconds = int(os.environ["RANK"]), 8 if faults == ["silent"] else 90
    planted(rank, faults)
    found = config("nowhere", pipeline=2, expert=2, data=2, schedule="dualpipe", run_dir=run_dir)
    parallel = replace(found.parallel, ranks_per_node=2, dispatcher=dispatcher)
    if dispatcher == "collective":
        parallel = replace(parallel, ranks_per_node=1, dispatch_wire="fp8", combine_wire="bf16")
    found = replace(found, parallel=parallel, train=replace(found.train, precision=precision, timeout_seconds=seconds))
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(process_group(found.train))
        try:
            slow = SLOW if any(fault.startswith("slow") for fault in faults) else 1e-3
            return preflight.examine(found, process, payload_bytes=1 << 16, slow=slow, seconds=seconds)
        except ExpertError as error:
            stack.pop_all()  # the group is broken: destroying it would wait for the silent one
            return str(error)


def bad(rows: list[Row]) -> dict[str, tuple[str, ...]]:
    return {row.check: row.bad for row in rows if row.bad}


def of_all_ranks(faults: list[str], tmp_path: Path, dispatcher: str = "flat", precision: str = "fp32") -> list[Row]:
    found = run_distributed(4, examined, faults, str(tmp_path), dispatcher, precision)
    assert all(bad(rows) == bad(found[0]) for rows in found)  # everybody knows, so everybody ends alike
    assert not list(tmp_path.glob(".preflight-*"))
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(("dispatcher", "precision"), [("flat", "fp32"), ("collective", "bf16")])
def test_nothing_is_found_where_nothing_is_planted(tmp_path: Path, dispatcher: str, precision: str) -> None:
    rows = of_all_ranks([], tmp_path, dispatcher, precision)
    assert bad(rows) == {}
    assert [row.check for row in rows][:3] == ["libraries", "clocks", "storage of run_dir"]
    assert rows[-1].check == f"dispatch and combine: {dispatcher}"


EXPECTED = {  # of each fault: the check that finds it, and who is named
    "slow rank": ("pairs", "rank 2 on"),
    "slow pair": ("pairs between nodes", "between rank 1 on"),
    "wrong bytes": ("pairs", "rank 3 on"),
    "wrong part": ("all-gather", "rank 1 on"),
    "clock": ("clocks", "clock is +30.0 s off"),
    "library": ("libraries", "torch 2.12.1, most have"),
    "disk": ("storage of run_dir", "rank 1 on"),
    "experts": ("dispatch and combine: flat", "rank 1 on"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [["slow rank", "wrong part", "clock", "library", "disk", "experts"], ["slow pair"], ["wrong bytes"]],
    ids=lambda faults: faults[0],
)
def test_planted_faults_are_named(tmp_path: Path, faults: list[str]) -> None:
    found = bad(of_all_ranks(faults, tmp_path))
    for fault in faults:
        check, who = EXPECTED[fault]
        lines = [line for name, named in found.items() if check in name for line in named]
        assert lines and all(who in line for line in lines), (fault, found)
    known = [EXPECTED[fault][0] for fault in faults]
    assert all(any(check in name for check in known) for name in found), found  # and nobody else is accused


@pytest.mark.slow
def test_a_silent_rank_is_named_by_the_others(tmp_path: Path) -> None:
    """Rank 3 stands still in the pairs; the collective's own error would not say who."""
    found = run_distributed(4, examined, ["silent"], str(tmp_path), "flat", "fp32")
    assert all("preflight, pairs: " in said and "rank 3 gives no sign of life" in said for said in found[:3]), found


@pytest.mark.slow
def test_the_command_on_local_processes(tmp_path: Path) -> None:
    words = ["experiment=tiny", "train.device=cpu", "train.threads=1", "model.hidden_size=32"]
    words += ["--mebibytes", "0.1", "--slow", "0.001"]
    command = [sys.executable, "-m", "launcher", "preflight", *words, f"run_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: 4 ranks\n") and "BAD" not in done.stdout


# --- single checks, one process --------------------------------------------------------------------------------------


def test_a_damaged_arrival_names_its_sender() -> None:
    found = config("nowhere", pipeline=1, expert=2, data=2, schedule="1f1b")
    sent = [experts.made_up(found, rank, torch.float32) for rank in (0, 1)]
    rows = [one.x_TD[(one.ids_TK == expert).any(1)] for expert in range(4) for one in sent]
    whole = torch.cat(rows)
    assert experts.wrong_arrivals(whole, sent, range(4), 0.0) == {}
    whole[len(rows[0])] += 1e-3  # the first row of the second sender
    assert experts.wrong_arrivals(whole, sent, range(4), 0.0) == {1: "1 of its rows arrive wrong"}
    missing = experts.wrong_arrivals(whole[1:], sent, range(4), 0.0)
    assert set(missing) == {0, 1} and "arrived instead of" in missing[0]


def test_an_unwritable_run_dir_is_named(tmp_path: Path) -> None:
    found = host.try_storage(tmp_path / "nowhere", 0, 1 << 10)
    assert "No such file or directory" in found.error
    assert host.try_storage(tmp_path, 0, 1 << 10).error == ""


def storage(*found: host.Written) -> tuple[str, ...]:
    team = Team(cast(Any, None), FOUR, payload_bytes=1 << 20, slow_share=0.5)
    return host.judge_storage(team, list(found), Path("run")).bad


def test_storage_that_is_slow_full_or_not_shared_is_named() -> None:
    quick, blind = host.Written(1.0, 1.0), host.Written(1.0, 1.0, sees_first=False)
    assert storage(quick, quick, quick, quick) == ()
    assert storage(quick, quick, host.Written(4.0, 1.0), quick) == ("rank 2 on n2: writes at 0.25 of the median speed",)
    assert storage(quick, quick, blind, blind) == (
        "node n2: does not see what rank 0 wrote, so run is not shared with it",
    )
    assert storage(quick, host.Written(error="No space left on device (run)"), quick, quick) == (
        "rank 1 on n1: No space left on device (run)",
    )
