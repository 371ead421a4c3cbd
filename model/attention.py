"""Causal softmax attention: torch's kernel on a GPU, batched products over blocks of queries on a CPU.

torch's CPU flash kernel wants values as wide as keys and its backward is slow. Here a block of queries meets all keys
up to its own last one at once, so that the backward can recompute the probabilities from q and k alone, without the
running statistics of FlashAttention (arXiv 2205.14135), and keys above the diagonal are never touched.

With a document mask each document of a packed sequence is a sequence of its own: nothing is computed across a boundary,
so the mask saves time. Positions are not counted anew in every document: rotary embedding makes scores a function of
the distance between two positions, and within a document that is the same.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.rowwise.kernels import TORCH, Rowwise
from model.threads import spread

HEADS = 8  # in one batched product
BLOCK, BF16_BLOCK = 64, 256  # queries at a time: little above the diagonal, but BF16 products want to be large


class _Blocks:
    """Rows of softmax(scale q k^T), block by block of queries; scores in memory that every block uses again.

    Scores are FP32 for BF16 operands, FP64 for FP64 ones.
    """

    def __init__(self, q_BHSX: Tensor, scale: float, rowwise: Rowwise) -> None:
        _, heads, length, _ = q_BHSX.shape
        low = q_BHSX.dtype == torch.bfloat16
        self.scale, self.dtype, self.rowwise = scale, q_BHSX.dtype, rowwise
        self.block = min(BF16_BLOCK if low else BLOCK, length)
        self.wide = torch.float32 if low else q_BHSX.dtype
        size = min(HEADS, heads) * self.block * length
        self.scores = q_BHSX.new_empty(size, dtype=self.wide)

    def rows(self, length: int) -> Iterator[slice]:
        """The blocks of queries of a sequence."""
        return (slice(start, min(start + self.block, length)) for start in range(0, length, self.block))

    def probabilities(self, q_HSX: Tensor, k_HSX: Tensor, rows: slice) -> Tensor:
        """Queries `rows` with the keys up to the last of them: p [H, rows, rows.stop] in the operands' dtype."""
        heads, num = len(q_HSX), rows.stop - rows.start
        scores = self.scores[: heads * num * rows.stop].view(heads, num, rows.stop)
        keys_HXS = k_HSX[:, : rows.stop].transpose(1, 2)
        torch.baddbmm(scores, q_HSX[:, rows], keys_HXS, beta=0, alpha=self.scale, out=scores)
        return self.rowwise.causal_softmax(scores, rows.start, self.dtype)


Documents = Sequence[Sequence[slice]]  # the positions of every document, one after another, of each sequence
Part = tuple[int, slice, slice]


def documents_of(ids_BS: Tensor) -> Documents:
    """Where the documents of packed sequences lie: ids [B, S] of any integer type, equal within a document."""
    found = []
    for ids_S in ids_BS.cpu():
        inner = (torch.nonzero(ids_S[1:] != ids_S[:-1]).flatten() + 1).tolist()
        found.append([slice(*ends) for ends in pairwise([0, *inner, len(ids_S)])])
    return found


def _parts(x_BHSX: Tensor, documents: Documents | None) -> Iterator[Part]:
    """Sequence, heads and positions of each batch of products."""
    whole = [slice(0, x_BHSX.shape[2])]
    for sequence in range(x_BHSX.shape[0]):
        for positions in documents[sequence] if documents else whole:
            for head in range(0, x_BHSX.shape[1], HEADS):
                yield sequence, slice(head, head + HEADS), positions


def _forward(
    q_BHSX: Tensor, k_BHSX: Tensor, v_BHSV: Tensor, scale: float, documents: Documents | None, rowwise: Rowwise
) -> Tensor:
    B, H, S, V = v_BHSV.shape
    out_BHSV = v_BHSV.new_empty(B, S, H, V).transpose(1, 2)  # the order in which the output projection reads it

    def blocks(parts: Iterator[Part]) -> None:
        scratch = _Blocks(q_BHSX, scale, rowwise)
        for part in parts:
            q, k, v, out = q_BHSX[part], k_BHSX[part], v_BHSV[part], out_BHSV[part]
            for rows in scratch.rows(q.shape[1]):
                torch.bmm(scratch.probabilities(q, k, rows), v[:, : rows.stop], out=out[:, rows])

    spread(blocks, _parts(q_BHSX, documents))
    return out_BHSV


