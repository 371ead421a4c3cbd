"""The kernels of `rows.py` in Triton; imported only where asked for, as Triton is an optional package.

Rounding is integer arithmetic throughout. Triton's interpreter, in which these kernels are tested without a GPU, drops
carries in its casts to E4M3, truncates casts to BF16 and adds BF16 wrongly; with integers one source gives the same
bits there, on a GPU and in the plain twin. Products are not fused with sums, for the same reason.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.formats import TILE_SIZE

# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton may be absent; a jitted function is indexed with its grid)

COLUMNS = 1024  # of one program; 128 threads with 8 values each


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, and so on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def bf16_from_bits(bits):
    """uint16 -> FP32."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """FP32 -> uint16, to nearest, ties to even; NaN stays one."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def e4m3_bits(x):
    """FP32 -> uint8 E4M3, to nearest, ties to even; beyond 448 the largest value. Not for NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # exponent bias 127 to 7
    # Below 2^-6 values are multiples of 2^-9: the last place of FP32 numbers from 2^14 on.
    subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, subnormal, normal) | sign).to(tl.uint8)


@triton.jit
def e4m3_value(code):
    """uint8 E4M3 -> FP32."""
    code = code.to(tl.uint32)
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    # subnormal m * 2^-9: the FP32 number 2^14 + m * 2^-9 less 2^14
    subnormal = (size + 0x46800000).to(tl.float32, bitcast=True) - 16384.0
    value = tl.where(size < 8, subnormal, normal).to(tl.uint32, bitcast=True)
    value = tl.where(size == 0x7F, 0x7FC00000, value)
    return (value | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _load(pointer, mask, IS_BF16: tl.constexpr):
    """FP32 values; BF16 lies as uint16."""
    if IS_BF16:
        return bf16_from_bits(tl.load(pointer, mask=mask, other=0))
    else:
        return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def gather_kernel(x, source, out, num_words, BLOCK: tl.constexpr):
    """One program: a piece of one row, as words of any width."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    origin = tl.load(source + row)
    tl.store(out + row * num_words + word, tl.load(x + origin * num_words + word, mask=mask), mask=mask)


@triton.jit
def quantise_kernel(
    x, codes, exponents, hidden, num_tiles, IS_BF16: tl.constexpr, FLOOR: tl.constexpr, TILES: tl.constexpr
):
    """One program: TILES tiles of one row. FLOOR: the bits of the least amax as FP32."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = column < hidden
    value = _load(x + row * hidden + column, mask, IS_BF16)
    # Sizes of floats are ordered as their bits are, NaN above infinity above all: no float maximum that may drop NaN.
    amax = tl.max((value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32), axis=1)
    amax = tl.maximum(amax, FLOOR)
    # 448 is 1.75 * 2^8: the least exponent e with amax <= 448 * 2^e is amax's own less 8, or less 7 above 1.75.
    exponent = (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.where(amax == 0, 127, tl.maximum(exponent, 1))  # no scale is subnormal
    is_bad = amax >= 0x7F800000
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    code = tl.where(is_bad[:, None], 0x7F, e4m3_bits(value * inverse[:, None]).to(tl.int32)).to(tl.uint8)
    tl.store(codes + row * hidden + column, code, mask=mask)
    tl.store(exponents + row * num_tiles + tile, tl.where(is_bad, 255, exponent).to(tl.uint8), mask=tile < num_tiles)


@triton.jit
def dequantise_kernel(codes, exponents, out, hidden, num_tiles, TO_BF16: tl.constexpr, TILES: tl.constexpr):
    """One program: TILES tiles of one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = column < hidden
    exponent = tl.load(exponents + row * num_tiles + tile, mask=tile < num_tiles, other=127).to(tl.uint32)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)  # 2^-127 is subnormal
    scale = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.uint32).to(tl.float32, bitcast=True)
    value = e4m3_value(tl.load(codes + row * hidden + column, mask=mask, other=0)) * scale[:, None]
    if TO_BF16:
        tl.store(out + row * hidden + column, bf16_bits(value), mask=mask)
    else:
        tl.store(out + row * hidden + column, value, mask=mask)


