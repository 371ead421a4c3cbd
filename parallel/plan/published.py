"""Predictions against published figures: rows of check, published, predicted, and what a deviation is put down to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from parallel.pipeline import overlap
from parallel.pipeline.actions import Action, Pair, Schedule
from parallel.pipeline.phase_costs import LayerCosts, time_of
from parallel.pipeline.placement import linear
from parallel.plan.calibration import predicted_classes
from parallel.plan.cost import Chain, Ends, StageCosts, layer_costs
from parallel.plan.hardware import Hardware
from parallel.plan.job import Job
from parallel.plan.kernels import ALL_TO_ALL_SMS, Calibration, Machine
from parallel.plan.layers import LayerShape, layer_bill
from parallel.plan.recipe import EXTENSIONS, extension, hours
from parallel.plan.step import Plan, estimate, plan

# arXiv 2505.09343, table 4, multi-plane network; seconds
ISCA_STEP = 19.926
ISCA = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}
ISCA_TOKENS_PER_DAY, ISCA_MFU_CAUSAL, ISCA_MFU_FULL = 272.80e9, 0.3894, 0.4373
REPORT_HOURS_PER_TRILLION, REPORT_HOURS, REPORT_EXTENSION_HOURS = 180e3, 2664e3, 119e3  # report, table 1


@dataclass(frozen=True)
class Row:
    """One comparison. bar: largest relative error that holds.

    explained: the effects that a deviation is put down to, each with its size, worked out from the plan at hand.
    effect: what the named effect can add to the prediction at most, in the row's unit; 0 where nothing but the
    deviation itself speaks for one. forecast: of something that nobody has run, beside the published figure of
    something else. calibrated: what is missing, or all of it, is what the calibration was fitted to. restates: the row
    whose prediction this one has in other units.
    """

    check: str
    published: float
    predicted: float
    bar: float
    explained: str = ""
    effect: float = 0.0
    forecast: bool = False
    calibrated: bool = False
    restates: str = ""

    @property
    def independent(self) -> bool:
        """Whether the row tells something that the calibration and the other rows do not."""
        return not (self.forecast or self.calibrated or self.restates)

    @property
    def relative_error(self) -> float:
        """Signed, of the published figure."""
        return self.predicted / self.published - 1

    @property
    def holds(self) -> bool:
        """Whether the error is within the bar."""
        return abs(self.relative_error) <= self.bar

    @property
    def verdict(self) -> str:
        """Within the bar or not, `yes` or `NO`; `explained`: for some size of the named effect, up to all of it.

        `calibrated`: outside, and the calibration is what was fitted to the rest. `forecast`: nothing can be held
        against it yet.
        """
        if self.forecast:
            return "forecast"
        if self.holds:
            return "yes"
        if self.calibrated:
            return "calibrated"
        low, high = sorted((self.predicted, self.predicted + self.effect))
        near = min(max(self.published, low), high)
        return "explained" if self.explained and abs(near / self.published - 1) <= self.bar else "NO"

    def tree(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "check": self.check, "published": self.published, "predicted": self.predicted,
            "relative_error": self.relative_error, "bar": self.bar, "holds": self.holds, "verdict": self.verdict,
            "effect": self.effect, "explained": self.explained, "independent": self.independent,
            "restates": self.restates,
        }  # fmt: skip


@dataclass(frozen=True)
class _Effect:
    """In words, and what it can add to the prediction at most."""

    words: str
    size: float = 0.0


def rows(job: Job, shape: LayerShape, measured: Mapping[str, float], pair_seconds: float) -> list[Row]:
    """All rows. job: the published run with the published engine; measured: seconds of classes in the trace's pair."""
    classes = {k: v for k, v in measured.items() if k != "wait"}
    found = plan(job)
    return [
        *_trace_rows(shape, job.hardware, classes, pair_seconds),
        *_isca_rows(found, shape),
        *_report_rows(found),
        *_own_rows(found),
    ]


