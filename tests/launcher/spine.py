"""Both sides of the central equality: a small run on N ranks, and the plain model in one process.

The plain side knows nothing of pipelines, experts over ranks or shards: one model, a loop over micro-batches, torch's
own AdamW and clipping.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.loader import Loader
from data.tokens import TokenWriter
from launcher.build import Run, build
from launcher.config import RunConfig, TrainConfig
from launcher.runtime import process_group
from launcher.step import StepResult, train_step
from model.attention import documents_of
from model.config import ModelConfig
from model.init import initialise
from model.transformer import Losses, Microbatch, Transformer
from optim.config import OptimConfig, Segment
from optim.schedule import value_at
from parallel.config import ParallelConfig

STEPS = 3
MODEL = ModelConfig(
    vocab_size=256, hidden_size=48, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=6,
    num_attention_heads=3, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=24, q_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, max_position_embeddings=32, initializer_range=0.05, aux_loss_alpha=1e-2,
)  # fmt: skip


def write_tokens(prefix: str, *, num_tokens: int = 20_000, vocab_size: int = 256) -> str:
    """A token file of skewed random ids; gives the prefix."""
    rng = np.random.default_rng(0)
    with TokenWriter(prefix, "uint16") as writer:
        writer.add((vocab_size * rng.random(num_tokens) ** 2).astype(np.uint16))
    return prefix


def config(
    prefix: str,
    *,
    pipeline: int,
    expert: int,
    data: int,
    schedule: str,
    layers: tuple[int, ...] | None = None,
    microbatches: int = 8,
    model: ModelConfig = MODEL,
    run_dir: str = "unused",
    clip_norm: float = 0.5,
    overlap: str = "pairs",
    recompute: str = "none",
) -> RunConfig:
    """A run with FP32 arithmetic and moments, MTP on, a learning rate that changes every step."""
    optim = OptimConfig(
        lr=(Segment("linear", 3e-4, 5000), Segment("cosine", 3e-5, 1e5)),
        mtp_lambda=(Segment("constant", 0.3),),
        bias_update_speed=(Segment("constant", 1e-3),),
        moments="fp32",
        clip_norm=clip_norm,
    )
    parallel = ParallelConfig(
        pipeline=pipeline, data=data, expert=expert, schedule=schedule, layers_per_stage=layers, overlap=overlap,
        recompute=recompute,
    )  # fmt: skip
    train = TrainConfig(
        steps=STEPS, global_batch_size=microbatches * data, micro_batch_size=1, precision="fp32", device="cpu",
        timeout_seconds=100, threads=1,
    )  # fmt: skip
    return RunConfig("spine", run_dir, model, parallel, optim, DataConfig(prefix, sequence_length=32), train)


@dataclass(frozen=True)
class Trace:
    """What is compared, for each step: results and the whole model's gradients, weights, biases by global name."""

    results: list[StepResult]
    grads: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]
    biases: list[dict[int, Tensor]]
    counts: list[dict[int, Tensor]]


def pieces(run: Run, kind: str) -> dict[tuple[str, int], Tensor]:
    """This rank's shards, `grad` or `master`: (name, offset in the global tensor) -> flat values."""
    found = {}
    for bucket in run.zero1.buckets:
        flat: Tensor = getattr(bucket, kind)
        for piece in bucket.pieces():
            found[piece.name, piece.offset] = flat[piece.start : piece.stop].clone()
    return found


