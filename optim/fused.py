"""AdamW by kernels that others keep, one pass over all four tensors each; `adamw.py` is their plain twin.

Every kernel here reads and writes FP32 moments. BF16 ones are widened before it and rounded after it, stretch by
stretch, so that no FP32 copy of all of them exists. A kernel that is asked for and not there raises MissingKernel.
"""

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.adamw import AdamW, Shard
from optim.config import OptimConfig
from optim.cpu_adam import load_cpu_adam
from optim.missing import MissingKernel

STRETCH = 1 << 18  # elements widened at a time
GPU_CHUNK = 2048 * 32  # elements a block of the multi-tensor kernels works on: apex's and Transformer Engine's own


class StretchedAdamW(AdamW):
    """As `AdamW`, with the arithmetic of `kernel`, which differs from the plain one by rounding."""

    def __init__(
        self, masters: Sequence[Tensor], grads: Sequence[Tensor], decays: Sequence[bool], config: OptimConfig
    ) -> None:
        super().__init__(masters, grads, decays, config)
        self._scratch.clear()  # the plain twin's
        longest = min(STRETCH, max((len(master) for master in masters), default=0))
        self._wide = [torch.empty(longest, device=m.device) for m in masters[:1] for _ in range(3)]

    @torch.no_grad()
    def update(self, shard: Shard, *, lr: float, grad_scale: float = 1.0) -> None:
        """One shard's part of the step that `steps` counts."""
        weight_decay = self.config.weight_decay if shard.decay else 0.0
        for start in range(0, len(shard.master), STRETCH):
            part = slice(start, start + STRETCH)
            master, avg, avg_sq = shard.master[part], shard.exp_avg[part], shard.exp_avg_sq[part]
            grad, wide_avg, wide_sq = (buffer[: len(master)] for buffer in self._wide)
            torch.mul(shard.grad[part], grad_scale, out=grad)
            if avg.dtype == torch.float32:
                self.kernel(master, grad, avg, avg_sq, lr=lr, weight_decay=weight_decay)
                continue
            wide_avg.copy_(avg)
            wide_sq.copy_(avg_sq)
            self.kernel(master, grad, wide_avg, wide_sq, lr=lr, weight_decay=weight_decay)
            avg.copy_(wide_avg)
            avg_sq.copy_(wide_sq)

    @abstractmethod
    def kernel(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, weight_decay: float
    ) -> None:
        """Update master and both moments in place: flat, FP32, of one length, contiguous."""


class FusedAdamW(StretchedAdamW):
    """torch's kernel, on a CPU or a GPU: with FP32 moments `torch.optim.AdamW(fused=True)` bit for bit."""

    def kernel(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, weight_decay: float
    ) -> None:
        """See StretchedAdamW."""
        c = self.config
        steps = torch.full((), float(self.steps), device=master.device)
        torch.ops.aten._fused_adamw_(
            [master], [grad], [exp_avg], [exp_avg_sq], [], [steps],
            lr=lr, beta1=c.beta1, beta2=c.beta2, eps=c.eps, weight_decay=weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip


class DeepSpeedCPUAdamW(StretchedAdamW):
    """DeepSpeed's vectorised kernel for masters in host memory, compiled where it runs (`cpu_adam.py`)."""

    def __init__(
        self, masters: Sequence[Tensor], grads: Sequence[Tensor], decays: Sequence[bool], config: OptimConfig
    ) -> None:
        super().__init__(masters, grads, decays, config)
        for master in masters[:1]:
            if master.device.type != "cpu":
                raise MissingKernel(
                    f"optim.adamw=deepspeed_cpu updates masters in host memory, these are on {master.device}: "
                    "set optim.offload=true, or use optim.adamw=torch_fused"
                )
        self._module = load_cpu_adam()
        c = config
        # Its optimizers are numbered within the process; the numbers here are overwritten by every update.
        self._number = id(self) % (1 << 31)
        self._module.create_adam(self._number, 0.0, c.beta1, c.beta2, c.eps, c.weight_decay, True, False)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self._module.destroy_adam(self._number)

    def kernel(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, weight_decay: float
    ) -> None:
        """See StretchedAdamW."""
        c = self.config
        self._module.adam_update(
            self._number, self.steps, lr, c.beta1, c.beta2, c.eps, weight_decay, True, master, grad, exp_avg, exp_avg_sq
        )


class _MultiTensorAdamW(StretchedAdamW):
    """A CUDA kernel of apex's form: `f(chunk, overflow, lists of tensors, numbers ...)`, Adam's mode 1 being AdamW."""

    def __init__(
        self, masters: Sequence[Tensor], grads: Sequence[Tensor], decays: Sequence[bool], config: OptimConfig
    ) -> None:
        super().__init__(masters, grads, decays, config)
        self._multi_tensor_adam = self.load()
        for master in masters[:1]:
            if not self.on_gpu(master):
                raise MissingKernel(
                    f"optim.adamw={self.name} needs masters on a GPU, these are on {master.device}: "
                    "use optim.adamw=torch_fused, or set optim.offload=false"
                )
            self._overflow = torch.zeros(1, dtype=torch.int32, device=master.device)

    name: str

    @staticmethod
    def on_gpu(master: Tensor) -> bool:
        """Whether the kernel can reach it."""
        return master.is_cuda

    @abstractmethod
    def load(self) -> Any:
        """The kernel; MissingKernel where its package is not there."""

    def kernel(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, weight_decay: float
    ) -> None:
        """See StretchedAdamW."""
        c, lists = self.config, [[grad], [master], [exp_avg], [exp_avg_sq]]
        self._multi_tensor_adam(
            GPU_CHUNK, self._overflow, lists, lr, c.beta1, c.beta2, c.eps, self.steps, 1, 1, weight_decay
        )


class ApexAdamW(_MultiTensorAdamW):
    """The kernel of NVIDIA apex's FusedAdam. The package registry's `apex` is another project and has no `amp_C`."""

    name = "apex"

    def load(self) -> Any:
        """See _MultiTensorAdamW."""
        try:
            return importlib.import_module("amp_C").multi_tensor_adam
        except (ImportError, AttributeError) as error:
            raise MissingKernel(
                f"optim.adamw=apex: NVIDIA's apex with its CUDA extensions is not here ({error}): build it from source "
                "(`pip install apex` is another project), or use optim.adamw=torch_fused"
            ) from None


class TransformerEngineAdamW(_MultiTensorAdamW):
    """The kernel of Transformer Engine's FusedAdam."""

    name = "transformer_engine"

    def load(self) -> Any:
        """See _MultiTensorAdamW."""
        try:
            importlib.import_module("transformer_engine.pytorch")  # loads the libraries of the next
            return importlib.import_module("transformer_engine_torch").multi_tensor_adam
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise MissingKernel(
                f"optim.adamw=transformer_engine cannot be imported ({str(error).splitlines()[0]}): "
                "pip install -e .[gpu] on a machine with CUDA and cuDNN, or use optim.adamw=torch_fused"
            ) from None


ADAMW: dict[str, type[AdamW]] = {
    "plain": AdamW,
    "torch_fused": FusedAdamW,
    "deepspeed_cpu": DeepSpeedCPUAdamW,
    "apex": ApexAdamW,
    "transformer_engine": TransformerEngineAdamW,
}
