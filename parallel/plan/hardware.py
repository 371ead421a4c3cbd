"""A cluster's GPUs and links as numbers, each with its source, from a YAML file. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path


class HardwareError(ValueError):
    """A hardware file, or a cluster made of it, that cannot be; the message names the key and what would work."""

    user_error = True


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and the node and network it stands in; bytes and FLOPs a second, one direction.

    nvlink, ib: of one GPU, as achieved by point-to-point copies. host: PCIe of one GPU. dollars_per_gpu_hour: rent.
    sources: of every number, by key. fp32_flops: of plain FP32, without TF32; None where a file does not say.
    """

    name: str
    num_sms: int
    bf16_flops: float
    fp8_flops: float
    hbm_bytes_per_second: float
    memory_bytes: float
    nvlink_bytes_per_second: float
    ib_bytes_per_second: float
    host_bytes_per_second: float
    gpus_per_node: int
    dollars_per_gpu_hour: float
    sources: Mapping[str, str]
    fp32_flops: float | None = None


_OPTIONAL = ("fp32_flops",)
_NUMBERS = tuple(field.name for field in fields(Hardware) if field.name not in ("name", "sources", *_OPTIONAL))
_WHOLE = ("num_sms", "gpus_per_node")


def read(path: Path) -> Hardware:
    """The hardware that a YAML file describes: `name`, and each number as `{value: ..., source: ...}`.

    HardwareError with every missing, unknown or impossible key.
    """
    import yaml

    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise HardwareError(f"{path}: no such file") from error
    except (OSError, yaml.YAMLError) as error:
        raise HardwareError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise HardwareError(f"{path}: needs a mapping with name, {', '.join(_NUMBERS)}")
    return of_tree(tree, where=path.name)


def of_tree(tree: Mapping[str, object], *, where: str) -> Hardware:
    """As `read`, from what the file holds; where: its name, for messages."""
    wrong = [f"{key}: no such key" for key in tree if key not in (*_NUMBERS, *_OPTIONAL, "name")]
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    for key in (*_NUMBERS, *(key for key in _OPTIONAL if key in tree)):
        entry = tree.get(key)
        if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
            wrong.append(f"{key}: write {{value: NUMBER, source: WHERE FROM}}")
            continue
        try:
            number = float(entry["value"])  # YAML reads 3.35e12 as text
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf and not (number == 0 and key == "dollars_per_gpu_hour"):
            wrong.append(f"{key}={entry['value']}: use a number above 0")
        if key in _WHOLE and number == number and not number.is_integer():
            wrong.append(f"{key}={entry['value']}: use a whole number")
        values[key], sources[key] = number, str(entry["source"])
    if not isinstance(tree.get("name"), str):
        wrong.append("name: missing")
    if wrong:
        raise HardwareError(f"{where}: " + "; ".join(wrong))
    whole = {key: int(values.pop(key)) for key in _WHOLE}
    return Hardware(name=str(tree["name"]), sources=sources, **values, **whole)  # type: ignore[arg-type]


def check_precision(hardware: Hardware, precision: str) -> None:
    """HardwareError for FP32 on a cluster whose file does not say how fast that is."""
    if precision == "fp32" and hardware.fp32_flops is None:
        raise HardwareError(
            f"train.precision=fp32: {hardware.name} has no fp32_flops: add to its file fp32_flops: {{value: NUMBER, "
            "source: WHERE FROM}, plain FP32 products a second without TF32, or use train.precision=bf16"
        )


def check_cluster(hardware: Hardware, num_gpus: int) -> None:
    """HardwareError unless the GPUs fill whole nodes, or lie within one."""
    size = hardware.gpus_per_node
    if num_gpus < 1:
        raise HardwareError(f"{num_gpus} GPUs: use 1 or more")
    if num_gpus > size and num_gpus % size:
        low = num_gpus // size * size
        raise HardwareError(f"{num_gpus} GPUs are not whole nodes of {size} {hardware.name}: use {low} or {low + size}")