def _trace_rows(
    shape: LayerShape, hardware: Hardware, measured: Mapping[str, float], pair_seconds: float
) -> Iterator[Row]:
    predicted = predicted_classes(shape, hardware, layers=4)
    effects = {
        "quantise": "kernels that transpose reach about half of the memory's bandwidth, 0.8 is taken",
        "dispatch": "without its waiting for peers; with 20 SMs beside the computation it reaches 0.6 of DeepEP alone",
    }
    yield Row("trace: pair of 4 layers, ms", 1e3 * pair_seconds, 1e3 * pair_of(shape, hardware), 0.10)
    for kind, seconds in measured.items():
        if seconds:
            yield Row(f"trace: {kind}, ms", 1e3 * seconds, 1e3 * predicted[kind], 0.25, effects.get(kind, ""))


def pair_of(shape: LayerShape, hardware: Hardware, calibration: Calibration | None = None) -> float:
    """Seconds of an overlapped pair of four MoE layers, from first principles unless a calibration is given."""
    machine = Machine.beside_all_to_all(hardware, calibration, expert=shape.expert)
    chain = Chain((layer_costs(shape, machine, sms=ALL_TO_ALL_SMS),) * 4, Ends())
    costs = StageCosts(LayerCosts.even(0.0, 0.0), alone=(chain,), paired=(chain,))
    pair = Pair(Action("F", 0, 1), Action("B", 0, 0))
    steps = (Action("F", 0, 0), pair, Action("B", 0, 1))
    schedule = Schedule("pair", 1, 1, 2, linear(1), (steps,))
    work = overlap.plan(schedule, 0, num_links=costs.num_links, level="pairs")
    return time_of(next(w for w in work if len(w.actions) == 2).phases, costs)


def _isca_rows(found: Plan, shape: LayerShape) -> Iterator[Row]:
    split = found.split.rows()
    split["optimizer"] += split.pop("exposed_communication")
    step = "ISCA: step, s"
    yield Row(step, ISCA_STEP, found.step_seconds, 0.03)
    bare = plan(replace(found.job, calibration=replace(found.job.calibration, training=1.0)))
    without = _without_training(bare, shape)
    yield Row("ISCA: step, from the trace alone", ISCA_STEP, bare.step_seconds, 0.03, without, calibrated=True)
    spent = f"the calibration's factor {found.job.calibration.training:g}, training over profile, is from this row"
    effects = {
        "1F1B": _Effect(spent),
        "bubble": _Effect(f"of it {_even_bubble(found):.2f} s with even stages, the rest uneven ones"),
        "1W": _weights_alone(found),
    }
    for key, seconds in ISCA.items():
        effect = effects.get(key, _Effect(""))
        yield Row(
            f"ISCA: {key}, s", seconds, split[key], 0.10, effect.words, effect.size, calibrated=key == "1F1B"
        )  # fmt: skip
    per_day = found.tokens_per_second_per_gpu * found.job.num_gpus * 86400
    yield Row("ISCA: tokens a day, 1e9", ISCA_TOKENS_PER_DAY / 1e9, per_day / 1e9, 0.03, restates=step)
    yield Row("ISCA: MFU causal", ISCA_MFU_CAUSAL, found.mfu_causal, 0.03, restates=step)
    yield Row("ISCA: MFU full", ISCA_MFU_FULL, found.mfu_full, 0.03, restates=step)


