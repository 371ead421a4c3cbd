"""Files that safetensors itself reads, written as a stream, with the checksum of what is on the disk."""

import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from launcher.checkpoint.tensor_file import (
    PART_BYTES,
    Planned,
    TensorFile,
    file_record,
    header_bytes,
    in_file_order,
    planned_of,
    write_tensor_file,
)


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(7, generator=draw).to(torch.float8_e4m3fn),
        "half": torch.randn(3, 5, generator=draw).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(6, 4, generator=draw).t(),
        "scalar": torch.tensor(2**40),
        "large": torch.randn(PART_BYTES // 4 + 1000, generator=draw),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    given = tensors()
    planned = planned_of(given)
    values = (given[item.name] for item in in_file_order(planned))
    record = write_tensor_file(tmp_path / "a", planned, values, metadata={"step": "3"})
    read = load_file(tmp_path / "a")
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8)), name
    data = (tmp_path / "a").read_bytes()
    assert (record.bytes, record.xxh3_128) == (len(data), xxhash.xxh3_128(data).hexdigest())
    assert file_record(tmp_path / "a") == file_record(tmp_path / "a", from_disk=True) == record


def test_every_tensor_begins_where_its_dtype_may(tmp_path: Path) -> None:
    header = json.loads(header_bytes(planned_of(tensors()))[8:])
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I64": 8, "U8": 1}
    assert all(item["data_offsets"][0] % sizes[item["dtype"]] == 0 for item in header.values())
    assert len(header_bytes(planned_of(tensors()))) % 8 == 0


def test_another_order_is_as_good_but_has_no_checksum(tmp_path: Path) -> None:
    given = tensors()
    planned = planned_of(given)
    write_tensor_file(tmp_path / "a", planned, (given[item.name] for item in in_file_order(planned)))
    file = TensorFile(tmp_path / "b", planned)
    for name in given:
        file.put(name, given[name])
    file.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="no checksum"):
        file.record()


def test_mistakes_of_the_caller_raise(tmp_path: Path) -> None:
    planned = [Planned("x", (2,), torch.float32), Planned("y", (2,), torch.float32)]
    file = TensorFile(tmp_path / "a", planned)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        file.put("x", torch.zeros(2, dtype=torch.bfloat16))
    file.put("x", torch.zeros(2))
    with pytest.raises(ValueError, match="y was planned and never written"):
        file.close()
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "a", planned)
