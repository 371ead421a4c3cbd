"""Bytes that a rank's actions allocate and free, phase by phase, as `parallel.pipeline.chunk` does it. No torch.

What is kept comes from `model.fp8.memory`; what is only there while a phase computes is counted in tensors of
`model.mla`, `model.mlp`, `model.loss`; rows under way in buffers of `parallel.expert`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from model.config import ModelConfig
from model.fp8.memory import Kept, bytes_of, kept_by_attention_kernel, kept_by_layer, put_off_by_layer
from model.fp8.precision_map import Precision
from parallel.pipeline.phases import Phase, Program, backward_program, forward_program

KINDS = ("kept", "put_off", "computing", "travelling")
PARTS = ("attend", "shared", "experts")
HEADS, BLOCK, BF16_BLOCK = 8, 64, 256  # of model.attention's products on a CPU


@dataclass(frozen=True)
class UnderWay:
    """Bytes in the buffers of a micro-batch's transfers, of both sides, until whoever waits has read what arrived.

    dispatch, gradient: of tokens and of gradients on the same way; combine: of partial sums, both ways back. index: of
    lists that the routing keeps from the first transfer to the last.
    """

    dispatch: float = 0.0
    gradient: float = 0.0
    combine: float = 0.0
    index: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What decides the bytes of a chunk.

    tokens: of a micro-batch, in sequences of `length`; rows: that the experts get. spread: experts lie on other ranks.
    cut: the chunk runs phase by phase. recompute: as `parallel.recompute`. on_cpu: scratch of the CPU's attention and
    loss, and attention that keeps q, k and v alone. logits_bytes: of one chunk of FP32 logits.
    """

    model: ModelConfig
    precision: Precision
    tokens: int
    length: int
    rows: int
    spread: bool
    cut: bool
    recompute: str
    on_cpu: bool
    logits_bytes: float
    under_way: UnderWay = UnderWay()

    @property
    def element(self) -> int:
        """Bytes of a wide number."""
        return 4 if self.precision.wide == "FP32" else 2

    @property
    def hidden(self) -> float:
        """Of the hidden state of a micro-batch."""
        return self.tokens * self.model.hidden_size * self.element

    @property
    def row_bytes(self) -> float:
        """Of the experts' rows, wide."""
        return self.rows * self.model.hidden_size * self.element


@dataclass(frozen=True)
class Swing:
    """peak: bytes above the level before, by kind, at the moment when their sum is largest; after: left at the end."""

    peak: dict[str, float]
    after: dict[str, float]

    @property
    def height(self) -> float:
        """Of the peak."""
        return sum(self.peak.values())


@dataclass
class Ledger:
    """A level by kind that phases move, and its highest point."""

    level: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    peak: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def move(self, **changes: float) -> None:
        """Allocate, or free, by kind; `computing` lasts for this move alone."""
        computing = changes.pop("computing", 0.0)
        for kind, size in changes.items():
            self.level[kind] += size
        now = {**self.level, "computing": self.level["computing"] + computing}
        if sum(now.values()) > sum(self.peak.values()):
            self.peak = now

    def swing(self) -> Swing:
        """What it came to."""
        return Swing(self.peak, self.level)


@dataclass
class Passing:
    """A chunk on its way through an action: the parts its tokens take, and bytes put off by link."""

    halves: int = 1
    waiting: dict[int, float] = field(default_factory=dict)

    def put_off(self, link: int, size: float) -> float:
        """So much more waits for the weight gradients of a link; gives the size."""
        self.waiting[link] = self.waiting.get(link, 0.0) + size
        return size


@dataclass(frozen=True)
class Part:
    """One part of a layer: bytes kept from forward to backward, and put off from backward to weight gradient."""

    kept: float
    put_off: float