def _without_training(bare: Plan, shape: LayerShape) -> str:
    """What the profile, of balanced experts and without traffic between stages, leaves out of a step.

    No more than a reading of it: the size of what is left out is the deviation itself.
    """
    job = bare.job
    missing = ISCA_STEP - bare.step_seconds
    in_pairs = ISCA["1F1B"] - bare.split.pair
    slower = ISCA["1F1B"] / bare.split.pair
    even = pair_of(shape, job.hardware, job.calibration)
    low, high = 1.0, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        slow = pair_of(replace(shape, imbalance=middle), job.hardware, job.calibration)
        low, high = (middle, high) if slow < slower * even else (low, middle)
    return (
        f"{in_pairs:.2f} of the missing {missing:.2f} s are in the pairs, {slower - 1:.1%} slower in training than in "
        f"the profile, to which the calibration's factor is fitted. The profile's experts are balanced: the fullest of "
        f"{shape.expert} ranks with {low:.2f} times the mean rows would take just that, as all wait for it; the loads "
        "are not published"
    )


@dataclass(frozen=True)
class _ByRank:
    """Seconds of a table's row: mean over the ranks, and mean of the two at the ends of the pipeline."""

    published: float
    mean: float
    ends: float

    def at(self, share: float) -> float:
        """Error of a mean in which the ends count more: share 0 is the mean, 1 the ends alone."""
        return (self.mean + share * (self.ends - self.mean)) / self.published - 1


def _weights_alone(found: Plan) -> _Effect:
    """How the row depends on the ranks that it is of, which is not published.

    Other ranks mean another 1F and 1B too: the effect explains only where one choice of ranks fits all three.
    """
    kinds = {"1F": ("F",), "1B": ("B", "I"), "1W": ("W",)}
    rows: dict[str, _ByRank] = {}
    weights: list[float] = []
    for key, names in kinds.items():
        weights = [
            sum(t.end - t.start for t in row if getattr(t.step, "kind", "") in names) for row in found.timeline.ranks
        ]
        rows[key] = _ByRank(ISCA[key], sum(weights) / len(weights), (weights[0] + weights[-1]) / 2)
    fits = [share / 100 for share in range(101) if all(abs(row.at(share / 100)) <= 0.10 for row in rows.values())]
    alone = any(abs(row.at(1.0)) > 0.10 for row in rows.values())
    ends = ", ".join(f"{key} {row.ends:.2f} s ({row.at(1.0):+.0%})" for key, row in rows.items())
    together = (
        f"from {fits[0]:.0%} to {fits[-1]:.0%} of the way from the mean to the ends all three are within 10%"
        if fits
        else "no mean between the two has all three within 10%"
    )
    return _Effect(
        f"which ranks the row is of is not published; ours is their mean, over which it runs from {min(weights):.2f} s "
        f"in the middle to {max(weights):.2f} s. Of the ends alone the table would have {ends}"
        f"{', so it is not of them alone either' if alone else ''}; {together}",
        fits[-1] * (rows["1W"].ends - rows["1W"].mean) if fits else 0.0,
    )


def _even_bubble(found: Plan) -> float:
    """Seconds that DualPipe's formula gives for the mean pair, B and W of the plan."""
    ranks = len(found.timeline.ranks)
    seconds: dict[str, list[float]] = {"pair": [], "I": [], "B": [], "W": []}
    for row in found.timeline.ranks:
        for timed in row:
            kind = getattr(timed.step, "kind", "pair")
            if kind in seconds:
                seconds[kind].append(timed.end - timed.start)
    mean = {kind: sum(values) / len(values) if values else 0.0 for kind, values in seconds.items()}
    return (ranks / 2 - 1) * (mean["pair"] + mean["B"] - 3 * mean["W"])


def _report_rows(found: Plan) -> Iterator[Row]:
    cost, job = hours(found), found.job
    per_trillion = found.step_seconds / job.tokens_per_step * 1e12 * job.num_gpus / 3600
    yield Row(
        "report: GPU-hours per 1T tokens", REPORT_HOURS_PER_TRILLION, per_trillion, 0.03, restates="ISCA: step, s"
    )  # fmt: skip
    yield Row("report: GPU-hours, 14.8T with ramp", REPORT_HOURS, cost.pretraining, 0.03)
    longer = _extensions(found, cost.extensions)
    yield Row(
        "report: GPU-hours of the extension", REPORT_EXTENSION_HOURS, sum(cost.extensions), 0.03, longer.words,
        effect=longer.size,
    )  # fmt: skip


