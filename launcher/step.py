"""One training step of one rank, from micro-batches to updated weights and router biases."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.build import Run
from launcher.record import fp8_samples
from launcher.safety.agreement import messages
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
    bias_range: widest span of a router's biases. expert_counts: tokens of every expert, by block number; None in a step
    that does not log them. tokens: that the main loss was computed on.
    """

    loss: float
    mtp_loss: float | None
    balance_loss: float
    lr: float
    grad_norm: float
    expert_load: dict[int, float]
    bias_range: float
    expert_counts: dict[int, list[int]] | None = None
    tokens: int = 0
    fp8: list[TensorStats] | None = None  # where a sample was due (fp8.watch_every)


def microbatch(run: Run, number: int) -> Microbatch:
    """Micro-batch `number` of this rank's pipeline in the coming step."""
    train, tokens = run.config.train, run.progress.tokens
    windows = run.loader.microbatch(
        consumed=run.progress.samples,
        microbatch=number,
        data_rank=run.mesh.data_rank,
        data_size=run.config.parallel.data,
        micro_batch_size=train.micro_batch_size,
    )
    share = train.micro_batch_size / run.plan.at(tokens).batch
    mtp_lambda = value_at(run.config.optim.mtp_lambda, tokens)
    return Microbatch(torch.from_numpy(windows).to(run.process.device), share, mtp_lambda)


def train_step(run: Run, judge: Callable[[float, float], bool] = lambda loss, norm: True) -> StepResult:
    """Forward and backward of the global batch, reduction, clip, update; `run.progress` moves on by one step.

    judge: given the global loss and gradient norm, whether weights and router biases are to be updated with them.
    """
    optim, progress = run.config.optim, run.progress
    planned = run.plan.at(progress.tokens)
    lr = value_at(optim.lr, progress.tokens + planned.tokens)  # so that the first step of a warm-up counts
    fp8_samples.begin(run)
    losses = run.executors.of(planned.num_microbatches).step(lambda number: microbatch(run, number))
    samples = fp8_samples.end(run)
    run.zero1.reduce_gradients()
    main, mtp, balance = _reduce_losses(run, losses)
    norm = global_norm(
        (bucket.grad for bucket in run.zero1.buckets),
        lambda total: dist.all_reduce(total, group=run.groups.world),
        run.process.device,
    )
    _require_finite(run, main, norm)
    updates = judge(main, norm)
    if updates:
        run.optimizer.step(lr=lr, grad_scale=clip_scale(norm, optim.clip_norm))
        if run.ema is not None:
            run.ema.update()
        run.zero1.publish_weights()
        for stage in run.model.stages.values():
            weights_changed(stage)  # rounds FP8 weights anew; nothing to do in other precisions
    run.zero1.zero_gradients()
    every = run.config.train.expert_counts_every
    counts = _count_experts(run)
    logged = _all_counts(run, counts) if every and (progress.step + 1) % every == 0 else None
    speed = value_at(optim.bias_update_speed, progress.tokens) if updates else 0.0
    loads, bias_range = _balance_experts(run, counts, speed)
    progress.step += 1
    progress.tokens += planned.tokens
    progress.samples += planned.batch
    has_mtp = run.config.model.num_nextn_predict_layers > 0
    mtp_loss = mtp if has_mtp else None
    return StepResult(main, mtp_loss, balance, lr, norm, loads, bias_range, logged, planned.tokens, fp8=samples)


def tokens_per_step(run: Run) -> int:
    """Tokens that the main loss of the coming step is computed on."""
    return run.plan.at(run.progress.tokens).tokens


def _reduce_losses(run: Run, losses: Mapping[int, StageLoss]) -> tuple[float, float, float]:
    """Global means of main loss, MTP loss and balance loss; each micro-batch's last stage is on exactly one rank."""
    share = run.config.train.micro_batch_size / run.plan.at(run.progress.tokens).batch
    sums = torch.zeros(3, dtype=torch.float64, device=run.process.device)
    for loss in losses.values():
        sums[0] += loss.main * share
        if loss.mtp:
            sums[1] += torch.stack(loss.mtp).mean() * share
    for shared in run.model.routers.values():
        sums[2] += shared.router.balance_loss_sum * share
    dist.all_reduce(sums, group=run.groups.world)
    main, mtp, balance = sums.tolist()
    return main, mtp, balance


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


def _balance_experts(run: Run, counts: Mapping[int, Tensor], speed: float) -> tuple[dict[int, float], float]:
    """Update the biases from the expert counts, forget these, and tell every rank all blocks' loads."""
    table = torch.zeros(run.config.model.num_blocks, 2, dtype=torch.float64, device=run.process.device)
    for block, counts_E in counts.items():
        router = run.model.routers[block].router
        update_bias(router.e_score_correction_bias, counts_E, speed)
        bias = router.e_score_correction_bias
        table[block] = torch.tensor([load_violation(counts_E), bias.max() - bias.min()])
        router.reset()
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=run.groups.world)
    loads = {block: table[block, 0].item() for block in range(len(table)) if run.config.model.is_moe(block)}
    return loads, table[:, 1].max().item()
