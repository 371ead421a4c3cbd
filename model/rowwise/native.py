"""The row-wise passes as compiled code for a CPU (csrc/rowwise.cpp): one pass through the cache for each.

Pieces of a fixed number of elements are spread over torch's threads; results do not depend on how many there are.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.compiled import address, build
from model.rowwise.kernels import Normed, NormGradient, SwiGLUGradient
from model.threads import spread

SOURCE = Path(__file__).parent / "csrc" / "rowwise.cpp"
HEADERS = (SOURCE.parent / "lanes.h",)
INSTEAD = "train.rowwise=torch"
PIECE_ELEMENTS = 1 << 19  # some 100 microseconds of work


class NativeRowwise:
    """`Rowwise` on dense CPU tensors in FP32 or BF16."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build("rowwise", SOURCE, headers=HEADERS, instead=INSTEAD)))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        """See `Rowwise`."""
        x, weight = _dense(x), _dense(weight, like=x)
        y, inverse_rms = torch.empty_like(x), torch.empty(len(x), 1)

        def norm(pieces: Iterator[slice]) -> None:
            for rows in pieces:
                part = x[rows]
                self._library.rowwise_rms_norm(
                    *(_bf16(x), address(part), address(weight), *_sizes(part), ctypes.c_float(eps)),
                    *(address(y[rows]), address(inverse_rms[rows])),
                )

        spread(norm, _pieces(x))
        return Normed(y, inverse_rms)

    def rms_norm_backward(self, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad: Tensor) -> NormGradient:
        """See `Rowwise`."""
        x, grad, weight = _dense(x), _dense(grad, like=x), _dense(weight, like=x)
        grad_x, pieces, size = torch.empty_like(x), _pieces(x), x.shape[1]
        partial = torch.empty(len(pieces), size)

        def backward(items: Iterator[tuple[int, slice]]) -> None:
            scratch = torch.empty(size)
            for i, rows in items:
                part = x[rows]
                self._library.rowwise_rms_norm_backward(
                    *(_bf16(x), address(part), address(weight), address(grad[rows]), address(inverse_rms[rows])),
                    *(*_sizes(part), address(grad_x[rows]), address(partial[i]), address(scratch)),
                )

        spread(backward, enumerate(pieces))
        return NormGradient(grad_x, partial.sum(0))

    def swiglu(self, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        """See `Rowwise`."""
        gate_up, weights = _dense(gate_up), None if weights is None else weights.float().contiguous()
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)

        def activate(pieces: Iterator[slice]) -> None:
            for rows in pieces:
                part = out[rows]
                self._library.rowwise_swiglu(
                    *(_bf16(out), address(gate_up[rows]), address(None if weights is None else weights[rows])),
                    *(*_sizes(part), address(part)),
                )

        spread(activate, _pieces(gate_up))
        return out

    def swiglu_backward(self, gate_up: Tensor, weights: Tensor | None, grad: Tensor) -> SwiGLUGradient:
        """See `Rowwise`."""
        gate_up, grad = _dense(gate_up), _dense(grad, like=gate_up)
        factors = None if weights is None else weights.float().contiguous()
        grad_gate_up, grad_weights = torch.empty_like(gate_up), None if factors is None else torch.empty_like(factors)

        def backward(pieces: Iterator[slice]) -> None:
            for rows in pieces:
                part = grad[rows]
                self._library.rowwise_swiglu_backward(
                    *(_bf16(grad), address(gate_up[rows]), address(None if factors is None else factors[rows])),
                    *(address(part), *_sizes(part), address(grad_gate_up[rows])),
                    address(None if grad_weights is None else grad_weights[rows]),
                )

        spread(backward, _pieces(gate_up))
        if weights is not None and grad_weights is not None:
            grad_weights = grad_weights.to(weights.dtype)
        return SwiGLUGradient(grad_gate_up, grad_weights)

    def causal_softmax(self, scores: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        """See `Rowwise`; on the calling thread: attention gives whole batches of heads to each."""
        _check_scores(scores, first)
        p = None if dtype == torch.float32 else torch.empty_like(scores, dtype=torch.bfloat16)
        self._library.rowwise_causal_softmax(address(scores), *map(ctypes.c_long, (*scores.shape, first)), address(p))
        return scores if p is None else p

    def causal_softmax_backward(self, p: Tensor, grad: Tensor, first: int) -> Tensor:
        """See `Rowwise`; on the calling thread, over grad."""
        _check_scores(p, first)
        if p.dtype != grad.dtype or p.shape != grad.shape or not grad.is_contiguous():
            raise ValueError(f"gradient of {tuple(grad.shape)} {grad.dtype} for softmax of {tuple(p.shape)} {p.dtype}")
        self._library.rowwise_causal_softmax_backward(
            _bf16(p), address(p), *map(ctypes.c_long, (*p.shape, first)), address(grad)
        )
        return grad

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Rowwise`; ValueError for a label beyond the vocabulary, which would be read from elsewhere."""
        _check(logits)
        num_rows, vocab = logits.shape
        if num_rows and vocab > 1 and logits.stride(1) != 1:
            raise ValueError(f"logits of strides {logits.stride()}: they are overwritten, so each row must be dense")
        if num_rows and int(labels.max()) >= vocab:
            raise ValueError(f"label {int(labels.max())} is beyond the vocabulary of {vocab}")
        labels, loss = labels.to(torch.int64).contiguous(), torch.empty(num_rows)

        def entropy(pieces: Iterator[slice]) -> None:
            scratch = torch.empty(vocab)
            for rows in pieces:
                part = logits[rows]
                self._library.rowwise_cross_entropy(
                    *(_bf16(part), address(part), ctypes.c_long(part.stride(0)), address(labels[rows])),
                    *(*_sizes(part), address(loss[rows]), address(scratch)),
                )

        spread(entropy, _pieces(logits))
        return loss


def _check_scores(scores: Tensor, first: int) -> None:
    """Dense [heads, rows, size] on the CPU whose last row has a last key."""
    _check(scores)
    if scores.dim() != 3 or not scores.is_contiguous() or scores.shape[2] < first + scores.shape[1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} from query {first} on: dense [heads, rows, keys], keys to the last row"
        )


def _dense(x: Tensor, *, like: Tensor | None = None) -> Tensor:
    """x as the kernels read it: contiguous, on the CPU, FP32 or BF16, and of one dtype with `like`."""
    _check(x)
    return (x if like is None else x.to(like.dtype)).contiguous()


def _check(x: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"compiled row-wise kernels take FP32 or BF16 on a CPU, not {x.dtype} on {x.device}")


def _bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _sizes(x: Tensor) -> tuple[ctypes.c_long, ctypes.c_long]:
    return ctypes.c_long(x.shape[0]), ctypes.c_long(x.shape[1])


def _pieces(x: Tensor) -> list[slice]:
    """Slices over the rows of x [R, ...], of a size that depends on the shape alone."""
    num_rows, row = len(x), max(1, x.numel() // max(1, len(x)))
    step = max(1, PIECE_ELEMENTS // row)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
