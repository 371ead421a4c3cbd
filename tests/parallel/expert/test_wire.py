"""Forms in which rows travel."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.fp8.formats import Scales, Tile
from model.fp8.quantise import Quantiser
from parallel.expert.wire import GRADIENT_QUANTISER, WIRES, as_bytes, decode, encode, from_bytes, row_bytes


def by_hand(row: np.ndarray) -> np.ndarray:
    """A row after FP8 with power-of-two scales, tile by tile, E4M3 from its definition: 3 bits after the point."""
    out = np.zeros_like(row, np.float64)
    for start in range(0, len(row), 128):
        tile = row[start : start + 128].astype(np.float64)
        scale = 2.0 ** np.ceil(np.log2(np.float32(max(np.abs(tile).max(), 1e-4)) / np.float32(448)))
        scaled = tile / scale
        exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6)
        out[start : start + 128] = np.round(scaled / 2.0 ** (exponent - 3)) * 2.0 ** (exponent - 3) * scale
    return out


@pytest.mark.parametrize("hidden", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_is_what_its_definition_says(hidden: int, dtype: torch.dtype) -> None:
    x = (torch.randn(9, hidden) * torch.logspace(-7, 4, 9)[:, None]).to(dtype)
    parcel = encode(x, "fp8")
    assert parcel.rows_ND.dtype == torch.uint8 and parcel.extra_NB is not None
    assert parcel.rows_ND.shape[1] + parcel.extra_NB.shape[1] == row_bytes(hidden, wire="fp8", dtype=dtype)
    arrived = decode(parcel, "fp8", dtype)
    assert arrived.dtype == dtype
    expected = np.stack([by_hand(row) for row in x.float().numpy()])
    assert np.array_equal(arrived.double().numpy(), expected)


def test_the_report_s_row_is_7224_bytes() -> None:
    assert row_bytes(7168, wire="fp8", dtype=torch.bfloat16) == 7168 + 56
    assert row_bytes(7168, wire="model", dtype=torch.bfloat16) == 14336


def test_small_gradients_are_not_flushed() -> None:
    """A gradient of a large batch lies far below the floor that activations have."""
    grad = 1e-11 * torch.randn(5, 256).bfloat16()
    arrived = decode(encode(grad, "fp8", GRADIENT_QUANTISER), "fp8", torch.bfloat16)
    assert ((arrived - grad).norm() / grad.norm()) < 0.04
    assert not decode(encode(grad, "fp8"), "fp8", torch.bfloat16).any()
    assert not decode(encode(0 * grad, "fp8", GRADIENT_QUANTISER), "fp8", torch.bfloat16).any()


def test_a_quantised_tensor_travels_as_it_is() -> None:
    x = torch.randn(5, 200, dtype=torch.bfloat16)
    quantised = Quantiser(Tile.ROW).quantise(x)
    assert torch.equal(decode(encode(quantised, "fp8"), "fp8", torch.bfloat16), quantised.dequantise())
    assert torch.equal(encode(quantised, "fp8").rows_ND, encode(x, "fp8").rows_ND)


def test_what_the_wire_is_not_made_for_is_refused() -> None:
    x = torch.randn(5, 200)
    with pytest.raises(ValueError, match=r"scales of torch.float32 does not travel as fp8"):
        encode(Quantiser(Tile.ROW, Scales.FP32).quantise(x), "fp8")
    with pytest.raises(ValueError, match=r"tiles of \(128, 1\) .* does not travel as fp8"):
        encode(Quantiser(Tile.COLUMN).quantise(x), "fp8")
    with pytest.raises(ValueError, match="does not travel as bf16"):
        encode(Quantiser(Tile.ROW).quantise(x), "bf16")


@pytest.mark.parametrize("wire", [w for w in WIRES if w != "fp8"])
def test_plain_wires(wire: str) -> None:
    x = torch.randn(4, 10)
    arrived = decode(encode(x, wire), wire, torch.float32)
    assert torch.equal(arrived, x.bfloat16().float() if wire == "bf16" else x)
    assert encode(x, wire).rows_ND.nbytes == 4 * row_bytes(10, wire=wire, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3, 1), (1, 1), (5, 0)])
def test_bytes_of_any_part(shape: tuple[int, int]) -> None:
    """Slices, single rows and columns have strides that a view in another type refuses."""
    whole: Tensor = torch.arange(60.0).view(6, 10)
    part = whole[: shape[0], 1 : 1 + shape[1]]
    packed = torch.cat([torch.zeros(shape[0], 3, dtype=torch.uint8), as_bytes(part)], 1)
    assert torch.equal(from_bytes(packed[:, 3:], torch.float32), part)
