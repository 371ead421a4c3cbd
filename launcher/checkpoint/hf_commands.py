"""`expertpipe checkpoint import-hf | export-hf`: between our checkpoints and the published layout, tensor by tensor.

Which published tensor is which range of ours is in model/convert.py, which are in FP8 in published_fp8.py.
Both directions stream: a model of any size needs disk for its copy and memory for its largest tensor.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from data.config import DataConfig
from launcher.build import DTYPES, Progress
from launcher.check.run import problems
from launcher.checkpoint.files import write_stream
from launcher.checkpoint.published import (
    CONFIG,
    Planned,
    PublishedError,
    PublishedReader,
    Stored,
    flush_files,
    new_folder,
    write_published,
)
from launcher.checkpoint.published import DTYPES as STORED_DTYPES
from launcher.checkpoint.published_fp8 import (
    FP8,
    QUANTIZATION,
    SCALE,
    dequantise,
    plan_fp8,
    quantise,
    scale_shape,
    without_quantization,
)
from launcher.checkpoint.state import TOKENIZER, Reader, commit, find
from launcher.config import ConfigError, RunConfig, TrainConfig, from_dict, to_dict
from launcher.inference import one_thread
from model.config import ModelConfig
from model.convert import ConvertError, Published, from_published_config, published_config, published_tensors
from optim.config import OptimConfig
from parallel.config import ParallelConfig

DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "bfloat16"}
ROUTER_BIAS = ".mlp.gate.e_score_correction_bias"
DERIVED = ".rotary_emb.inv_freq"  # in some published files, and a function of config.json
NUM_LISTED = 10
PART_BYTES = 2_000_000_000  # of one file of an imported checkpoint


def export_plan(model: ModelConfig, precision: str) -> list[Planned]:
    """Every tensor of an export, in order; precision: bf16, fp32 or fp8 (block-FP8 with `weight_scale_inv`)."""
    dtype = DTYPES[precision]
    planned = [
        Planned(item.name, item.shape, torch.float32 if item.ours.endswith(ROUTER_BIAS) else dtype)
        for item in published_tensors(model)
    ]
    return list(plan_fp8(planned)) if precision == "fp8" else planned


@one_thread()
def export_hf(source: Path, destination: Path, precision: str | None = None) -> int:
    """Write the published layout of a checkpoint (or the newest one of a run) to a new folder; the exit code.

    precision: bf16, fp32 or fp8; None: the run's, FP8 runs in BF16. Router biases in FP32, MTP layers with their copies
    of embedding and head. Raises PublishedError for a folder that is not empty, CheckpointError for a bad checkpoint.
    """
    found = find(source)
    reader = Reader(found)
    model = reader.config.model
    if precision is None:
        precision = "fp32" if reader.config.train.precision == "fp32" else "bf16"
    sources = {published.name: published for published in published_tensors(model)}
    planned = export_plan(model, precision)

    def read(tensor: Planned) -> Iterator[tuple[str, Tensor]]:
        master = _read_master(reader, sources[tensor.name])
        if tensor.dtype != FP8:
            yield tensor.name, master.to(tensor.dtype)
            return
        try:
            values, scales = quantise(master)
        except ValueError as error:
            raise PublishedError(f"{found}: {tensor.name} cannot be quantised: {error}") from None
        yield tensor.name, values
        yield tensor.name + SCALE, scales

    config = published_config(model, DTYPE_NAMES[precision])
    if precision == "fp8":
        config["quantization_config"] = QUANTIZATION
    with new_folder(destination) as folder:
        write_published(folder, config, planned, read)
        if (found / TOKENIZER).is_file():
            shutil.copyfile(found / TOKENIZER, folder / TOKENIZER)
    print(f"{destination}: {len(planned)} tensors of {found} in {precision}")
    return 0


def _read_master(reader: Reader, published: Published) -> Tensor:
    """A published tensor's values in FP32, from the range of ours that it is."""
    flat = torch.empty(torch.Size(published.shape).numel(), dtype=torch.float32)
    if published.ours.endswith(ROUTER_BIAS):
        reader.read("router_bias", str(_router_block(reader.config.model, published.ours)), flat)
    else:
        reader.read("master", published.ours, flat, offset=published.offset)
    return flat.view(published.shape)


def _router_block(config: ModelConfig, name: str) -> int:
    """Global block number in `layers.I.…` or `mtp.K.…`, MTP blocks after the main layers."""
    kind, number = name.split(".")[:2]
    return int(number) + (config.num_hidden_layers if kind == "mtp" else 0)


@one_thread()
def import_hf(source: Path, destination: Path) -> int:
    """Write our checkpoint of a published folder, quantised or not, to a new folder; the exit code.

    DESTINATION then holds step-00000000 and `latest`: as RUN/checkpoints it is what a run of the same model starts
    from, with fresh moments. Raises PublishedError with everything that is missing, too many or misshapen.
    """
    reader = PublishedReader(source)
    reader.discard(DERIVED)
    config = _run_config(reader, destination)
    model = config.model
    sources = list(published_tensors(model))
    _require_same(sources, reader)
    config = replace(config, train=replace(config.train, precision=_precision(sources, reader)))
    with new_folder(destination) as folder:
        step = folder / ".tmp-step"
        step.mkdir()
        for number, part in enumerate(_parts(sources)):
            planned = [Planned(_key(model, item), (torch.Size(item.shape).numel(),), torch.float32) for item in part]
            write_stream(
                step / f"part-{number:05d}.safetensors",
                planned,
                (_master_of(reader, item).flatten() for item in part),
            )
        _require_equal_copies(sources, reader)
        if (source / TOKENIZER).is_file():
            shutil.copyfile(source / TOKENIZER, step / TOKENIZER)
        # without `optimizer_steps` a checkpoint holds weights only
        flush_files(step)
        manifest = {"progress": asdict(Progress()), "config": to_dict(config), "torch": torch.__version__}
        commit(step, folder / "step-00000000", manifest)
    print(f"{destination}: {len(sources)} tensors of {source} as masters, weights in {config.train.precision}")
    return 0


