"""Output head and cross entropy as one operation, in chunks of tokens, so that FP32 logits never exist whole.

Forward leaves softmax minus one-hot in the activation dtype, written over the logits; backward is then one product
for the hidden state and one, through the sink, for the head. Both scale with the loss's incoming gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.weight_grad import WeightGradSink, add_product

IGNORED = -1  # label of a position without a loss
CHUNK_BYTES = 16 << 20  # FP32 logits of one chunk


class _HeadLoss(torch.autograd.Function):
    """h_TD, weight_VD, labels_T -> FP32 loss_T (0 where ignored)."""

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, sink: WeightGradSink) -> Tensor:
        num_tokens, vocab = h_TD.shape[0], weight_VD.shape[0]
        chunk = max(1, CHUNK_BYTES // (4 * vocab))
        keep = any(ctx.needs_input_grad)
        grad_TV = h_TD.new_empty(num_tokens if keep else min(chunk, num_tokens), vocab)
        loss_T = torch.empty(num_tokens, dtype=torch.float32, device=h_TD.device)
        for start in range(0, num_tokens, chunk):
            part = slice(start, min(start + chunk, num_tokens))
            labels = labels_T[part]
            logits = grad_TV[part] if keep else grad_TV[: len(labels)]
            torch.mm(h_TD[part], weight_VD.t(), out=logits)
            log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            ignored = labels == IGNORED
            index = labels.clamp(min=0).unsqueeze(1)
            loss_T[part] = -log_p.gather(1, index).squeeze(1).masked_fill(ignored, 0)
            if keep:
                torch.exp(log_p, out=log_p)
                log_p.scatter_add_(1, index, log_p.new_full(index.shape, -1.0))
                logits.copy_(log_p)
                logits[ignored] = 0
        if keep:
            ctx.save_for_backward(h_TD, weight_VD, grad_TV)
            ctx.sink = sink
        return loss_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        h_TD, weight_VD, grad_TV = ctx.saved_tensors
        scale_T1 = grads[0].unsqueeze(1)
        if ctx.needs_input_grad[1]:
            scaled_TD = (h_TD * scale_T1).to(h_TD.dtype)
            ctx.sink.put(weight_VD, lambda acc: add_product(acc, grad_TV.t(), scaled_TD))
        return ((grad_TV @ weight_VD) * scale_T1).to(h_TD.dtype), None, None, None


def head_loss(h_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, sink: WeightGradSink) -> Tensor:
    """Cross entropy in nats of every position: [B, S] FP32, 0 where the label is `IGNORED`."""
    loss_T = _HeadLoss.apply(h_BSD.flatten(0, 1), weight_VD, labels_BS.flatten(), sink)
    return loss_T.view(labels_BS.shape)  # type: ignore[union-attr]
