"""Causal attention against torch's scaled_dot_product_attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import BF16_BLOCK, BLOCK, HEADS, causal_attention, documents_of

SCALE = 0.3


def operands(heads: int, length: int, *, widths: tuple[int, int] = (24, 16), strided: bool = False) -> list[Tensor]:
    """q, k, v and the output's gradient; strided: heads inside positions in memory."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, width) for width in (widths[0], widths[0], widths[1], widths[1])]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[2] += 1  # values with a mean, whose part of the scores' gradient cancels
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made] if strided else made


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def run(attention, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Output and the gradients of q, k, v, all in float64."""
    q, k, v, grad = (x.to(dtype) for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, SCALE)
    assert out.dtype == dtype
    out.backward(grad)
    return [x.detach().double() for x in (out, *(leaf.grad for leaf in leaves)) if x is not None]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("heads", "length"), [(1, 1), (2, 37), (3, BLOCK), (HEADS + 3, BLOCK + 1), (4, 3 * BLOCK + 5)])
def test_fp32_equals_float64(heads: int, length: int, strided: bool) -> None:
    tensors = operands(heads, length, strided=strided)
    exact = run(torch_attention, tensors, torch.float64)
    if length == 1:  # one position sees itself: scores have no gradient, only rounding
        exact[1:3] = [x + 1 for x in exact[1:3]]
        found = run(causal_attention, tensors, torch.float32)
        found[1:3] = [x + 1 for x in found[1:3]]
    else:
        found = run(causal_attention, tensors, torch.float32)
    assert max(errors(found, exact)) < 1e-6


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("length", [37, BF16_BLOCK, 2 * BF16_BLOCK + 7])
def test_bf16_is_as_near_to_float64_as_torch(length: int, strided: bool) -> None:
    rounded = [x.bfloat16() for x in operands(3, length, widths=(24, 24), strided=strided)]
    exact = run(torch_attention, rounded, torch.float64)
    theirs = errors(run(torch_attention, rounded, torch.bfloat16), exact)
    for name, ours, limit in zip(("out", "q", "k", "v"), errors(run(causal_attention, rounded, torch.bfloat16), exact),
                                 theirs, strict=True):  # fmt: skip
        assert ours <= 1.3 * limit, (name, ours, limit)


def test_bf16_takes_values_narrower_than_keys() -> None:
    rounded = [x.bfloat16() for x in operands(3, 70)]
    exact = run(torch_attention, rounded, torch.float64)
    assert max(errors(run(causal_attention, rounded, torch.bfloat16), exact)) < 0.01


def packed(lengths: list[list[int]]) -> Tensor:
    """The document of every position."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, ids_BS: Tensor) -> Tensor:
    """torch's attention under a mask of every pair of positions."""
    may = (ids_BS[:, :, None] == ids_BS[:, None, :]).tril()[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=may, scale=SCALE)


SHORT, LONG = [[1, 30, 6], [37]], [[BLOCK + 3, 1, 2 * BLOCK - 2], [5, BLOCK, 2 * BLOCK - 3]]


@pytest.mark.parametrize("lengths", [SHORT, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_documents_are_kept_apart(lengths: list[list[int]], dtype: torch.dtype, threads: int) -> None:
    ids_BS = packed(lengths)
    tensors = [x.to(dtype) for x in operands(HEADS + 1, ids_BS.shape[1])]
    exact = run(lambda q, k, v, scale: dense_attention(q, k, v, ids_BS), tensors, torch.float64)
    documents = documents_of(ids_BS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(lambda q, k, v, scale: causal_attention(q, k, v, scale, documents), tensors, dtype)
    finally:
        torch.set_num_threads(before)
    assert max(errors(found, exact)) < (1e-6 if dtype == torch.float32 else 0.01)
    crossing = run(causal_attention, tensors, dtype)
    assert min(errors(crossing, exact)) > 0.02  # without the mask all four are others


def test_the_plain_twin_keeps_documents_apart() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ids_BS = packed(SHORT)
    tensors = operands(2, ids_BS.shape[1])
    exact = run(lambda q, k, v, scale: dense_attention(q, k, v, ids_BS), tensors, torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        found = run(lambda q, k, v, s: causal_attention(q, k, v, s, documents_of(ids_BS)), tensors, torch.float32)
    assert max(errors(found, exact)) < 1e-6


def test_documents_must_fill_the_sequences() -> None:
    q, k, v, _ = operands(2, 37)
    with pytest.raises(AssertionError, match=r"documents of \[37, 36\] positions for 2 sequences of 37"):
        causal_attention(q, k, v, SCALE, [[slice(0, 37)], [slice(0, 36)]])


def test_where_documents_lie() -> None:
    assert documents_of(packed(SHORT)) == [[slice(0, 1), slice(1, 31), slice(31, 37)], [slice(0, 37)]]
    assert documents_of(torch.tensor([[7, 7, 3, 7]])) == [[slice(0, 2), slice(2, 3), slice(3, 4)]]