def _master_of(reader: PublishedReader, item: Published) -> Tensor:
    """A published tensor in FP32, from FP8 with its scales if that is how it is stored."""
    values = reader.read(item.name)
    return dequantise(values, reader.read(item.name + SCALE)) if values.dtype == FP8 else values.to(torch.float32)


def _run_config(reader: PublishedReader, destination: Path) -> RunConfig:
    """The smallest run of the model: one process, one sequence a step; data and schedule are examples.

    Raises PublishedError for a config.json of another architecture or with values that cannot be.
    """
    path = reader.folder / CONFIG
    run_dir = destination.parent if destination.name == "checkpoints" else destination
    try:
        model = from_published_config({"num_nextn_predict_layers": 0} | without_quantization(reader.config))
        draft = RunConfig(
            name="imported",
            run_dir=str(run_dir),
            model=model,
            parallel=ParallelConfig(),
            optim=OptimConfig(),
            data=DataConfig("runs/data/stdlib/train", sequence_length=min(4096, model.max_position_embeddings)),
            train=TrainConfig(steps=1, global_batch_size=1),
        )
        config = from_dict(to_dict(draft))  # checks the types, which a dataclass does not
    except ConfigError as error:
        raise PublishedError(f"{path}: {'; '.join(error.errors)}") from None
    except ConvertError as error:
        raise PublishedError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise PublishedError(f"{path}: a value of another type than published ones: {error}") from None
    errors = problems(config, None, with_data=False)
    if errors:
        raise PublishedError(f"{path}: {'; '.join(errors)}")
    return replace(config, model=_stored_model(config.model, reader))


def _stored_model(model: ModelConfig, reader: PublishedReader) -> ModelConfig:
    """The model without the MTP layers of config.json if the files hold nothing of them, which is told.

    transformers saves such folders: it has no MTP, and keeps the key.
    """
    depth, first = model.num_nextn_predict_layers, model.num_hidden_layers
    stems = tuple(f"model.layers.{first + k}." for k in range(depth))
    if not depth or any(name.startswith(stems) for name in reader.tensors):
        return model
    print(f"{reader.folder / CONFIG}: num_nextn_predict_layers={depth}, but no such layers here: imported without MTP")
    return replace(model, num_nextn_predict_layers=0)


def _require_same(sources: list[Published], reader: PublishedReader) -> None:
    """Raise PublishedError naming all tensors that are missing, unknown, misshapen or of another format."""
    expected = {published.name: published.shape for published in sources}
    in_fp8 = [
        name
        for name, stored in reader.tensors.items()
        if stored.dtype == "F8_E4M3" and len(expected.get(name, ())) == 2
    ]
    expected |= {name + SCALE: scale_shape(expected[name]) for name in in_fp8}
    wrong = [f"{name} is missing" for name in expected if name not in reader.tensors]
    wrong += [f"{name} is not part of this architecture" for name in reader.tensors if name not in expected]
    wrong += [
        problem
        for name, stored in reader.tensors.items()
        if name in expected and (problem := _problem(name, stored, expected[name]))
    ]
    if wrong:
        listed = "; ".join(wrong[:NUM_LISTED]) + ("; ..." if len(wrong) > NUM_LISTED else "")
        raise PublishedError(f"{reader.folder}: {len(wrong)} tensors do not fit its config.json: {listed}")


def _problem(name: str, stored: Stored, shape: tuple[int, ...]) -> str | None:
    if stored.shape != shape:
        return f"{name} has shape {list(stored.shape)}, config.json means {list(shape)}"
    if stored.dtype not in STORED_DTYPES or (stored.dtype == "F8_E4M3" and len(shape) != 2):
        return f"{name} is {stored.dtype}, only {', '.join(STORED_DTYPES)} can be read"
    return None


def _precision(sources: list[Published], reader: PublishedReader) -> str:
    """bf16 where weights were trained in it or in FP8, else fp32."""
    dtypes = {reader.tensors[item.name].dtype for item in sources if not item.ours.endswith(ROUTER_BIAS)}
    return "bf16" if dtypes <= {"BF16", "F8_E4M3"} else "fp32"


def _require_equal_copies(sources: list[Published], reader: PublishedReader) -> None:
    """Embedding and head of an MTP layer are the main model's, or our model, which shares them, is another one."""
    originals = {item.ours: item.name for item in sources if not item.copy}
    for item in sources:
        if item.copy and not torch.equal(reader.read(item.name), reader.read(originals[item.ours])):
            raise PublishedError(
                f"{reader.folder}: {item.name} differs from {originals[item.ours]}, which this architecture shares"
            )


def _parts(sources: list[Published]) -> Iterator[list[Published]]:
    """The tensors to be read, copies left out, in runs of at most PART_BYTES of FP32."""
    part: list[Published] = []
    filled = 0
    for item in sources:
        if item.copy:
            continue
        num_bytes = 4 * torch.Size(item.shape).numel()
        if part and filled + num_bytes > PART_BYTES:
            yield part
            part, filled = [], 0
        part.append(item)
        filled += num_bytes
    yield part


def _key(model: ModelConfig, item: Published) -> str:
    """Key in our files: kind/name@offset (launcher/checkpoint/state.py)."""
    if item.ours.endswith(ROUTER_BIAS):
        return f"router_bias/{_router_block(model, item.ours)}@0"
    return f"master/{item.ours}@{item.offset}"
