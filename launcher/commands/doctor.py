"""What this machine has and what is missing for each back end: one table, each line with what to do.

Packages are looked up, not imported: several back ends fail, compile or wait when imported without their hardware.
torch alone is imported, for what only it can tell.
"""

import importlib.metadata
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from launcher.check.packages import deepspeed_problem, missing_tools
from launcher.check.recipe import is_data_missing, prepare_command
from launcher.check.run import problems
from launcher.config import RunConfig, draft
from launcher.plan.inputs import CLUSTER, clusters, hardware_of
from launcher.plan.inputs import problems as cluster_problems
from launcher.schedule_choice import resolved

TABLE_COLUMNS = 80
GIB = 1 << 30
_NEEDED_PACKAGES = ("numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers", "matplotlib", "rich")


@dataclass(frozen=True)
class Row:
    """One line of the table; status is `ok`, `missing` (this run does without), `note` or `FAIL` (it does not)."""

    name: str
    status: str
    found: str
    advice: str = ""


def doctor(overrides: Sequence[str], as_json: bool = False) -> int:
    """Prints what this machine offers to the run that the overrides describe (default experiment=tiny).

    Returns 0 when all that the run needs is there, 1 otherwise. Data not prepared yet is a note, not a failure.
    """
    chosen = list(overrides)
    if not any(text.lstrip("+").startswith("experiment=") for text in chosen):
        chosen.insert(0, "experiment=tiny")
    result = draft(chosen)
    found = [*examine(result.config), *(Row("config", "FAIL", message) for message in result.errors)]
    if result.config is not None:
        found += config_rows(result.config, is_clean=not result.errors)
        if not result.errors and not problems(result.config, None, with_data=False, here=False):
            found += cluster_rows(result.config)
    failed = any(row.status == "FAIL" for row in found)
    if as_json:
        print(json.dumps({"ok": not failed, "overrides": chosen, "rows": [asdict(row) for row in found]}))
    else:
        print_table(found, " ".join(chosen))
    return int(failed)


def examine(config: RunConfig | None) -> list[Row]:
    """The machine's rows, judged by what `config` needs (by a run on the CPU when it is None)."""
    needs_cuda = config is not None and config.train.device == "cuda"
    run_dir = Path(config.run_dir) if config else Path()
    return [
        python_row(),
        *torch_rows(needs_cuda),
        *package_rows(),
        *backend_rows(),
        slurm_row(),
        port_row(),
        disk_row(run_dir),
        shared_memory_row(needs_cuda),
        cores_row(config.parallel.world_size if config else 1, needs_cuda),
    ]


def config_rows(config: RunConfig, *, is_clean: bool = True) -> Iterator[Row]:
    """One row for each problem of the run, or one that says there is none."""
    without_data = problems(config, None, with_data=False)
    for message in without_data:
        yield Row("config", "FAIL", message)
    if is_clean and not without_data:
        yield Row("config", "ok", f"{config.name}: {config.parallel.world_size} processes, {config.parallel.schedule}")
    if is_data_missing(config):
        yield Row("data", "note", f"{config.data.prefix} not prepared yet", prepare_command(config))
        return
    broken = [message for message in problems(config, None) if message not in without_data]
    for message in broken:
        yield Row("data", "FAIL", message)
    if not broken:
        yield Row("data", "ok", config.data.prefix)


def cluster_rows(config: RunConfig) -> Iterator[Row]:
    """What the planner says of a run that would use GPUs: on those here, else on those that `plan` takes by default.

    Where these are not the GPUs here, the row says so.
    """
    gpu = "" if config.train.device == "cpu" else gpu_here()
    if not gpu and config.train.device != "cuda":
        return
    known = next((name for name in clusters() if re.search(rf"\b{name}\b", gpu.lower())), None)
    hardware = hardware_of(known or CLUSTER)
    judged, advice = "", ""
    if known is None:
        here = f"there is no file for {gpu}" if gpu else "no GPU is here"
        judged = f" (judged as {hardware.name}: {here})"
        advice = "expertpipe plan --cluster FILE.yaml judges by its numbers" if gpu else ""
    found = cluster_problems(resolved(config), hardware)
    for message in found:
        yield Row("cluster", "FAIL", f"{message}{judged}")
    if not found:
        fits = f"fits {config.parallel.world_size} {hardware.name} by expertpipe plan{judged}"
        yield Row("cluster", "ok", fits, advice)


