"""From the words of `expertpipe plan` to a `Job`: the run, the cluster and the calibration. No torch."""

import difflib
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from launcher.check.packages import GPU_KERNELS
from launcher.check.run import checked
from launcher.config import ConfigError, RunConfig
from launcher.step_plan import StepPlan
from parallel.plan import calibration
from parallel.plan.feasible import memory_problems
from parallel.plan.feasible import problems as impossible
from parallel.plan.hardware import Hardware, HardwareError, read
from parallel.plan.job import Job
from parallel.plan.kernels import Calibration

T = TypeVar("T")

CLUSTER = "h800"
# Keys that the report's engine decides.
PUBLISHED = ("train.precision", *(f"parallel.{key}" for key in (
    "dispatcher", "dispatch_wire", "dispatch_grad_wire", "combine_wire", "overlap", "recompute",
)))  # fmt: skip
CALIBRATION = "h800_overlap_trace.json"  # measured on the chip that H800, H100 and H200 share


def folder() -> Path:
    """configs/cluster."""
    import configs

    return Path(next(iter(configs.__path__))).resolve() / "cluster"


def clusters() -> list[str]:
    """Names of the hardware files that come with expertpipe."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def hardware_of(name: str) -> Hardware:
    """A cluster by its name, or from a YAML file; HardwareError with the nearest name."""
    if name.endswith((".yaml", ".yml")):
        return read(Path(name))
    known = clusters()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise HardwareError(f"--cluster {name}: no such GPU; use {', '.join(known)} or a YAML file of your own{meant}")
    return read(folder() / f"{name.lower()}.yaml")


def config_of(overrides: list[str]) -> RunConfig:
    """The run, checked as for training but for this machine and the data, which a plan does not need."""
    return checked(overrides, with_data=False, here=False)


def job_of(args: Namespace) -> Job:
    """What is to be planned; ConfigError with every problem of the run, the cluster and the calibration at once.

    A search (`args.search`) may begin from a layout that cannot be.
    """
    errors: list[str] = []
    config = _tried(errors, lambda: config_of(args.overrides))
    hardware = _tried(errors, lambda: hardware_of(args.cluster or CLUSTER))
    price = getattr(args, "price", None)
    if price is not None and not 0 <= price < math.inf:
        errors.append(f"--price {price:g}: use dollars of a GPU-hour, such as 2")
    if args.calibration not in (None, "none"):
        _tried(errors, lambda: calibration.read(Path(args.calibration)))
    if config is None or hardware is None:
        raise ConfigError(errors)
    job = of_config(config, hardware)
    if args.precision:
        job = replace(job, precision=args.precision)
    if args.as_published:
        job = as_published(job)
    if not getattr(args, "search", False):
        errors += impossible(job)
    factors = _tried(errors, lambda: calibration_of(args, job))
    if errors or factors is None:
        raise ConfigError(list(dict.fromkeys(errors)))
    return replace(job, calibration=factors)


def _tried(errors: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives; None where it fails, with its messages added to the errors."""
    try:
        return read()
    except ConfigError as error:
        errors += error.errors
    except HardwareError as error:
        errors.append(str(error))
    return None


def problems(config: RunConfig, cluster: Hardware, *, memory: bool = True) -> list[str]:
    """Every reason why a checked run cannot be on a cluster, each with what would work; empty when there is none.

    For `doctor` and `submit`. memory: whether all that a rank holds has to fit; judged where nothing else is wrong.
    """
    job = of_config(config, cluster)
    return impossible(job) or (memory_problems(job) if memory else [])


def of_config(config: RunConfig, hardware: Hardware) -> Job:
    """The run at its largest batch on a cluster; first principles until a calibration is put in."""
    *before, constant = StepPlan(config).stretches(config.train.steps)
    growing = [s for s in before if s.step.batch < constant.step.batch]
    return Job(
        model=config.model,
        parallel=config.parallel,
        hardware=hardware,
        sequence_length=constant.step.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=constant.step.batch,
        precision=config.train.precision,
        tokens=float(constant.end_tokens),
        ramp=tuple((s.step.batch, float(s.end_tokens - s.first_tokens)) for s in growing),
        moments_bytes=2 if config.optim.moments == "bf16" else 4,
        fp8=config.fp8,
        offload=config.optim.offload,
        to_offload="optim.offload=true" + (" optim.adamw=torch_fused" if config.optim.adamw in GPU_KERNELS else ""),
        ema=config.optim.ema_decay > 0,
    )


def as_published(job: Job) -> Job:
    """The report's engine: FP8, rows once a node in FP8, its recomputation, chunks alone not overlapped.

    Weights in BF16 beside the masters: it says nothing of what is gathered, but its optimizer's 0.29 s are more than
    even those take here (0.26; in FP8 0.24).
    """
    parallel = replace(
        job.parallel, dispatcher="collective", dispatch_wire="fp8", dispatch_grad_wire="fp8", combine_wire="bf16",
        overlap="pairs", recompute="report",
    )  # fmt: skip
    fp8 = replace(job.fp8, primary_weights="bf16")
    return replace(job, parallel=parallel, precision="fp8", fp8=fp8, bare=True)


def calibration_of(args: Namespace, job: Job) -> Calibration:
    """From a trace, from a file, none, or the one that comes with expertpipe."""
    if args.trace is not None:
        found = calibration.of_trace(args.trace, calibration.shape_in_trace(job), job.hardware)
        return replace(found, training=shipped().training)
    if args.calibration == "none":
        return Calibration()
    return calibration.read(Path(args.calibration))[0] if args.calibration else shipped()


def shipped() -> Calibration:
    """The calibration file in configs/cluster/calibration."""
    return calibration.read(folder() / "calibration" / CALIBRATION)[0]