@lru_cache(maxsize=1024)
def parts_of(setting: Setting, *, moe: bool) -> Mapping[str, Part]:
    """A layer's, by part; the hidden state that enters is in attend. Kept: a search asks again and again."""
    s = setting
    sequences = max(1, s.tokens // s.length)
    kept = kept_by_layer(s.model, s.precision, moe=moe, recompute=s.recompute)
    put_off = put_off_by_layer(s.model, s.precision, moe=moe, recompute=s.recompute)
    if not s.on_cpu:
        kept.append(kept_by_attention_kernel(s.model, s.precision, recompute=s.recompute))
    share = s.rows / (s.tokens * s.model.num_experts_per_tok)

    def total(items: list[Kept], part: str) -> float:
        return bytes_of([x for x in items if x.part == part], s.tokens, sequences) * (share if part == "experts" else 1)

    return MappingProxyType({p: Part(total(kept, p), total(put_off, p)) for p in PARTS})


@dataclass(frozen=True)
class Front:
    """What a link computes before its layer: dense layers, heads (with their losses), entries of MTP."""

    dense: int = 0
    heads: int = 0
    entries: int = 0


def fronts(model: ModelConfig, layers: range) -> list[Front]:
    """Of every link of a stage, the end last."""
    found, dense = [], 0
    for layer in layers:
        if model.is_moe(layer):
            found.append(Front(dense))
            dense = 0
        else:
            dense += 1
    if layers.stop != model.num_hidden_layers:
        return [*found, Front(dense)]
    for _ in range(model.num_nextn_predict_layers):
        found.append(Front(dense, 1, 1))
        dense = 0
    return [*found, Front(dense, 1)]


class Stage:
    """The bytes of one stage's phases; `play` moves a ledger by one of them."""

    def __init__(self, setting: Setting, layers: range) -> None:
        self.s, self.fronts = setting, fronts(setting.model, layers)
        self.first = layers.start == 0
        self.moe, self.dense = parts_of(setting, moe=True), parts_of(setting, moe=False)["attend"]
        self.again, self.less = setting.recompute in ("attend", "layer"), setting.recompute == "report"

    def program(self, kind: str, *, halves: int = 1) -> Program:
        """Phases of an action, whole or cut; `weights` of B at its end where it is whole."""
        links = len(self.fronts)
        if kind == "W":
            return (Phase("weights", 0),)
        if kind == "F":
            return forward_program(links, halves=halves)
        program = backward_program(links, halves=halves, weights=kind == "B")
        if not self.s.cut and kind == "B":  # nothing to hide: all weight gradients once the chunk is done
            return (*(phase for phase in program if phase.kind != "weights"), Phase("weights", 0))
        return program

    def play(self, phase: Phase, ledger: Ledger, chunk: Passing) -> None:
        """One phase of a chunk; a W's own chunk has put off everything before."""
        getattr(self, f"_{phase.kind}")(phase.link, ledger, chunk)

    # what comes before a layer

    def _front_kept(self, front: Front) -> float:
        s, h = self.s, self.s.hidden
        head = 2 * h + 8 * s.tokens + s.tokens * s.model.vocab_size * s.element
        # the embedded token and both norms' statistics, then the two side by side
        return front.dense * self.dense.kept + front.heads * head + front.entries * (3 * h + 8 * s.tokens)

    def _front_put_off(self, front: Front) -> float:
        s, h = self.s, self.s.hidden
        head = h + s.tokens * s.model.vocab_size * s.element
        return front.dense * self.dense.put_off + front.heads * head + front.entries * 4 * h

    def _logits(self, front: Front) -> float:
        whole = 4 * self.s.tokens * self.s.model.vocab_size
        # probabilities; the logits too where they must be widened first or, on a CPU, brought together from their rows
        chunks = 1 if self.s.element == 4 and not self.s.on_cpu else 2
        return chunks * min(whole, self.s.logits_bytes) if front.heads else 0.0

    def _projected(self) -> float:
        """Queries, keys and values as they come from their projections."""
        c = self.s.model
        wide = c.num_attention_heads * (c.qk_head_dim + c.qk_nope_head_dim + c.v_head_dim)
        return self.s.tokens * wide * self.s.element

    def _assembled(self) -> float:
        c = self.s.model
        return self.s.tokens * c.num_attention_heads * (2 * c.qk_head_dim + c.v_head_dim) * self.s.element

    def _scratch(self, *, backward: bool) -> float:
        """Of the CPU's attention: scores and probabilities of a block, and operands of some heads."""
        s = self.s
        if not s.on_cpu or (s.element == 2 and not backward):
            return 0.0
        heads, block = min(HEADS, s.model.num_attention_heads), min(BF16_BLOCK if s.element == 2 else BLOCK, s.length)
        scores = 4.0 * heads * block * s.length
        if not backward:
            return 2 * scores
        c, width = s.model, heads * s.length
        operands = width * (2 * c.qk_head_dim + 2 * c.v_head_dim) * s.element
        return 3 * scores + operands + width * (c.qk_head_dim + c.v_head_dim) * 4

    # phases

    def _attend(self, link: int, ledger: Ledger, _chunk: Passing) -> None:
        s, front = self.s, self.fronts[link]
        if link:
            self._merge(ledger)
        kept = self.moe["attend"].kept + self._front_kept(front)
        x = s.hidden if self._x_apart else 0.0
        working = self._projected() + self._scratch(backward=False)
        passing = max(working + self._assembled(), self._logits(front)) - s.hidden
        if self.less:  # the heads last until attention is done; x until the shared experts have read it
            ledger.move(kept=kept + self._index, travelling=s.hidden)
            ledger.move(computing=passing)
        elif self.again:  # besides, the residual until the layer is merged
            ledger.move(kept=self._enters(link) + self._index, travelling=2 * s.hidden)
            ledger.move(computing=passing - s.hidden)
        else:
            ledger.move(kept=kept + x + self._index, computing=max(working, self._logits(front)))

    @property
    def _x_apart(self) -> bool:
        """Whether the normed state that the experts read is in no part's list but the shared experts'."""
        return bool(self.s.model.n_shared_experts) and self.s.precision.precision != "fp8" and not self.less

    @property
    def _index(self) -> float:
        return self.s.under_way.index

    def _dispatch(self, _link: int, ledger: Ledger, chunk: Passing) -> None:
        ledger.move(travelling=self.s.under_way.dispatch / chunk.halves)

    def _enters(self, link: int) -> float:
        """The hidden state that a link takes in, which stays as its graph's leaf."""
        return self.s.hidden if link or not self.first else 0.0

    def _shared(self, _link: int, ledger: Ledger, _chunk: Passing) -> None:
        s, kept, passing = self.s, self._shared_kept, 0.0
        if s.recompute == "layer" and s.model.n_shared_experts:  # x alone stays
            kept, passing = s.hidden, kept
        if s.model.n_shared_experts:
            ledger.move(kept=kept, travelling=s.hidden, computing=passing)
        if self.less or self.again:
            ledger.move(travelling=-s.hidden)

    @property
    def _shared_kept(self) -> float:
        """By the shared experts' graph alone: without recomputation x stays for the router too, and is in attend."""
        return self.moe["shared"].kept - (self.s.hidden if self._x_apart and not self.again else 0.0)

    @property
    def _leaf_rows(self) -> float:
        """Rows that the chunk holds to compute the experts again."""
        return self.s.row_bytes if self.s.recompute == "layer" else 0.0

    @property
    def _listed_rows(self) -> float:
        """Of those in the list of the experts, which a linear without FP8 keeps as they are."""
        return self.s.row_bytes if self.s.precision.precision != "fp8" else 0.0

    def _experts(self, _link: int, ledger: Ledger, chunk: Passing) -> None:
        s, rows = self.s, self.s.row_bytes / chunk.halves
        inner = (self.moe["experts"].kept - self._listed_rows) / chunk.halves
        if s.spread:  # as they arrived, then by expert
            ledger.move(computing=rows)
            ledger.move(travelling=-s.under_way.dispatch / chunk.halves)
        stays, again = max(self._leaf_rows, self._listed_rows) / chunk.halves, s.recompute == "layer"
        passing = (inner if again else 0.0) + rows - stays
        ledger.move(kept=stays + (0.0 if again else inner), travelling=rows, computing=passing)

    def _combine(self, _link: int, ledger: Ledger, chunk: Passing) -> None:
        ledger.move(travelling=self.s.under_way.combine / chunk.halves)
        ledger.move(travelling=-self.s.row_bytes / chunk.halves)

    def _merge(self, ledger: Ledger) -> None:
        """Sums of routed rows, shared and residual become the next link's hidden state, which that link's list has."""
        s = self.s
        shared = s.hidden if s.model.n_shared_experts else 0.0
        ledger.move(computing=2 * s.hidden)
        ledger.move(travelling=-s.under_way.combine - shared - (s.hidden if self.again else 0.0))

    def _end(self, link: int, ledger: Ledger, _chunk: Passing) -> None:
        front = self.fronts[link]
        if link:
            self._merge(ledger)
        ledger.move(kept=self._front_kept(front), computing=max(self._logits(front), self.s.hidden))

    def _end_grad(self, link: int, ledger: Ledger, chunk: Passing) -> None:
        front = self.fronts[link]
        ledger.move(travelling=self.s.hidden)  # the gradient that comes, or that the loss makes
        ledger.move(computing=2 * self.s.hidden)
        ledger.move(kept=-self._front_kept(front), put_off=chunk.put_off(link, self._front_put_off(front)))

    def _combine_grad(self, _link: int, ledger: Ledger, chunk: Passing) -> None:
        ledger.move(travelling=(self.s.under_way.gradient if self.s.spread else self.s.row_bytes) / chunk.halves)

    def _shared_grad(self, link: int, ledger: Ledger, chunk: Passing) -> None:
        s = self.s
        if not s.model.n_shared_experts:
            return
        kept, put_off = self._shared_kept, self.moe["shared"].put_off
        if s.recompute == "layer":  # of which x is there; in FP8 it is not what is put off
            there = s.hidden if s.precision.precision == "fp8" else 0.0
            ledger.move(kept=kept + there - s.hidden)
            kept += there
        elif self._x_apart and not self.again:
            put_off -= s.hidden
        ledger.move(kept=-kept, put_off=chunk.put_off(link, put_off))
        ledger.move(travelling=s.hidden)

    def _experts_grad(self, link: int, ledger: Ledger, chunk: Passing) -> None:
        s, rows, experts = self.s, self.s.row_bytes / chunk.halves, self.moe["experts"]
        if s.spread:
            ledger.move(computing=rows)
            ledger.move(travelling=-s.under_way.gradient / chunk.halves)
        else:
            ledger.move(travelling=-rows)  # from here on in the list of what waits
        listed = self._listed_rows / chunk.halves
        inner = experts.kept / chunk.halves - listed
        if s.recompute == "layer":
            ledger.move(kept=inner)
        width = s.rows * s.model.moe_intermediate_size * s.element / chunk.halves
        ledger.move(computing=width)
        ledger.move(kept=-inner - listed, put_off=chunk.put_off(link, experts.put_off / chunk.halves))
        ledger.move(travelling=rows)

    def _dispatch_grad(self, _link: int, ledger: Ledger, chunk: Passing) -> None:
        ledger.move(travelling=self.s.under_way.combine / chunk.halves)
        leaf = 0.0 if self._listed_rows else self._leaf_rows / chunk.halves
        ledger.move(travelling=-self.s.row_bytes / chunk.halves, kept=-leaf)

    def _attend_grad(self, link: int, ledger: Ledger, chunk: Passing) -> None:
        s, front, attend = self.s, self.fronts[link], self.moe["attend"]
        kept, x = attend.kept + self._front_kept(front), s.hidden if self._x_apart else 0.0
        if self.again:
            ledger.move(kept=kept + x - self._enters(link), computing=self._projected() + self._scratch(backward=False))
        if self.less:
            ledger.move(computing=self._projected() + self._assembled())
        heads = self._assembled() if self.less else 0.0  # computed again; otherwise on the list
        ledger.move(computing=heads + self._assembled() + self._scratch(backward=True) + s.hidden)
        ledger.move(travelling=s.hidden - s.under_way.combine)
        summed = s.hidden + (s.hidden if s.model.n_shared_experts else 0.0)
        put_off = attend.put_off + self._front_put_off(front) + x
        ledger.move(kept=-kept - x, put_off=chunk.put_off(link, put_off))
        ledger.move(computing=self._assembled())
        ledger.move(travelling=-summed, kept=-self._index)

    def all_put_off(self) -> dict[int, float]:
        """Bytes that wait after a chunk's I, by link."""
        x = self.s.hidden if self._x_apart and not self.again else 0.0  # on two lists, once in memory
        layer = sum(part.put_off for part in self.moe.values()) + (self.s.hidden if self._x_apart else 0.0) - x
        found = {link: layer + self._front_put_off(front) for link, front in enumerate(self.fronts[:-1])}
        return {**found, len(found): self._front_put_off(self.fronts[-1])}

    def _weights(self, link: int, ledger: Ledger, chunk: Passing) -> None:
        for number in [number for number in chunk.waiting if number >= link]:
            ledger.move(put_off=-chunk.waiting.pop(number))
