"""One training step of one rank, from micro-batches to updated weights and router biases."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.build import Run
from launcher.record import fp8_samples
from launcher.record.collapse import num_words, of_words, to_words
from launcher.safety.agreement import messages
from model.attention import documents_of
from model.fp8.linear import weights_changed
from model.fp8.watch import TensorStats
from model.transformer import Microbatch, StageLoss
from optim.clip import clip_scale, global_norm
from optim.router_bias import load_violation, update_bias
from optim.schedule import value_at


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; weights have not been touched."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on all ranks.

    loss, mtp_loss: global means in nats a token (mtp_loss: mean over depths, None without MTP). balance_loss: sum over
    layers of the mean sequence-wise loss. expert_load: largest over mean load of every MoE block, by block number.
    bias_ranges: span of every router's biases after the step. dead: experts without a token, by block, where there are
    any. expert_counts: tokens of every expert, by block number; None in a step that does not log them. tokens: that the
    main loss was computed on; batch: sequences. dropped: copies of tokens that no expert got. norms: `grad` and
    `weight` by group of parameters, empty in a step that does not log them.
    """

    loss: float
    mtp_loss: float | None
    balance_loss: float
    lr: float
    grad_norm: float
    expert_load: dict[int, float]
    bias_ranges: dict[int, float]
    expert_counts: dict[int, list[int]] | None = None
    tokens: int = 0
    fp8: list[TensorStats] | None = None  # where a sample was due (fp8.watch_every)
    dead: dict[int, tuple[int, ...]] = field(default_factory=dict)
    dropped: int = 0
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    mtp_lambda: float = 0.0
    bias_speed: float = 0.0
    batch: int = 0
    sequence_length: int = 0


def microbatch(run: Run, number: int) -> Microbatch:
    """Micro-batch `number` of this rank's pipeline in the coming step."""
    train, tokens = run.config.train, run.progress.tokens
    where = {
        "consumed": run.progress.samples,
        "microbatch": number,
        "data_rank": run.mesh.data_rank,
        "data_size": run.config.parallel.data,
        "micro_batch_size": train.micro_batch_size,
    }
    documents, timed = None, run.clock.timed("data")
    if run.config.data.document_mask:
        # every stage asks its own loader, a pure function of the sample: no boundary has to be sent
        batch = timed(run.loader.batch, **where)  # type: ignore[attr-defined]  # `build` saw to it
        windows, documents = batch.tokens, documents_of(torch.from_numpy(batch.documents[:, :-1]))
    else:
        windows = timed(run.loader.microbatch, **where)
    share = train.micro_batch_size / run.plan.at(tokens).batch
    mtp_lambda = value_at(run.config.optim.mtp_lambda, tokens)
    return Microbatch(torch.from_numpy(windows).to(run.process.device), share, mtp_lambda, documents)


def train_step(run: Run, judge: Callable[[float, float], bool] = lambda loss, norm: True) -> StepResult:
    """Forward and backward of the global batch, reduction, clip, update; `run.progress` moves on by one step.

    judge: given the global loss and gradient norm, whether weights and router biases are to be updated with them.
    """
    return conclude_step(run, run_pipeline(run), judge)


def run_pipeline(run: Run) -> Mapping[int, StageLoss]:
    """The first part of a step: forward and backward of this rank's micro-batches; losses by micro-batch.

    Gradients are left where they add up.
    """
    fp8_samples.begin(run)
    with run.clock.phase("messages"):  # what chunks, transfers and data take is theirs
        executor = run.executors.of(run.plan.at(run.progress.tokens).num_microbatches)
        return executor.step(lambda number: microbatch(run, number))


def conclude_step(
    run: Run, losses: Mapping[int, StageLoss], judge: Callable[[float, float], bool] = lambda loss, norm: True
) -> StepResult:
    """The second part of a step, from the losses of the first; see `train_step`."""
    optim, progress, clock = run.config.optim, run.progress, run.clock
    planned = run.plan.at(progress.tokens)
    lr = value_at(optim.lr, progress.tokens + planned.tokens)  # so that the first step of a warm-up counts
    samples = fp8_samples.end(run)
    with clock.phase("reduce_scatter"):
        run.zero1.reduce_gradients()
    norms: dict[str, dict[str, float]] = {}
    with clock.phase("metrics"):
        sums = _reduce_losses(run, losses)
        norm = _global_norm(run, norms)
    _require_finite(run, sums.main, norm)
    updates = judge(sums.main, norm)
    if updates:
        _update(run, lr, norm)
    with clock.phase("optimizer"):
        run.zero1.zero_gradients()
    with clock.phase("metrics"):
        counts = _count_experts(run)
        logged = _all_counts(run, counts) if _is_due(run, run.config.train.expert_counts_every) else None
        speed = value_at(optim.bias_update_speed, progress.tokens) if updates else 0.0
        balance = _balance_experts(run, counts, speed)
    mtp_lambda = value_at(optim.mtp_lambda, progress.tokens)
    progress.step += 1
    progress.tokens += planned.tokens
    progress.samples += planned.batch
    mtp_loss = sums.mtp if run.config.model.num_nextn_predict_layers > 0 else None
    return StepResult(
        sums.main, mtp_loss, sums.balance, lr, norm, balance.loads, balance.bias_ranges, logged, planned.tokens,
        samples, balance.dead, sums.dropped, norms, mtp_lambda, speed, planned.batch, planned.sequence_length,
    )  # fmt: skip


def _is_due(run: Run, every: int) -> bool:
    return every > 0 and (run.progress.step + 1) % every == 0


