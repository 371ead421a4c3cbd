"""Experts that collapse: said when it has lasted, once, and when it is over; the state survives a checkpoint."""

import json

import pytest
import torch

from launcher.record.collapse import CollapseWatch, num_words, of_words, to_words


def watch(steps: int = 3, load: float = 0.9) -> CollapseWatch:
    return CollapseWatch(steps=steps, load=load, num_experts=8, top_k=2)


def kinds(found) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(item.kind, item.block, item.experts) for item in found]


def test_a_dead_expert_is_said_once_and_its_return_too() -> None:
    tested = watch()
    dead = {4: (1, 7)}
    assert [kinds(tested.step({4: 1.2}, dead)) for _ in range(5)] == [[], [], [("dead", 4, (1, 7))], [], []]
    assert kinds(tested.step({4: 1.2}, {4: (7,)})) == [("alive", 4, (1,))]
    assert kinds(tested.step({4: 1.2}, {})) == [("alive", 4, (7,))]
    assert tested.step({4: 1.2}, {}) == []


def test_a_gap_begins_the_count_anew() -> None:
    tested = watch()
    for dead in ({1: (0,)}, {1: (0,)}, {}, {1: (0,)}, {1: (0,)}):
        assert tested.step({1: 1.0}, dead) == []
    (found,) = tested.step({1: 1.0}, {1: (0,)})
    assert found.text == "block 1: expert 0 without a token for 3 steps (train.collapse_steps=3)"


def test_one_expert_with_nearly_all_tokens() -> None:
    tested = watch()
    # 8 experts, 2 a token: one that every token chooses has 4 times the mean
    assert [len(tested.step({2: 3.61, 3: 3.5}, {})) for _ in range(4)] == [0, 0, 1, 0]
    (back,) = tested.step({2: 1.0, 3: 3.5}, {})
    assert (back.kind, back.block) == ("balanced", 2)
    tested = watch()
    (found,) = [item for _ in range(3) for item in tested.step({2: 4.0}, {})]
    assert "one expert takes 100% of the tokens" in found.text and "train.collapse_load=0.9" in found.text


def test_the_state_survives_and_none_begins_anew() -> None:
    straight, first = watch(), watch()
    for tested in (straight, first):
        for _ in range(2):
            tested.step({1: 4.0}, {1: (3,)})
    resumed = watch()
    resumed.load(json.loads(json.dumps(first.state())))
    expected = straight.step({1: 4.0}, {1: (3,)})
    assert resumed.step({1: 4.0}, {1: (3,)}) == expected and len(expected) == 2
    resumed.load(None)
    assert resumed.step({1: 4.0}, {1: (3,)}) == []


def test_zero_steps_say_nothing() -> None:
    tested = watch(steps=0)
    assert all(tested.step({1: 4.0}, {1: (3,)}) == [] for _ in range(5))


@pytest.mark.parametrize("num_experts", [1, 8, 31, 32, 33, 256])
def test_bitmaps_are_exact_in_fp64(num_experts: int) -> None:
    everyone = list(range(num_experts))
    for experts in ([], [0], [num_experts - 1], everyone, everyone[::3]):
        words = torch.tensor(to_words(experts, num_experts), dtype=torch.float64)
        assert len(words) == num_words(num_experts)
        assert of_words(words.tolist()) == tuple(experts)
