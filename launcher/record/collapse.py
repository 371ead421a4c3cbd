"""Experts that collapse: without a token, or with nearly all of them, for many steps in a row.

Judged from what every rank knows after a step, so all judge alike; the state is part of a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WORD = 32  # experts in one number of a bitmap: exact in FP64


@dataclass(frozen=True)
class Finding:
    """Something to say, of one block. kind: `dead`, `alive` (again), `collapse` or `balanced` (again)."""

    kind: str
    block: int
    experts: tuple[int, ...]
    text: str


class CollapseWatch:
    """One run's.

    steps: in a row until something is said, 0 for never. load: share of a step's tokens in one expert that counts as
    collapse; each token chooses `top_k` of `num_experts`.
    """

    def __init__(self, *, steps: int, load: float, num_experts: int, top_k: int) -> None:
        self._steps, self._load, self._share = steps, load, top_k / num_experts
        self._dead: dict[tuple[int, int], int] = {}
        self._collapsed: dict[int, int] = {}

    def step(self, loads: Mapping[int, float], dead: Mapping[int, tuple[int, ...]]) -> list[Finding]:
        """After a step: its load max/mean and its experts without a token, by block; what is worth saying now.

        Each episode is said once when it has lasted, and once when it is over.
        """
        if not self._steps:
            return []
        now = {(block, expert) for block, experts in dead.items() for expert in experts}
        back = [key for key, steps in self._dead.items() if key not in now and steps >= self._steps]
        self._dead = {key: self._dead.get(key, 0) + 1 for key in now}
        died = [key for key, steps in self._dead.items() if steps == self._steps]
        found = [*self._grouped("dead", died), *self._grouped("alive", back)]
        for block, load in loads.items():
            share, lasted = load * self._share, self._collapsed.get(block, 0)
            if share >= self._load:
                self._collapsed[block] = lasted + 1
                if lasted + 1 == self._steps:
                    text = (
                        f"block {block}: one expert takes {share:.0%} of the tokens, for {self._steps} steps now "
                        f"(load max/mean {load:.2f}; train.collapse_load={self._load:g})"
                    )
                    found.append(Finding("collapse", block, (), text))
            elif self._collapsed.pop(block, 0) >= self._steps:
                text = f"block {block}: its busiest expert is below train.collapse_load={self._load:g} again"
                found.append(Finding("balanced", block, (), text))
        return found

    def _grouped(self, kind: str, keys: list[tuple[int, int]]) -> list[Finding]:
        by_block: dict[int, list[int]] = {}
        for block, expert in sorted(keys):
            by_block.setdefault(block, []).append(expert)
        return [
            Finding(kind, block, tuple(experts), self._words(kind, block, experts))
            for block, experts in by_block.items()
        ]

    def _words(self, kind: str, block: int, experts: list[int]) -> str:
        listed = ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
        which = f"block {block}: expert{'s' if len(experts) > 1 else ''} {listed}"
        if kind == "alive":
            return f"{which} gets tokens again"
        return f"{which} without a token for {self._steps} steps (train.collapse_steps={self._steps})"

    def state(self) -> dict[str, Any]:
        """As JSON."""
        dead = [[block, expert, steps] for (block, expert), steps in sorted(self._dead.items())]
        return {"dead": dead, "collapsed": sorted(map(list, self._collapsed.items()))}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take over what `state` gave; None: begin anew."""
        state = state or {}
        self._dead = {(block, expert): steps for block, expert, steps in state.get("dead", ())}
        self._collapsed = {block: steps for block, steps in state.get("collapsed", ())}


def to_words(experts: list[int], num_experts: int) -> list[float]:
    """A set of experts as whole numbers below 2**32, `num_words` of them."""
    words = [0] * num_words(num_experts)
    for expert in experts:
        words[expert // WORD] |= 1 << expert % WORD
    return [float(word) for word in words]


def of_words(words: list[float]) -> tuple[int, ...]:
    """The set of experts that `to_words` wrote."""
    return tuple(
        WORD * place + bit for place, word in enumerate(words) for bit in range(WORD) if int(word) >> bit & 1
    )  # fmt: skip


def num_words(num_experts: int) -> int:
    """Numbers in the bitmap of so many experts."""
    return -(-num_experts // WORD)