def _global_norm(run: Run, norms: dict[str, dict[str, float]]) -> float:
    """Of all gradients; where they are due, `norms` gets those by group from the same all-reduce."""

    def over_ranks(sums: Tensor) -> None:
        dist.all_reduce(sums, group=run.groups.world)

    summing = run.norms.summing(over_ranks, norms) if _is_due(run, run.config.train.norms_every) else over_ranks
    return global_norm((bucket.grad for bucket in run.zero1.buckets), summing, run.process.device)


def _update(run: Run, lr: float, norm: float) -> None:
    with run.clock.phase("optimizer"):
        run.zero1.update(run.optimizer, lr=lr, grad_scale=clip_scale(norm, run.config.optim.clip_norm))
        if run.ema is not None:
            run.ema.update()
    with run.clock.phase("all_gather"):
        run.zero1.publish_update()
    with run.clock.phase("optimizer"):
        for stage in run.model.stages.values():
            weights_changed(stage)  # rounds FP8 weights anew; nothing to do in other precisions


def tokens_per_step(run: Run) -> int:
    """Tokens that the main loss of the coming step is computed on."""
    return run.plan.at(run.progress.tokens).tokens


@dataclass(frozen=True)
class _Sums:
    """Global means of main loss, MTP loss and balance loss; copies of tokens that were routed and did not arrive."""

    main: float
    mtp: float
    balance: float
    dropped: int


def _reduce_losses(run: Run, losses: Mapping[int, StageLoss]) -> _Sums:
    """Each micro-batch's last stage is on exactly one rank; routers count what they choose, experts what arrives."""
    share = run.config.train.micro_batch_size / run.plan.at(run.progress.tokens).batch
    sums = torch.zeros(4, dtype=torch.float64, device=run.process.device)
    for loss in losses.values():
        sums[0] += loss.main * share
        if loss.mtp:
            sums[1] += torch.stack(loss.mtp).mean() * share
    for shared in run.model.routers.values():
        sums[2] += shared.router.balance_loss_sum * share
        sums[3] += shared.router.counts_E.sum()
    sums[3] -= run.clock.take_rows()
    dist.all_reduce(sums, group=run.groups.world)
    main, mtp, balance, dropped = sums.tolist()
    return _Sums(main, mtp, balance, int(dropped))


def _require_finite(run: Run, loss: float, norm: float) -> None:
    """All ranks see the same loss and norm, so all stop together, and each says which ranks found what."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    bad = [
        name for name, p in run.model.parameters.items()
        if not torch.isfinite(p.weight.main_grad).all()  # type: ignore[attr-defined]
    ]  # fmt: skip
    where = f"first parameter with a non-finite gradient {bad[0]}" if bad else ""
    if tensor := fp8_samples.first_non_finite(run):
        where = "; ".join([*filter(None, [where]), f"first non-finite tensor that FP8 read {tensor}"])
    found = messages(run.groups.world, run.process.device, where)
    listed = [f"rank {rank}: {text}" for rank, text in list(found.items())[:8]] or ["no gradient is, on any rank"]
    raise NonFiniteError(
        f"step {run.progress.step + 1}: loss {loss}, gradient norm {norm}; nothing was updated. {'; '.join(listed)}"
        + (f"; and {len(found) - 8} more ranks" if len(found) > 8 else "")
    )


def _count_experts(run: Run) -> dict[int, Tensor]:
    """Tokens of the global batch for every expert of the blocks that this rank holds, by block number."""
    counts: dict[int, Tensor] = {}
    for holders in dict.fromkeys(shared.holders for shared in run.model.routers.values()):
        blocks = [block for block, shared in run.model.routers.items() if shared.holders == holders]
        stacked = torch.stack([run.model.routers[block].router.counts_E for block in blocks])
        dist.all_reduce(stacked, group=run.groups.gradient(holders, expert=False))
        counts |= dict(zip(blocks, stacked, strict=True))
    return counts


def _all_counts(run: Run, counts: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """The counts of all MoE blocks on every rank; every holder of a block brings the same ones."""
    model = run.config.model
    table = torch.zeros(model.num_blocks, model.n_routed_experts, dtype=torch.int64, device=run.process.device)
    for block, counts_E in counts.items():
        table[block] = counts_E
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=run.groups.world)
    return {block: row for block, row in enumerate(table.tolist()) if model.is_moe(block)}


@dataclass(frozen=True)
class _Balance:
    """By MoE block: load of the busiest expert over the mean, span of the biases, experts without a token if any."""

    loads: dict[int, float]
    bias_ranges: dict[int, float]
    dead: dict[int, tuple[int, ...]]


def _balance_experts(run: Run, counts: Mapping[int, Tensor], speed: float) -> _Balance:
    """Update the biases from the expert counts, forget these, and tell every rank of all blocks in one all-reduce."""
    model = run.config.model
    table = torch.zeros(model.num_blocks, 2 + num_words(model.n_routed_experts), dtype=torch.float64)
    for block, counts_E in counts.items():
        router = run.model.routers[block].router
        update_bias(router.e_score_correction_bias, counts_E, speed)
        bias = router.e_score_correction_bias
        dead = to_words((counts_E == 0).nonzero().flatten().tolist(), model.n_routed_experts)
        table[block] = torch.tensor([load_violation(counts_E), (bias.max() - bias.min()).item(), *dead])
        router.reset()
    table = table.to(run.process.device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=run.groups.world)
    rows = {block: row for block, row in enumerate(table.tolist()) if model.is_moe(block)}
    return _Balance(
        {block: row[0] for block, row in rows.items()},
        {block: row[1] for block, row in rows.items()},
        {block: found for block, row in rows.items() if (found := of_words(row[2:]))},
    )
