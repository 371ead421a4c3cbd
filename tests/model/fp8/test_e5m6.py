"""E5M6 against exact fractions, FP16 and its own storage."""

from fractions import Fraction

import pytest
import torch

from model.fp8.e5m6 import E5M6Kernels, TorchE5M6, dequantise_e5m6, quantise_e5m6
from model.fp8.native import NativeKernels
from tests.model.fp8.data import all_bf16, relative_error, same_bits, wild

KERNELS: dict[str, E5M6Kernels] = {"torch": TorchE5M6(), "native": NativeKernels()}
both = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())


@both
def test_every_bf16_number_is_rounded_to_seven_bits(kernels: E5M6Kernels) -> None:
    x = all_bf16()
    matrix = torch.stack([torch.full_like(x, 3.0), x], dim=1)
    tensor = quantise_e5m6(matrix, kernels)
    found = dequantise_e5m6(tensor, kernels)[:, 1].double()
    amax = x.double().abs().clamp(min=3)
    scale = torch.exp2((amax / 65024).log2().ceil())
    scaled = x.double() / scale
    step = torch.exp2((torch.frexp(scaled).exponent - 7).clamp(min=-20).double())
    wanted = (scaled / step).round() * step * scale
    finite = wanted.abs() < 3.4e38  # beyond, BF16 itself ends
    assert torch.equal(found[finite], wanted[finite])
    assert torch.equal(tensor.exponents[:, 0].double() - 127, scale.log2())


@both
def test_rounding_is_to_the_nearest_by_exact_fractions(kernels: E5M6Kernels) -> None:
    codes = torch.arange(0x7C0, dtype=torch.int16) << 4
    numbers = [Fraction(float(value)) for value in codes.view(torch.float16)]
    x = torch.cat([wild((40, 1), seed=1, octaves=6, dtype=torch.float32), torch.full((40, 1), 65024.0)], dim=1)
    found = dequantise_e5m6(quantise_e5m6(x, kernels), kernels)
    for row in range(40):
        wanted = abs(Fraction(float(x[row, 0])))
        if wanted < 65024:
            nearest = min((abs(number - wanted), code & 1, number) for code, number in enumerate(numbers))[2]
            assert Fraction(float(found[row, 0].abs())) == nearest


@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (2, 5, 200), (7, 257), (0, 4)])
def test_native_kernels_give_the_bits_of_plain_torch(shape: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for octaves in (0.0, 6.0, 30.0):
            x = wild(shape, seed=2, octaves=octaves, dtype=dtype)
            if octaves == 30 and x.numel():
                x.view(-1)[0] = float("nan")
            plain, native = (quantise_e5m6(x, kernels) for kernels in KERNELS.values())
            for name in ("high", "low", "exponents"):
                assert torch.equal(getattr(plain, name), getattr(native, name))
            decoded = [dequantise_e5m6(plain, kernels) for kernels in KERNELS.values()]
            assert same_bits(*decoded) and decoded[0].shape == x.shape


def test_twelve_bits_a_number_and_their_error() -> None:
    x = wild((256, 1024), seed=3, octaves=0)
    tensor = quantise_e5m6(x)
    assert tensor.num_bytes == 256 * (1024 + 512 + 8)
    error = relative_error(dequantise_e5m6(tensor), x)
    assert 3e-3 < error < 5e-3  # seven significant bits of BF16's eight


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_make_their_tile_nan(kernels: E5M6Kernels, bad: float) -> None:
    x = wild((4, 256), seed=4, octaves=0)
    x[2, 130] = bad
    tensor = quantise_e5m6(x, kernels)
    wanted = torch.zeros(4, 256, dtype=torch.bool)
    wanted[2, 128:] = True
    assert torch.equal(dequantise_e5m6(tensor, kernels).isnan(), wanted)
    assert tensor.exponents[2, 1] == 255
