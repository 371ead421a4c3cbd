"""RMSNorm by NVIDIA apex's fused kernel; SwiGLU and cross entropy stay torch's, apex has none of this form.

In BF16 the kernel rounds x / rms before it multiplies by the weight and again after it, the twin once: they are within
3 * 2^-8 of each number; the weight's gradient is rounded to BF16 once a micro-batch. In FP32 sums differ, by order.
Checked against the signatures and the arithmetic of apex's sources; tests/gpu/test_fused_contract.py holds it to the
twin on a GPU, where it has not run.
"""

from torch import Tensor

from model.backends import load_apex
from model.rowwise.kernels import Normed, NormGradient, TorchRowwise

KEY, INSTEAD = "train.rowwise=apex", "use train.rowwise=torch"
MODULE = "fused_layer_norm_cuda"


class ApexRowwise(TorchRowwise):
    """`Rowwise` on a GPU."""

    def __init__(self) -> None:
        self._cuda = load_apex(KEY, INSTEAD, MODULE)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        """See `Rowwise`."""
        if not len(x):  # a grid without blocks cannot be launched
            return super().rms_norm(x, weight, eps)
        y, inverse_rms = self._cuda.rms_forward_affine(x.contiguous(), weight.shape, weight.to(x.dtype), eps)
        return Normed(y, inverse_rms.unsqueeze(1))

    def rms_norm_backward(self, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad: Tensor) -> NormGradient:
        """See `Rowwise`."""
        if not len(x):
            return super().rms_norm_backward(x, weight, inverse_rms, grad)
        # eps is read only where the output is kept in place of the input ("memory efficient"), which is not our way.
        grad_x, grad_weight = self._cuda.rms_backward_affine(
            grad.contiguous(), inverse_rms.squeeze(1), x.contiguous(), weight.shape, weight.to(x.dtype), 0.0, False
        )
        return NormGradient(grad_x, grad_weight.float())
