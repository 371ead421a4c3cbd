"""RMSNorm by Transformer Engine's fused kernel; SwiGLU and cross entropy stay torch's.

The kernel computes in FP32 and rounds once, as the twin does: in BF16 they are within one step, 2^-7 of each number;
the weight's gradient is rounded to BF16 once a micro-batch. In FP32 only sums differ, by order. Its calls are held to
those of the pinned wheel; tests/gpu/test_fused_contract.py holds it to the twin on a GPU, where it has not run.
"""

from torch import Tensor

from model.backends import load_transformer_engine
from model.rowwise.kernels import Normed, NormGradient, TorchRowwise

KEY, INSTEAD = "train.rowwise=transformer_engine", "use train.rowwise=torch"
SM_MARGIN = 0  # multiprocessors left to others
ZERO_CENTERED = False  # the weight itself, not 1 + weight


class TransformerEngineRowwise(TorchRowwise):
    """`Rowwise` on a GPU."""

    def __init__(self) -> None:
        self._tex = load_transformer_engine(KEY, INSTEAD, "transformer_engine_torch")
        self._dtypes = load_transformer_engine(KEY, INSTEAD, "transformer_engine.pytorch.constants").TE_DType

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        """See `Rowwise`."""
        if not len(x):  # a grid without blocks cannot be launched
            return super().rms_norm(x, weight, eps)
        y, _, inverse_rms = self._tex.rmsnorm_fwd(
            x.contiguous(), weight.to(x.dtype), eps, None, None, self._dtypes[x.dtype], SM_MARGIN, ZERO_CENTERED
        )
        return Normed(y, inverse_rms.unsqueeze(1))

    def rms_norm_backward(self, x: Tensor, weight: Tensor, inverse_rms: Tensor, grad: Tensor) -> NormGradient:
        """See `Rowwise`."""
        if not len(x):
            return super().rms_norm_backward(x, weight, inverse_rms, grad)
        grad_x, grad_weight = self._tex.rmsnorm_bwd(
            grad.contiguous(), x.contiguous(), inverse_rms.squeeze(1), weight.to(x.dtype), SM_MARGIN, ZERO_CENTERED
        )
        return NormGradient(grad_x, grad_weight.float())