@triton.jit
def combine_kernel(
    rows, row_of, weights, out, hidden, TOP_K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: a piece of one token's sum."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of + token * TOP_K + k)
        used = mask & (row + tl.zeros([BLOCK], tl.int64) >= 0)  # of a scalar the interpreter makes no mask
        term = bf16_from_bits(tl.load(rows + row * hidden + column, mask=used, other=0))
        if HAS_WEIGHTS:
            term = term * tl.where(row >= 0, tl.load(weights + token * TOP_K + k), 0.0)
        total = total + term
    tl.store(out + token * hidden + column, bf16_bits(total), mask=mask)


def gather(x_TD: Tensor, source_R: Tensor) -> Tensor:
    """See `rows.gather`."""
    out = x_TD.new_empty(len(source_R), x_TD.shape[1])
    if out.numel() == 0:
        return out
    # Rows of 16 bit or less are copied in wider words where they divide, to load and store 16 bytes a thread.
    row_bytes = x_TD.shape[1] * x_TD.element_size()
    word = next(kind for kind in (torch.int32, torch.int16, torch.uint8) if row_bytes % kind.itemsize == 0)
    words, out_words = x_TD.view(word), out.view(word)
    num_words = words.shape[1]
    grid = (len(source_R), triton.cdiv(num_words, COLUMNS))
    gather_kernel[grid](words, source_R, out_words, num_words, BLOCK=COLUMNS)
    return out


def quantise(x_RD: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    """See `rows.quantise`."""
    num_rows, hidden = x_RD.shape
    num_tiles, tiles = triton.cdiv(hidden, TILE_SIZE), COLUMNS // TILE_SIZE
    codes_RD = torch.empty(num_rows, hidden, dtype=torch.uint8, device=x_RD.device)
    exponents_RG = torch.empty(num_rows, num_tiles, dtype=torch.uint8, device=x_RD.device)
    is_bf16 = x_RD.dtype == torch.bfloat16
    if codes_RD.numel():
        source = x_RD.view(torch.uint16) if is_bf16 else x_RD
        grid = (num_rows, triton.cdiv(num_tiles, tiles))
        (floor,) = struct.unpack("<i", struct.pack("<f", amax_floor))
        quantise_kernel[grid](
            source, codes_RD, exponents_RG, hidden, num_tiles, IS_BF16=is_bf16, FLOOR=floor, TILES=tiles
        )
    return codes_RD.view(torch.float8_e4m3fn), exponents_RG


def dequantise(values_RD: Tensor, exponents_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """See `rows.dequantise`."""
    num_rows, hidden = values_RD.shape
    num_tiles, tiles = exponents_RG.shape[1], COLUMNS // TILE_SIZE
    out_RD = torch.empty(num_rows, hidden, dtype=dtype, device=values_RD.device)
    to_bf16 = dtype == torch.bfloat16
    if out_RD.numel():
        target = out_RD.view(torch.uint16) if to_bf16 else out_RD
        grid = (num_rows, triton.cdiv(num_tiles, tiles))
        codes_RD = values_RD.view(torch.uint8)
        dequantise_kernel[grid](codes_RD, exponents_RG, target, hidden, num_tiles, TO_BF16=to_bf16, TILES=tiles)
    return out_RD


def combine(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """See `rows.combine`."""
    num_tokens, top_k = row_TK.shape
    hidden = rows_RD.shape[1]
    out_TD = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=rows_RD.device)
    if out_TD.numel():
        grid = (num_tokens, triton.cdiv(hidden, COLUMNS))
        has_weights = weights_TK is not None
        weights = weights_TK if has_weights else row_TK  # any pointer: not read
        combine_kernel[grid](
            rows_RD.view(torch.uint16), row_TK, weights, out_TD.view(torch.uint16), hidden,
            TOP_K=top_k, HAS_WEIGHTS=has_weights, BLOCK=COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
    return out_TD