def _own_rows(found: Plan) -> Iterator[Row]:
    """This project's engine on the same GPUs, halves of lone chunks overlapped, weights in FP8 alone.

    With the report's recomputation and with that of whole layers. The bar is the model's error on the published step
    where nothing is calibrated to it.
    """
    job = replace(found.job, bare=False, fp8=replace(found.job.fp8, primary_weights="fp8"))
    bare = plan(replace(found.job, calibration=replace(found.job.calibration, training=1.0)))
    bar = abs(bare.step_seconds / ISCA_STEP - 1)
    for level in ("report", "layer"):
        own = plan(job.with_parallel(overlap="all", recompute=level))
        memory, limit = own.memory[own.fullest_rank].total / 2**30, job.hardware.memory_bytes / 2**30
        fits = "fits" if own.fits else "does not fit"
        yield Row(
            f"own engine, {level}: step, s", ISCA_STEP, own.step_seconds, bar,
            f"our engine with overlap=all and recompute={level}: {own.step_seconds / found.step_seconds - 1:+.1%} of "
            f"the same model's step for the report's engine, +-{bar:.1%}; {memory:.0f} of {limit:.0f} GiB, {fits}. It "
            "rests on kernels as fast as the profile's and a lone chunk's transfers at full speed: no GPU has run it; "
            "the factor of training is taken as for the report's", forecast=True,
        )  # fmt: skip


def _extensions(found: Plan, predicted: tuple[float, ...]) -> _Effect:
    """Where the extension's hours go, and what of it the report leaves open, each with its size.

    The effect: one phase's sequences over twice as many ranks as they need, of both phases the nearer one.

    A rank's tokens stay as many as in pretraining, attention grows. Every rank that shares a sequence projects the
    others' latents up again, so that more ranks to a sequence take more; and ranks that share a causal sequence have
    even work only where each has early and late tokens. The report says nothing of either: sizes, no evidence.
    """
    parts, more, attention, uneven = [], [], 0.0, 0.0
    others: list[tuple[float, str]] = []  # hours more, and what for
    for (length, sequences, steps), hours_of in zip(EXTENSIONS, predicted, strict=True):
        job = extension(found, length, sequences)
        machine = Machine.beside_all_to_all(job.hardware, job.calibration, expert=job.parallel.expert)
        core = layer_bill(job.shape(), machine, moe=True).kind("attention") * job.calibration.training
        blocks = job.model.num_hidden_layers + job.model.num_nextn_predict_layers
        spent = steps * core * blocks / job.parallel.pipeline * job.num_microbatches * job.num_gpus / 3600
        attention += spent
        uneven += spent * (1 - 1 / job.cut)  # stretches in order: the last rank's is 2 - 1 / cut of the mean
        twice = steps * estimate(replace(job, cut=2 * job.cut))[0] * job.num_gpus / 3600
        parts.append(f"{hours_of / 1e3:.1f}K at {length // 1024}K with each sequence over {job.cut} ranks")
        more.append(f"{(twice - hours_of) / 1e3:+.1f}K")
        others.append((twice - hours_of, f"{length // 1024}K over {2 * job.cut} ranks instead of {job.cut}"))
    missing = REPORT_EXTENSION_HOURS - sum(predicted)
    size, choice = min(others, key=lambda other: abs(missing - other[0]))
    return _Effect(
        f"{' and '.join(parts)}, the fewest on which it fits; over twice as many {' and '.join(more)}. "
        f"{attention / 1e3:.0f}K are the attention core, shared evenly; with stretches in order the last rank has "
        f"nearly twice the mean, {uneven / 1e3:+.0f}K. The deviation is {missing / 1e3:+.1f}K, with {choice} "
        f"{abs(missing - size) / 1e3:.1f}K. The report says of neither what it did",
        size,
    )