def parallel_trace(run_config: RunConfig, mutate: Any = None) -> list[dict[str, Any]]:
    """One rank's side: what it held after each step. mutate(run) plants a fault before the first step."""
    from launcher import step as step_module

    with process_group(run_config.train) as process:
        run = build(run_config, process)
        if mutate is not None:
            mutate(run)
        trace: list[dict[str, Any]] = []
        seen: dict[str, Any] = {}
        plain_update = step_module.update_bias

        def spy(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
            plain_update(bias_E, counts_E, speed)
            seen.setdefault("counts", []).append(counts_E.clone())

        step_module.update_bias = spy
        plain_zero = run.zero1.zero_gradients

        def snapshot() -> None:
            seen["grad"] = pieces(run, "grad")
            plain_zero()

        run.zero1.zero_gradients = snapshot
        for _ in range(STEPS):
            seen.clear()
            result = train_step(run)
            by_holders = [s.holders for s in run.model.routers.values()]
            order = [
                block for holders in dict.fromkeys(by_holders) for block, s in run.model.routers.items()
                if s.holders == holders
            ]  # fmt: skip
            trace.append({
                "result": result,
                "grad": seen["grad"],
                "weight": pieces(run, "master"),
                "bias": {b: s.router.e_score_correction_bias.clone() for b, s in run.model.routers.items()},
                "counts": dict(zip(order, seen.get("counts", []), strict=True)),
                "peak_live": run.executor.peak_live,
            })  # fmt: skip
        return trace


def assemble(shards: list[dict[tuple[str, int], Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' pieces; fails unless every element of every tensor is there exactly once."""
    whole = {name: torch.zeros(tensor.numel()) for name, tensor in like.items()}
    covered = {name: torch.zeros(tensor.numel(), dtype=torch.int32) for name, tensor in like.items()}
    for shard in shards:
        for (name, offset), values in shard.items():
            whole[name][offset : offset + len(values)] = values
            covered[name][offset : offset + len(values)] += 1
    for name, times in covered.items():
        assert (times == 1).all(), f"{name}: elements held {sorted(set(times.tolist()))} times"
    return {name: flat.view_as(like[name]) for name, flat in whole.items()}


class _Alias(torch.nn.Module):
    """The embedding as MTP uses it, with a gradient accumulator of its own."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.module = embedding
        self.grad = torch.zeros_like(embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        from model.transformer import _Embedding

        return _Embedding.apply(self.module.weight, ids, self)  # type: ignore[return-value]

    def put(self, weight: Tensor, add: Any) -> None:
        add(self.grad)


def plain_trace(run_config: RunConfig, *, batches: Sequence[int] = ()) -> Trace:
    """The same steps by one process, one model, one loop, torch's AdamW and clip.

    batches: sequences of each step; none: the configured number in all.
    """
    c = replace(run_config, parallel=ParallelConfig())
    model = Transformer(c.model)
    initialise(model, std=c.model.initializer_range, seed=c.train.seed)
    named = dict(model.named_parameters())
    # Two uses of one embedding on two stages add up separately in a pipeline; floating-point sums are not associative,
    # so the plain side must keep them apart too where equality is to be exact.
    plain_embedding = model.embed_tokens
    assert plain_embedding is not None
    alias = _Alias(plain_embedding)
    decayed = [w for w in named.values() if w.ndim > 1]
    others = [w for w in named.values() if w.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=0.0, betas=(c.optim.beta1, c.optim.beta2), eps=c.optim.eps, weight_decay=c.optim.weight_decay,
    )  # fmt: skip
    loader, trace = Loader(c.data), Trace([], [], [], [], [])
    tokens, samples = 0, 0
    for batch in batches or STEPS * [run_config.batch_levels[0].batch]:
        ids = np.arange(samples, samples + batch)
        windows = torch.from_numpy(loader.windows(ids))
        samples += batch
        documents: list[Any] = [None] * batch
        if c.data.document_mask:
            documents = [[spans] for spans in documents_of(torch.from_numpy(loader.documents(ids)[:, :-1]))]
        losses = [
            _plain_microbatch(
                model, alias, Microbatch(row[None], 1 / batch, value_at(c.optim.mtp_lambda, tokens), spans)
            )
            for row, spans in zip(windows, documents, strict=True)
        ]
        for weight in named.values():
            weight.grad = weight.main_grad.clone()  # type: ignore[attr-defined]
            weight.main_grad.zero_()  # type: ignore[attr-defined]
        assert plain_embedding.weight.grad is not None
        plain_embedding.weight.grad += alias.grad
        alias.grad.zero_()
        trace.grads.append({name: w.grad.clone() for name, w in named.items() if w.grad is not None})
        norm = torch.cat([grad.flatten().double() for grad in trace.grads[-1].values()]).norm()
        torch.nn.utils.clip_grads_with_norm_(list(named.values()), c.optim.clip_norm, norm.float())
        tokens += batch * (windows.shape[1] - 1)
        for group in optimizer.param_groups:
            group["lr"] = value_at(c.optim.lr, tokens)
        optimizer.step()
        trace.weights.append({name: w.detach().clone() for name, w in named.items()})
        _plain_routers(model, trace, speed=1e-3)
        main, mtp = (torch.stack([pair[i] for pair in losses]).double().mean().item() for i in (0, 1))
        trace.results.append(StepResult(main, mtp, 0.0, optimizer.param_groups[0]["lr"], norm.item(), {}, {}))
    return trace


def _plain_microbatch(model: Transformer, alias: _Alias, batch: Microbatch) -> tuple[Tensor, Tensor]:
    losses, hidden = Losses(), None
    plain = model.embed_tokens
    for i, link in enumerate(model.chain()):
        model.embed_tokens = alias if i else plain  # type: ignore[assignment]
        hidden = link.enter(hidden, batch, losses)
        if link.block is not None:
            hidden = link.block(hidden, model.rotations[: hidden.shape[1]], batch.share, batch.documents)
    model.embed_tokens = plain
    loss = losses.result()
    loss.loss.backward()
    return loss.main, torch.stack(loss.mtp).mean()


def _plain_routers(model: Transformer, trace: Trace, *, speed: float) -> None:
    """The rule in its own words: more tokens than the mean, bias down; fewer, up."""
    biases, counts = {}, {}
    for block, router in model.routers().items():
        counts[block] = router.counts_E.clone()
        mean = counts[block].double().mean()
        with torch.no_grad():
            for expert, count in enumerate(counts[block].tolist()):
                if count != mean:
                    router.e_score_correction_bias[expert] -= speed if count > mean else -speed
        biases[block] = router.e_score_correction_bias.clone()
        router.reset()
    trace.biases.append(biases)
    trace.counts.append(counts)
