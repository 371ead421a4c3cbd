"""The plain forms against torch's own operations and exact sums, and every mistake in one line."""

import sys
from fractions import Fraction
from typing import Any

import pytest
import torch

from parallel.expert.kernels import rows
from parallel.expert.kernels.rows import KernelError, QuantisedRows
from tests.parallel.expert.kernels.cases import bits, every_bf16, every_bf16_at_scale_one, routed


def test_gather_is_indexing() -> None:
    x_TD, source_R = torch.randn(5, 7), torch.tensor([4, 0, 0, 3])
    assert torch.equal(rows.gather(x_TD, source_R, backend="torch"), x_TD[source_R])
    assert rows.gather(x_TD, source_R[:0], backend="torch").shape == (0, 7)


def test_every_bf16_rounds_to_e4m3_as_torch_does() -> None:
    x_RD = every_bf16_at_scale_one()
    found = rows.quantise(x_RD, backend="torch")
    assert (found.exponents_RG == 127).all()
    assert torch.equal(bits(found.values_RD), bits(x_RD.float().to(torch.float8_e4m3fn)))


def test_scales_are_the_least_power_of_two_that_fits() -> None:
    x_RD = every_bf16()
    found = rows.quantise(x_RD, backend="torch")
    for amax, exponent in zip(x_RD.float().abs().amax(1).tolist(), found.exponents_RG.flatten().tolist(), strict=True):
        scale = Fraction(2) ** (exponent - 127)
        wanted = max(Fraction(amax), Fraction(1e-4)) / 448
        assert scale / 2 < wanted <= scale


def test_multiplied_out_exactly_in_both_types() -> None:
    x_RD = every_bf16()[:500] * 0.5  # the largest would round up beyond the type
    found = rows.quantise(x_RD, backend="torch")
    wide = rows.dequantise(found, dtype=torch.float32, backend="torch")
    assert torch.equal(wide, rows.dequantise(found, dtype=torch.bfloat16, backend="torch").float())
    exact = torch.ldexp(found.values_RD.float(), found.exponents_RG.int() - 127)
    assert torch.equal(wide, exact)


def test_combine_is_the_rounded_sum_in_order() -> None:
    rows_RD, row_TK, weights_TK = routed(top_k=6, hidden=33)
    for weights in (None, weights_TK):
        found = rows.combine(rows_RD, row_TK, weights, backend="torch")
        for token in range(len(row_TK)):
            total = torch.zeros(33)
            for k in range(6):
                if (row := row_TK[token, k]) >= 0:
                    total += rows_RD[row].float() * (1.0 if weights is None else weights[token, k])
            assert torch.equal(found[token], total.bfloat16())
    assert (found[3] == 0).all()  # a token without any expert


def test_combine_rounds_once() -> None:
    # 1 + 2^-9 + 2^-9 is 1 if each sum is rounded to BF16, and 1 + 2^-8 rounds to even all the same: take three
    rows_RD = torch.tensor([[1.0], [2.0**-8], [2.0**-8]]).bfloat16()
    found = rows.combine(rows_RD, torch.tensor([[0, 1, 2]]), backend="torch")
    assert found.item() == 1 + 2.0**-7
    stepwise = (rows_RD[0] + rows_RD[1]) + rows_RD[2]
    assert stepwise.item() == 1.0


def bad(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "rows_RD": torch.zeros(3, 4, dtype=torch.bfloat16), "row_TK": torch.zeros(2, 2, dtype=torch.int64),
        "weights_TK": torch.zeros(2, 2), "backend": "torch",
    }  # fmt: skip
    rows.combine(**(arguments | changes))


CODES = torch.zeros(2, 130, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bad(backend="cuda"), "backend=cuda: use torch or triton"),
        (lambda: bad(rows_RD=torch.zeros(3, 4)), r"rows_RD is float32 \[3, 4\]: needs bfloat16 \[R, D\]"),
        (lambda: bad(row_TK=torch.zeros(2, 2)), "row_TK is float32"),
        (lambda: bad(weights_TK=torch.zeros(2, 3)), r"weights_TK is float32 \[2, 3\]: needs float32 \[2, 2\]"),
        (lambda: bad(weights_TK=torch.zeros(2, 2, device="meta")), "tensors on cpu and meta"),
        (lambda: rows.quantise(torch.zeros(2, 2).half(), backend="torch"), "x_RD is float16"),
        (lambda: rows.gather(torch.zeros(2), torch.zeros(2).long(), backend="torch"), "x_TD is float32"),
        (lambda: rows.gather(torch.zeros(2, 2), torch.zeros(2), backend="torch"), "source_R is float32"),
        (
            lambda: rows.dequantise(
                QuantisedRows(CODES, torch.zeros(2, 1, dtype=torch.uint8)), dtype=torch.float32, backend="torch"
            ),
            r"exponents_RG is uint8 \[2, 1\]: needs uint8 \[2, 2\]",
        ),
        (
            lambda: rows.dequantise(
                QuantisedRows(CODES, torch.zeros(2, 2, dtype=torch.uint8)), dtype=torch.float16, backend="torch"
            ),
            "dtype=torch.float16: dequantise gives bfloat16 or float32",
        ),
    ],
)
def test_mistakes_are_one_line(call: Any, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        call()


def test_without_triton_there_is_one_line_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "parallel.expert.kernels.triton_rows", raising=False)
    with pytest.raises(KernelError, match="triton is not installed; pip install triton"):
        rows.quantise(torch.zeros(1, 128), backend="triton")
