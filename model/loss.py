"""Output head and cross entropy as one operation, in chunks of tokens, so that FP32 logits never exist whole.

Forward leaves softmax minus one-hot in the activation dtype, written over the logits; backward is then one product
for the hidden state and one, through the sink, for the head. Both scale with the loss's incoming gradient.
"""

from typing import Any

import torch
from torch import Tensor

from model.rowwise.kernels import TORCH, Rowwise
from model.weight_grad import ProductGrad, WeightGradSink

IGNORED = -1  # label of a position without a loss
CHUNK_BYTES = 4 << 20  # FP32 logits of one chunk: in cache on a CPU
GPU_CHUNK_BYTES = 256 << 20  # large enough to fill a GPU
# Elements between the end of a row of logits and the next row: where a vocabulary is a power of two, the rows that a
# product reads together would fall on the same few sets of a CPU's cache (0.94 of the time of the weight's gradient).
CPU_GAP = 16


class _HeadLoss(torch.autograd.Function):
    """h_TD, weight_VD, labels_T -> FP32 loss_T (0 where ignored)."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, sink: WeightGradSink, rowwise: Rowwise
    ) -> Tensor:
        num_tokens, vocab = h_TD.shape[0], weight_VD.shape[0]
        chunk = max(1, (GPU_CHUNK_BYTES if h_TD.is_cuda else CHUNK_BYTES) // (4 * vocab))
        keep = any(ctx.needs_input_grad)
        num_rows, gap = num_tokens if keep else min(chunk, num_tokens), 0 if h_TD.is_cuda else CPU_GAP
        grad_TV = h_TD.new_empty(num_rows, vocab + gap)[:, :vocab]
        loss_T = torch.empty(num_tokens, dtype=torch.float32, device=h_TD.device)
        if keep:
            torch.mm(h_TD, weight_VD.t(), out=grad_TV)  # at once: small products are slow
        for start in range(0, num_tokens, chunk):
            part = slice(start, min(start + chunk, num_tokens))
            out = grad_TV[part] if keep else grad_TV[: part.stop - start]
            logits = out if keep else torch.mm(h_TD[part], weight_VD.t(), out=out)
            loss_T[part] = rowwise.cross_entropy(logits, labels_T[part])
        if keep:
            ctx.save_for_backward(h_TD, weight_VD, grad_TV)
            ctx.sink = sink
        return loss_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        h_TD, weight_VD, grad_TV = ctx.saved_tensors
        scale_T1 = grads[0].unsqueeze(1)
        if ctx.needs_input_grad[1]:
            ctx.sink.put(weight_VD, ProductGrad(grad_TV.t(), (h_TD * scale_T1).to(h_TD.dtype)))
        return ((grad_TV @ weight_VD) * scale_T1).to(h_TD.dtype), None, None, None, None


def head_loss(
    h_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, sink: WeightGradSink, rowwise: Rowwise = TORCH
) -> Tensor:
    """Cross entropy in nats of every position: [B, S] FP32, 0 where the label is `IGNORED`."""
    loss_T = _HeadLoss.apply(h_BSD.flatten(0, 1), weight_VD, labels_BS.flatten(), sink, rowwise)
    return loss_T.view(labels_BS.shape)  # type: ignore[union-attr]
