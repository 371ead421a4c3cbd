"""The Triton kernels in Triton's interpreter against their plain twins; run by test_triton.py in a process of its own.

Needs TRITON_INTERPRET=1 from the start of the process, which is why no other test may share it.
"""

import pytest
import torch
import torch.nn.functional as F

# pyright: reportMissingImports=false, reportIndexIssue=false
import triton
import triton.language as tl

from parallel.expert.kernels import rows, triton_rows
from tests.parallel.expert.kernels.cases import (
    bits,
    every_amax_mantissa,
    every_bf16,
    every_bf16_at_scale_one,
    routed,
    same,
)

HIDDENS = [1, 3, 64, 128, 129, 1024, 1100]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy tells of overflow, which a GPU does not


def both(x_RD: torch.Tensor, **floor: float) -> tuple[rows.QuantisedRows, rows.QuantisedRows]:
    return rows.quantise(x_RD, backend="torch", **floor), rows.quantise(x_RD, backend="triton", **floor)


def wide(x: torch.Tensor) -> torch.Tensor:
    """The same tiles of 128, eight in a row, which one program takes: the interpreter's cost is by program."""
    return torch.cat([x, x.new_zeros(-len(x) % 8, 128)]).view(-1, 1024)


def test_this_is_the_interpreter() -> None:
    assert triton_rows.is_interpreted()


def test_every_bf16_rounds_to_e4m3_as_torch_does() -> None:
    x_RD = wide(every_bf16_at_scale_one())
    plain, kernel = both(x_RD)
    used_RG = (x_RD.view(-1, 8, 128)[:, :, -1] == 448).int()
    assert torch.equal((kernel.exponents_RG == 127).int(), used_RG) and used_RG.sum() > 250
    assert same(plain, kernel)
    assert torch.equal(bits(kernel.values_RD), bits(x_RD.float().to(torch.float8_e4m3fn)))


def test_every_bf16_at_its_own_scale() -> None:
    assert same(*both(wide(every_bf16())))
    assert same(*both(wide(every_bf16().float())))


def test_without_a_floor_small_gradients_keep_their_scale() -> None:
    for x_RD in (wide(every_bf16()), wide(every_bf16().float()), torch.zeros(1, 1024), torch.full((1, 1024), 1e-40)):
        assert same(*both(x_RD, amax_floor=0.0))
    plain, _ = both(torch.full((1, 1024), 2.0**-30), amax_floor=0.0)
    assert plain.values_RD.float().min() == 256


def test_scales_at_every_edge() -> None:
    assert same(*both(wide(F.pad(every_amax_mantissa(), (0, 124)))))


@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_at_every_width(hidden: int, dtype: torch.dtype) -> None:
    x_RD = (torch.randn(5, hidden, generator=torch.Generator().manual_seed(hidden)) * 30).to(dtype)
    plain, kernel = both(x_RD)
    assert same(plain, kernel)
    for target in (torch.bfloat16, torch.float32):
        out = [rows.dequantise(plain, dtype=target, backend=backend) for backend in rows.BACKENDS]
        assert torch.equal(bits(out[0]), bits(out[1]))


def test_every_code_at_every_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256).view(256, 256)
    exponents_RG = torch.arange(256).to(torch.uint8)[:, None].repeat(1, 2)
    quantised = rows.QuantisedRows(codes.view(torch.float8_e4m3fn), exponents_RG)
    for target in (torch.float32, torch.bfloat16):
        out = [rows.dequantise(quantised, dtype=target, backend=backend) for backend in rows.BACKENDS]
        assert torch.equal(bits(out[0]), bits(out[1]))


def test_nan_and_infinity_spoil_their_tile_alone() -> None:
    x_RD = torch.ones(3, 300)
    x_RD[0, 5], x_RD[1, 200], x_RD[2, 299] = torch.nan, torch.inf, -torch.inf
    plain, kernel = both(x_RD)
    assert same(plain, kernel)
    assert kernel.exponents_RG.tolist() == [[255, 119, 119], [119, 255, 119], [119, 119, 255]]


@pytest.mark.parametrize("hidden", HIDDENS)
def test_gather(hidden: int) -> None:
    source_R = torch.tensor([4, 0, 0, 6, 2])
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8):
        x_TD = torch.randn(7, hidden).to(dtype)
        out = [rows.gather(x_TD, source_R, backend=backend) for backend in rows.BACKENDS]
        assert torch.equal(out[0].view(torch.uint8), out[1].view(torch.uint8))


@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_combine(hidden: int, top_k: int) -> None:
    rows_RD, row_TK, weights_TK = routed(top_k=top_k, hidden=hidden)
    for weights in (None, weights_TK):
        out = [rows.combine(rows_RD, row_TK, weights, backend=backend) for backend in rows.BACKENDS]
        assert torch.equal(bits(out[0]), bits(out[1]))
        assert not out[1].isnan().any()


def test_combine_of_values_that_round_in_every_way() -> None:
    x = every_bf16()
    rows_RD = torch.stack([x.flatten(), x.flatten().roll(12345)])
    row_TK = torch.tensor([[0, 1]])
    out = [rows.combine(rows_RD, row_TK, backend=backend) for backend in rows.BACKENDS]
    assert torch.equal(bits(out[0]), bits(out[1]))


def test_no_rows() -> None:
    empty = torch.empty(0, 256, dtype=torch.bfloat16)
    plain, kernel = both(empty)
    assert same(plain, kernel) and kernel.exponents_RG.shape == (0, 2)
    assert rows.gather(empty, torch.empty(0, dtype=torch.int64), backend="triton").shape == (0, 256)
    assert rows.combine(empty, torch.empty(0, 4, dtype=torch.int64), backend="triton").shape == (0, 256)
    assert (rows.combine(empty, torch.full((2, 4), -1), backend="triton") == 0).all()


@triton.jit
def _cast_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place).to(tl.float8e4nv))


def test_triton_s_own_cast_would_fail() -> None:
    """The comparison notices the interpreter's cast, so it is not vacuous; when this fails, the cast was mended."""
    x_RD = every_bf16_at_scale_one()[:256].float()
    out = torch.empty_like(x_RD, dtype=torch.float8_e4m3fn)
    _cast_kernel[(len(x_RD),)](x_RD, out, BLOCK=128)
    assert not torch.equal(bits(out), bits(x_RD.to(torch.float8_e4m3fn)))
