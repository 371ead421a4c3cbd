"""What can be wrong between the packages of a run, found before any process starts: many small rules, no torch.

A rule is a pure function from the configuration to messages. Each message names the key, its value and a value that
would work. Rules do not build on one another: a rule whose inputs another rule rejects says nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from launcher.check.fp8 import (
    check_deep_gemm,
    check_fp8_gpu,
    check_fp8_packages,
    check_fp8_words,
    check_primary_weights,
    check_transformer_engine,
)
from launcher.check.layout import (
    check_batch,
    check_experts,
    check_nodes,
    check_schedule,
    check_stages,
    check_world_size,
    divisors,
    either,
)
from launcher.check.machine import torch_cuda
from launcher.check.packages import PACKAGE_CHOICES, check_offload, check_packages
from launcher.check.recipe import (
    check_continuation,
    check_data,
    check_phases,
    check_positions,
    check_predecessor,
    check_segments,
)
from launcher.check.record import check_record, check_wandb
from launcher.check.rowwise import ROWWISE, WEIGHT_GRAD, check_compiler, check_rowwise
from launcher.check.safety import check_safety
from launcher.config import ConfigError, RunConfig, draft
from launcher.schedule_choice import resolved
from parallel.config import COMBINE_WIRES, DISPATCH_WIRES, DISPATCHERS

Rule = Callable[[RunConfig], list[str]]

# Least value of a whole number; 1 for the keys not named here.
MINIMUM = {
    "model.first_k_dense_replace": 0,
    "model.n_shared_experts": 0,
    "model.num_nextn_predict_layers": 0,
    "data.seed": 0,
    "train.seed": 0,
    "train.threads": 0,
    "train.batch_multiple": 0,
    "train.checkpoint_every": 0,
    "train.keep_every": 0,
    "train.max_epochs": 0,
    "train.spike_window": 8,
    "train.silent_rank_seconds": 3,
    "train.stuck_seconds": 3,
    "train.expert_counts_every": 0,
    "train.norms_every": 0,
    "train.rank_events_every": 0,
    "train.collapse_steps": 0,
    "fp8.watch_every": 0,
    "train.record_actions_every": 0,
    "train.keep_checkpoints": 2,  # the newest may be the one that a crash has cut off
}
# Real numbers: the test, and the range in words with a value that works.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "optim.beta1": (lambda x: 0 <= x < 1, "at least 0 and below 1, such as 0.9"),
    "optim.beta2": (lambda x: 0 <= x < 1, "at least 0 and below 1, such as 0.95"),
    "optim.eps": (lambda x: 0 < x < 1, "between 0 and 1, such as 1e-8"),
    "optim.weight_decay": (lambda x: 0 <= x < math.inf, "0 or more, such as 0.1"),
    "optim.ema_decay": (lambda x: 0 <= x < 1, "at least 0 and below 1, such as 0.999, or 0 for none"),
    "optim.clip_norm": (lambda x: x > 0, "above 0, such as 1.0, or inf for no clipping"),
    "parallel.all_to_all_over_compute": (lambda x: 0 <= x < math.inf, "0 or more, such as 1.0"),
    "parallel.memory_gib": (lambda x: 0 < x < math.inf, "above 0, such as 60, or null for no limit"),
    "train.spike_loss": (lambda x: x > 0, "above 0, such as 1.0, or inf for no limit"),
    "train.spike_grad_norm": (lambda x: x > 1, "above 1, such as 20, or inf for no limit"),
    "model.rms_norm_eps": (lambda x: 0 < x < 1, "between 0 and 1, such as 1e-6"),
    "model.rope_theta": (lambda x: 1 < x < math.inf, "above 1, such as 10000"),
    "model.initializer_range": (lambda x: 0 < x < math.inf, "above 0, such as 0.006"),
    "model.aux_loss_alpha": (lambda x: 0 <= x < math.inf, "0 or more, such as 1e-4"),
    "model.routed_scaling_factor": (lambda x: 0 < x < math.inf, "above 0, such as 2.5"),
    "model.rope_scaling.factor": (lambda x: 1 <= x < math.inf, "1 or more, such as 40"),
    "model.rope_scaling.beta_fast": (lambda x: 0 < x < math.inf, "above 0, such as 32"),
    "model.rope_scaling.beta_slow": (lambda x: 0 < x < math.inf, "above 0, such as 1"),
}


def problems(config: RunConfig, world_size: int | None, with_data: bool = True, *, here: bool = True) -> list[str]:
    """Every reason why this run could not start or would not mean what it says; empty when there is none.

    world_size: processes that an outer launcher has started; None when the run starts its own. with_data: whether the
    token files and the checkpoint to begin with must be there. here: whether this machine is to run it.
    """
    found = [message for rule in RULES + MACHINE_RULES * here for message in rule(config)]
    if world_size is not None:
        found.extend(check_world_size(config, world_size))
    if with_data:
        found.extend(check_data(config))
        found.extend(check_predecessor(config))
    return list(dict.fromkeys(found))


def checked(
    overrides: Sequence[str], *, world_size: int | None = None, with_data: bool = True, here: bool = True
) -> RunConfig:
    """The run that the overrides describe, or a ConfigError with what is wrong in them and between them, together."""
    result = draft(overrides)
    errors = list(result.errors)
    if result.config is not None:
        # the draft holds another value than the one given for these keys: a message on it would mislead
        stale = tuple(f"{key}=" for key in result.bad_keys)
        found = problems(result.config, world_size, with_data=with_data, here=here)
        errors += [message for message in found if not any(key in message for key in stale)]
    if errors or result.config is None:
        raise ConfigError(errors)
    return resolved(result.config)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of nested dataclasses, lists as one value."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


# --- single values -----------------------------------------------------------------------------------------------


def check_whole_numbers(config: RunConfig) -> list[str]:
    """Counts and sizes have a least value."""
    found = []
    for key, value in leaves(config):
        least = MINIMUM.get(key, 1)
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            found.append(f"{key}={value}: use {least} or more")
    return found


def check_real_numbers(config: RunConfig) -> list[str]:
    """Rates, coefficients and epsilons lie in their ranges."""
    values = [(key, value, *RANGES[key]) for key, value in leaves(config) if key in RANGES and value is not None]
    return [f"{key}={value:g}: use a number {words}" for key, value, is_good, words in values if not is_good(value)]


def check_choices(config: RunConfig) -> list[str]:
    """Words that choose an implementation are known ones."""
    from parallel.pipeline.schedules import SCHEDULES, is_file

    choices: dict[str, Sequence[str]] = {
        "parallel.schedule": (*SCHEDULES, "auto", "a .csv file"),
        "parallel.overlap": ("off", "pairs", "all"),
        "parallel.recompute": ("none", "report", "attend", "layer"),
        "parallel.dispatcher": DISPATCHERS,
        "parallel.dispatch_wire": DISPATCH_WIRES,
        "parallel.dispatch_grad_wire": DISPATCH_WIRES,
        "parallel.combine_wire": COMBINE_WIRES,
        "optim.moments": ("bf16", "fp32"),
        **PACKAGE_CHOICES,
        "train.precision": ("bf16", "fp32", "fp8"),
        "train.rowwise": ROWWISE,
        "train.weight_grad": WEIGHT_GRAD,
        "train.spike_policy": ("warn", "skip", "rollback"),
        "train.device": ("auto", "cpu", "cuda"),
        "model.mtp_hidden": ("after_norm", "before_norm"),
        "model.rope_scaling.type": ("yarn",),
    }
    values = [
        (key, value) for key, value in leaves(config)
        if key in choices and not (key == "parallel.schedule" and is_file(value))
    ]  # fmt: skip
    return [f"{key}={value}: use {either(choices[key])}" for key, value in values if value not in choices[key]]


def check_names(config: RunConfig) -> list[str]:
    """Names that become paths are not empty."""
    values = {"name": config.name, "run_dir": config.run_dir, "data.prefix": config.data.prefix}
    return [f"{key}='': use a name such as {key}=runs/tiny" for key, value in values.items() if not value.strip()]


# --- the model ---------------------------------------------------------------------------------------------------


def check_routing(config: RunConfig) -> list[str]:
    """Experts, groups and top-k leave the router a choice."""
    model = config.model
    experts, groups, chosen = model.n_routed_experts, model.n_group, model.topk_group
    if min(experts, groups, chosen, model.num_experts_per_tok) < 1:
        return []
    if experts % groups:
        good = either(divisors(experts))
        return [f"model.n_group={groups} does not divide model.n_routed_experts={experts}: use {good}"]
    found = []
    if chosen > groups:
        found.append(f"model.topk_group={chosen} is more than model.n_group={groups}: use {groups} or fewer")
    if groups > 1 and experts // groups < 2:
        found.append(
            f"model.n_group={groups} leaves one expert a group, whose score is the sum of its best two "
            f"(model.n_routed_experts={experts}): use {either(divisors(experts)[:-1])}"
        )
    reachable = min(chosen, groups) * (experts // groups)
    if model.num_experts_per_tok > reachable:
        found.append(
            f"model.num_experts_per_tok={model.num_experts_per_tok} is more than the {reachable} experts in "
            f"model.topk_group={chosen} groups of {experts // groups}: use {reachable} or fewer"
        )
    return found


def check_layers(config: RunConfig) -> list[str]:
    """Dense layers come out of the model's layers, and rotary dimensions in pairs."""
    model, found = config.model, []
    if model.first_k_dense_replace > model.num_hidden_layers >= 1:
        found.append(
            f"model.first_k_dense_replace={model.first_k_dense_replace} is more than "
            f"model.num_hidden_layers={model.num_hidden_layers}: use {model.num_hidden_layers} or fewer"
        )
    if model.qk_rope_head_dim % 2 and model.qk_rope_head_dim > 0:
        size = model.qk_rope_head_dim
        found.append(f"model.qk_rope_head_dim={size} is odd, rotation takes pairs: use {size + 1}")
    scaling = model.rope_scaling
    if scaling and scaling.beta_fast <= scaling.beta_slow:
        found.append(
            f"model.rope_scaling.beta_fast={scaling.beta_fast:g} is not above "
            f"model.rope_scaling.beta_slow={scaling.beta_slow:g}: use 32 and 1"
        )
    return found


# --- the machine ------------------------------------------------------------------------------------------------


def check_device(config: RunConfig) -> list[str]:
    """CUDA is asked for only where the installed torch has it; looked up without importing torch."""
    if config.train.device != "cuda" or torch_cuda():
        return []
    return [
        "train.device=cuda, but the torch installed here is built without CUDA: use train.device=cpu or auto, or "
        "install a CUDA build (expertpipe doctor shows what is there)"
    ]


RULES: tuple[Rule, ...] = (
    check_whole_numbers,
    check_real_numbers,
    check_choices,
    check_names,
    check_segments,
    check_routing,
    check_layers,
    check_positions,
    check_continuation,
    check_experts,
    check_nodes,
    check_batch,
    check_schedule,
    check_stages,
    check_phases,
    check_fp8_words,
    check_primary_weights,
    check_transformer_engine,
    check_deep_gemm,
    check_safety,
    check_offload,
    check_record,
    check_rowwise,
)
# What depends on the machine that asks: left out where a run for another one is planned or drawn.
MACHINE_RULES: tuple[Rule, ...] = (
    check_device,
    check_fp8_packages,
    check_fp8_gpu,
    check_packages,
    check_wandb,
    check_compiler,
)