def gpu_here() -> str:
    """The first GPU's name as its driver gives it; empty without a usable one."""
    try:
        import torch
    except (ImportError, OSError):  # `torch_rows` says so
        return ""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def print_table(found: Sequence[Row], title: str) -> None:
    """The rows as a table of at most 80 columns, the run's own problems in full below it, and a line that sums up."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=TABLE_COLUMNS)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=TABLE_COLUMNS, show_edge=False)
    table.add_column("what", width=15, overflow="fold")
    table.add_column("status", width=7)
    table.add_column("found", ratio=1, overflow="fold")
    table.add_column("what to do", ratio=1, overflow="fold")
    colours = {"ok": "green", "missing": "dim", "note": "yellow", "FAIL": "bold red"}
    problem_rows = [row for row in found if row.status == "FAIL" and not row.advice]
    for row in found:
        if row in problem_rows:
            continue  # a sentence, for which a column is too narrow
        table.add_row(Text(row.name), Text(row.status, style=colours[row.status]), Text(row.found), Text(row.advice))
    console.print(table)
    for row in problem_rows:
        console.print(Text("\n").append("FAIL ", style=colours["FAIL"]).append(f"{row.name}: {row.found}"))
    if problem_rows:
        console.print()
    num_failed = sum(row.status == "FAIL" for row in found)
    verdict = f"{num_failed} to mend before it can start" if num_failed else "all that this run needs is here"
    console.print(Text(f"{title}: {verdict}"))


# --- rows --------------------------------------------------------------------------------------------------------


def python_row() -> Row:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Row("python", "ok", f"{version}, {sys.prefix}")


def torch_rows(needs_cuda: bool) -> list[Row]:
    """torch's build, its GPUs, and the transports of torch.distributed."""
    needed = "FAIL" if needs_cuda else "missing"
    if find_spec("torch") is None:
        return [Row("torch", "FAIL", "not installed", "make setup")]
    try:
        import torch
        import torch.distributed
    except (ImportError, OSError) as error:
        return [Row("torch", "FAIL", f"does not import: {error}", "reinstall it: make clean setup")]
    cuda, version = torch.version.cuda, str(torch.__version__)
    build = f"{version}, CUDA {cuda}" if cuda else f"{version}, CPU build"
    in_range = version.startswith("2.13.")
    rows = [Row("torch", "ok" if in_range else "note", build, "" if in_range else "2.13.0 is the version tested")]
    if cuda and torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability(0))
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, capability {capability}"
        rows.append(Row("CUDA", "ok", gpus))
    elif cuda:
        rows.append(Row("CUDA", needed, "no usable GPU", "check nvidia-smi and the driver"))
    else:
        rows.append(Row("CUDA", needed, "torch is a CPU build", "for GPUs install torch's CUDA build"))
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    rows.append(_nccl_row(has_nccl, needed))
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        rows.append(Row("gloo", "ok", "in torch"))
    else:
        rows.append(Row("gloo", "missing" if needs_cuda else "FAIL", "not in this torch", "install torch 2.13.0"))
    return rows


def _nccl_row(has_nccl: bool, needed: str) -> Row:
    if not has_nccl:
        return Row("NCCL", needed, "not in this torch", "comes with torch's CUDA build")
    import torch.cuda.nccl

    version = torch.cuda.nccl.version()
    return Row("NCCL", "ok", ".".join(map(str, version)) if isinstance(version, tuple) else str(version))


def package_rows() -> list[Row]:
    """The packages that every run needs, in one row, and those of the tests."""
    absent = [name for name in _NEEDED_PACKAGES if distribution_version(name) is None]
    count = len(_NEEDED_PACKAGES)
    if absent:
        rows = [Row("packages", "FAIL", f"not installed: {', '.join(absent)}", "make setup")]
    else:
        rows = [Row("packages", "ok", f"all {count}, tokenizers {distribution_version('tokenizers')}")]
    transformers = distribution_version("transformers")
    if transformers:
        rows.append(Row("transformers", "ok", f"{transformers} (tests only)"))
    else:
        rows.append(Row("transformers", "missing", "tests compare with it", "pip install -e .[test]"))
    return rows