def _backward(
    grad_BHSV: Tensor,
    q_BHSX: Tensor,
    k_BHSX: Tensor,
    v_BHSV: Tensor,
    scale: float,
    documents: Documents | None,
    rowwise: Rowwise,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; those of k and v are summed over the blocks in FP32."""
    dtype = q_BHSX.dtype
    grads = tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q_BHSX, k_BHSX, v_BHSV))

    def blocks(parts: Iterator[Part]) -> None:
        scratch = _Blocks(q_BHSX, scale, rowwise)
        for part in parts:
            inputs = (x[part].contiguous() for x in (q_BHSX, k_BHSX, v_BHSV, grad_BHSV))
            _backward_of_part(scratch, *inputs, *(x[part] for x in grads))

    spread(blocks, _parts(q_BHSX, documents))
    return grads  # type: ignore[return-value]


def _backward_of_part(
    scratch: _Blocks, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Writes the gradients of q, k [heads, S, X] and v [heads, S, V]."""
    wide, scale = scratch.wide, scratch.scale
    wide_q, wide_k = q.to(wide), k.to(wide)
    sum_k, sum_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for rows in scratch.rows(q.shape[1]):
        seen = slice(0, rows.stop)
        p = scratch.probabilities(wide_q, wide_k, rows)  # rounded for the products, as flash attention does
        _add_bmm(sum_v[:, seen], p.transpose(1, 2), grad[:, rows])
        grad_p = torch.bmm(grad[:, rows], v[:, seen].transpose(1, 2))
        grad_scores = scratch.rowwise.causal_softmax_backward(p, grad_p, rows.start)
        torch.baddbmm(grad_q[:, rows], grad_scores, k[:, seen], beta=0, alpha=scale, out=grad_q[:, rows])
        _add_bmm(sum_k[:, seen], grad_scores.transpose(1, 2), q[:, rows])
    torch.mul(sum_k, scale, out=grad_k)
    grad_v.copy_(sum_v)


def _add_bmm(acc: Tensor, left: Tensor, right: Tensor) -> None:
    """acc += left @ right for each head, acc FP32 or as the operands."""
    if acc.dtype == left.dtype:
        acc.baddbmm_(left, right)
    else:
        acc += torch.bmm(left, right)


def _each_document(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_BHSX: Tensor,
    k_BHSX: Tensor,
    v_BHSV: Tensor,
    documents: Documents,
) -> Tensor:
    """Attention inside every document by itself, put together again: [B, H, S, V]."""
    rows = []
    for sequence, spans in enumerate(documents):
        parts = [(slice(sequence, sequence + 1), slice(None), positions) for positions in spans]
        rows.append(torch.cat([attention(q_BHSX[part], k_BHSX[part], v_BHSV[part]) for part in parts], dim=2))
    return torch.cat(rows)


class _CausalAttention(torch.autograd.Function):
    """Saves q, k and v only."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHSX: Tensor,
        k_BHSX: Tensor,
        v_BHSV: Tensor,
        scale: float,
        documents: Documents | None,
        rowwise: Rowwise,
    ) -> Tensor:
        ctx.save_for_backward(q_BHSX, k_BHSX, v_BHSV)
        ctx.options = scale, documents, rowwise
        if q_BHSX.dtype != torch.bfloat16:
            return _forward(q_BHSX, k_BHSX, v_BHSV, scale, documents, rowwise)
        # Here the flash kernel, which multiplies BF16 into FP32 scores, is the faster one; it wants one head size.
        width = max(q_BHSX.shape[3], v_BHSV.shape[3])
        q, k, v = (F.pad(x, (0, width - x.shape[3])) for x in (q_BHSX, k_BHSX, v_BHSV))
        out_BHSX = _torch_attention(q, k, v, scale, documents)
        return out_BHSX[..., : v_BHSV.shape[3]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        return *_backward(grads[0], q, k, v, *ctx.options), None, None, None


def _torch_attention(
    q_BHSX: Tensor, k_BHSX: Tensor, v_BHSV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    if documents is None:
        return attention(q_BHSX, k_BHSX, v_BHSV)
    return _each_document(attention, q_BHSX, k_BHSX, v_BHSV, documents)


def causal_attention(
    q_BHSX: Tensor,
    k_BHSX: Tensor,
    v_BHSV: Tensor,
    scale: float,
    documents: Documents | None = None,
    rowwise: Rowwise = TORCH,
) -> Tensor:
    """softmax(scale q k^T) v, each position seeing itself and those before it: [B, H, S, V].

    documents: those of its own document only; None: of the whole sequence. The plain twin is torch's
    scaled_dot_product_attention; a GPU uses it, and a CPU where torch's `sdpa_kernel` has ruled flash attention out.
    """
    if documents is not None:
        lengths = [sum(positions.stop - positions.start for positions in spans) for spans in documents]
        B, S = q_BHSX.shape[0], q_BHSX.shape[2]
        assert lengths == [S] * B, f"documents of {lengths} positions for {B} sequences of {S}"
    if q_BHSX.is_cuda or not torch.backends.cuda.flash_sdp_enabled():
        return _torch_attention(q_BHSX, k_BHSX, v_BHSV, scale, documents)
    return _CausalAttention.apply(q_BHSX, k_BHSX, v_BHSV, scale, documents, rowwise)  # type: ignore[return-value]
