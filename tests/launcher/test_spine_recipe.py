"""A batch that grows and sequences that lengthen: many ranks equal one process, and a restart equals none, bitwise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataPhase
from launcher import build as build_module
from launcher.build import build, open_data
from launcher.checkpoint.state import load, save
from launcher.config import RunConfig, compose
from launcher.continuation import begin_with
from launcher.inference import InferenceError, load_model
from launcher.runtime import process_group
from launcher.step import train_step
from model.config import RopeScaling
from optim.config import Segment
from tests.distributed import run_distributed
from tests.launcher.checkpoint.states import VOCAB, prepared
from tests.launcher.spine import config, parallel_trace, plain_trace, write_tokens
from tests.launcher.test_spine import compare

BATCHES, LENGTHS = (8, 12, 16), (16, 16, 32)  # of the three steps


def growing(prefix: str, run_dir: str = "unused", **layout: Any) -> RunConfig:
    """Steps of 8 x 16, 12 x 16 and 16 x 32 tokens."""
    plain = config(prefix, run_dir=run_dir, **layout)
    ramp = (Segment("constant", 8, 1), Segment("linear", 16, 200))
    data = replace(plain.data, sequence_length=16, phases=(DataPhase(8 * 16 + 12 * 16, 32),))
    train = replace(plain.train, global_batch_size=ramp, batch_multiple=4)
    return replace(plain, train=train, data=data, optim=replace(plain.optim, ema_decay=0.5))


def test_a_growing_batch_of_longer_sequences_equals_one_process(tmp_path: Path) -> None:
    prefix = write_tokens(str(tmp_path / "tokens"))
    run_config = growing(prefix, pipeline=2, expert=2, data=2, schedule="dualpipe", layers=(2, 4))
    assert run_config.microbatch_counts == (4, 6, 8)
    plain = plain_trace(run_config, batches=BATCHES)
    ranks = run_distributed(4, parallel_trace, run_config)
    for step, (batch, length) in enumerate(zip(BATCHES, LENGTHS, strict=True)):
        assert ranks[0][step]["result"].tokens == batch * length
    compare(run_config, ranks, plain)


def states(run: Any) -> list[torch.Tensor]:
    shards = [getattr(shard, kind) for shard in run.optimizer.shards for kind in ("master", "exp_avg", "exp_avg_sq")]
    biases = [shared.router.e_score_correction_bias for shared in run.model.routers.values()]
    averages = run.ema.averages() if run.ema else []
    return [tensor.clone() for tensor in (*shards, *biases, *averages)]


def stop_and_go(run_config: RunConfig) -> None:
    """In one rank: three steps; then the same with a new build after each."""
    with process_group(run_config.train) as process:
        straight = build(run_config, process)
        losses = [train_step(straight).loss for _ in range(3)]
        found: list[float] = []
        path, run = None, straight
        for _ in range(3):
            run = build(run_config, process)
            if path is not None:
                load(run, path)
            found.append(train_step(run).loss)
            path = save(run)
        assert found == losses and vars(run.progress) == vars(straight.progress)
        assert all(torch.equal(a, b) for a, b in zip(states(run), states(straight), strict=True))


def test_a_restart_at_any_point_of_the_ramp_changes_nothing(tmp_path: Path) -> None:
    prefix = prepared(tmp_path / "data")
    layout = {"pipeline": 2, "expert": 1, "data": 1, "schedule": "dualpipe", "layers": (2, 2), "model": VOCAB}
    run_distributed(2, stop_and_go, growing(prefix, str(tmp_path / "run"), **layout))


def averaged(run_config: RunConfig) -> None:
    """In one rank: a model loaded with `ema` has the average that plain arithmetic gives."""
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        expected = [shard.master.double() for shard in run.optimizer.shards]
        for _ in range(2):
            train_step(run)
            expected = [0.5 * old + 0.5 * s.master for old, s in zip(expected, run.optimizer.shards, strict=True)]
        path = save(run)
        averaged_model, model = (dict(load_model(path, ema=ema).named_parameters()) for ema in (True, False))
        for bucket, flat in zip(run.zero1.buckets, expected, strict=True):
            for piece in bucket.pieces():
                wanted = flat[piece.start : piece.stop].float().view(piece.shape)
                torch.testing.assert_close(averaged_model[piece.name].data, wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(averaged_model["lm_head.weight"], model["lm_head.weight"])
        none = replace(run_config.optim, ema_decay=0.0)
        without = save(build(replace(run_config, run_dir=run_config.run_dir + "-none", optim=none), process))
        with pytest.raises(InferenceError, match="holds no average of the weights: train with optim"):
            load_model(without, ema=True)
        load(run, without, same_run=False)  # an average begins where there was none
        assert run.ema is not None
        assert all(map(torch.equal, run.ema.averages(), (bucket.master for bucket in run.zero1.buckets)))


def test_the_average_of_the_weights_is_kept_and_scored(tmp_path: Path) -> None:
    layout: dict[str, Any] = {"pipeline": 1, "expert": 1, "data": 1, "schedule": "1f1b", "model": VOCAB}
    run_distributed(1, averaged, growing(prepared(tmp_path / "data"), str(tmp_path / "run"), **layout))


def extend(before: RunConfig, after: RunConfig) -> None:
    with process_group(before.train) as process:
        first = build(before, process)
        train_step(first)
        save(first)
        second = build(after, process)
        begin_with(second, Path(before.run_dir))
        assert vars(second.progress) == {"step": 0, "tokens": 0, "samples": 0}
        assert second.optimizer.steps == 1
        assert all(torch.equal(a, b) for a, b in zip(states(second), states(first), strict=True))
        other, same = (build(c, process) for c in (after, before))
        for run in (other, same):
            begin_with(run, Path(before.run_dir))
        assert train_step(other).loss != train_step(same).loss  # positions turn otherwise


def test_an_extension_begins_with_weights_and_moments_at_step_0(tmp_path: Path) -> None:
    prefix = prepared(tmp_path / "data")
    layout: dict[str, Any] = {"pipeline": 1, "expert": 1, "data": 1, "schedule": "1f1b", "microbatches": 4}
    before = config(prefix, run_dir=str(tmp_path / "before"), model=VOCAB, **layout)
    longer = replace(VOCAB, max_position_embeddings=64, rope_scaling=RopeScaling(2.0, 32))
    after = config(prefix, run_dir=str(tmp_path / "after"), model=longer, **layout)
    run_distributed(1, extend, before, after)


def test_documents_are_turned_at_the_rate_of_the_tokens_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}
    monkeypatch.setattr(build_module, "Loader", lambda data, fim_rate: taken.update(rate=fim_rate))
    rates = "optim.fim_rate=[{shape: constant, value: 0.1, tokens: 100}, {shape: constant, value: 0.05}]"
    open_data(compose([rates]))
    assert [taken["rate"](tokens) for tokens in (0, 99, 100)] == [0.1, 0.1, 0.05]
    open_data(compose([]))
    assert taken["rate"] is None