def backend_rows() -> list[Row]:
    """The optional GPU back ends, looked up without importing them."""
    return [
        _package_row(
            "Transf. Engine", ("transformer-engine", "transformer_engine"), "pip install -e .[gpu], needs CUDA, cuDNN"
        ),
        apex_row(),
        _package_row("megatron-core", ("megatron-core",), "pip install -e .[megatron]"),
        _deepspeed_row(),
        _package_row(
            "DeepEP", ("deep_ep", "deep-ep"), "build from source: github deepseek-ai/DeepEP", module="deep_ep"
        ),
    ]


def apex_row() -> Row:
    """NVIDIA's apex by its compiled module; the package registry's `apex` is an unrelated project."""
    version = distribution_version("apex")
    if has_module("amp_C"):
        return Row("NVIDIA apex", "ok", f"amp_C found, version {version or 'unknown'}")
    build = "slurm/install.sh builds NVIDIA's from source"
    spec = find_spec("apex")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or () if spec else ())]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return Row("NVIDIA apex", "note", f"{version or ''} without its CUDA extensions (amp_C)".strip(), build)
    if version is not None or spec is not None:
        found = f"apex {version or ''} is an unrelated package, not NVIDIA's"
        return Row("NVIDIA apex", "note", found, f"pip uninstall apex; {build}")
    return Row("NVIDIA apex", "missing", "no amp_C", f"{build}; `pip install apex` is not it")


def _deepspeed_row() -> Row:
    row = _package_row("deepspeed", ("deepspeed",), "pip install -e .[deepspeed]")
    if row.status == "ok" and deepspeed_problem("deepspeed", ""):
        return Row("deepspeed", "note", f"{row.found}, not a tested version", "pip install -e .[deepspeed]")
    if row.status == "ok" and (missing := missing_tools()):
        advice = f"install {' and '.join(missing)}: its CPU Adam is compiled at first use"
        return Row("deepspeed", "note", f"{row.found}, no {' and no '.join(missing)}", advice)
    return row


def slurm_row() -> Row:
    """Slurm's commands; local runs and torchrun do without."""
    absent = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if not absent:
        return Row("Slurm", "ok", "sbatch, srun, scontrol")
    return Row("Slurm", "missing", f"no {', '.join(absent)}", "needed on a cluster only: apt install slurm-client")


def port_row() -> Row:
    """Whether a TCP port for the rendezvous of local processes can be had."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return Row("free port", "ok", f"{server.getsockname()[1]} on 127.0.0.1")
    except OSError as error:
        return Row("free port", "FAIL", str(error), "allow sockets on the loopback interface")


def disk_row(run_dir: Path) -> Row:
    """Free bytes where checkpoints go."""
    folder = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free for {run_dir}"
    if not os.access(folder, os.W_OK):
        return Row("disk", "FAIL", f"{folder} cannot be written", "choose another run_dir=")
    if free < GIB:
        return Row("disk", "FAIL", found, "free 1 GiB or choose another run_dir=")
    return Row("disk", "ok", found)


def shared_memory_row(needs_cuda: bool) -> Row:
    """/dev/shm, over which NCCL's ranks of one machine talk; containers often have 64 MiB."""
    folder = Path("/dev/shm")
    if not folder.exists():
        return Row("/dev/shm", "note", "not there", "mount it for runs on GPUs")
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.2f} GiB free"
    if free < GIB:
        return Row("/dev/shm", "note" if needs_cuda else "ok", found, "for GPUs: docker run --shm-size=8g")
    return Row("/dev/shm", "ok", found)


def cores_row(world_size: int, needs_cuda: bool) -> Row:
    """Cores against local processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{cores} for {world_size} processes"
    if not needs_cuda and world_size > 4 * cores:
        return Row("cores", "note", found, "slow; use fewer processes")
    return Row("cores", "ok", found)


def _package_row(name: str, distributions: tuple[str, ...], advice: str, module: str | None = None) -> Row:
    for distribution in distributions:
        version = distribution_version(distribution)
        if version is not None:
            return Row(name, "ok", version)
    if module is not None and has_module(module):
        return Row(name, "ok", "version unknown")
    return Row(name, "missing", "not installed", advice)


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution, None when there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    """Whether a top-level module could be imported, without importing it."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
