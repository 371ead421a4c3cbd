"""A bucket whose weights the modules read in FP8 alone: no copy of them in BF16, and one byte a weight is gathered.

Every rank rounds its shard of the FP32 masters in 128x128 blocks whose largest magnitudes are reduced over the group,
so the bytes are the same however the weights are cut (`model/fp8/weights.py`).
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from model.fp8.formats import QuantisedTensor
from model.fp8.watch import TensorStats, weight_stats
from model.fp8.weights import WeightBlocks, no_numbers
from parallel.bucket import Bucket, LocalParameter


class RoundedBucket(Bucket):
    """As `Bucket`, of parameters with `blocks`.

    values: E4M3 of all of them; scales: of every parameter's blocks, as stored. amax: largest magnitudes of the blocks.
    The parameters themselves are one NaN, spread over their shape: whoever reads a weight in another form finds out.
    """

    def _take(self, wide: Tensor, dtype: torch.dtype) -> None:
        first = self.parameters[0].blocks
        assert first is not None
        self.master = wide[self.shard].clone()
        self.values = torch.zeros(wide.shape, dtype=torch.float8_e4m3fn, device=wide.device)
        blocks = [blocks for _, blocks, _ in self._spans()]
        sizes = [block.scale_shape[0] * block.scale_shape[1] for block in blocks]
        self.amax = torch.zeros(sum(sizes), dtype=torch.float32, device=wide.device)
        self.scales = torch.empty(sum(sizes), dtype=first.scale_dtype, device=wide.device)
        shapes = [block.scale_shape for block in blocks]
        self._amax = [part.view(shape) for part, shape in zip(self.amax.split(sizes), shapes, strict=True)]
        self._scales = [part.view(shape) for part, shape in zip(self.scales.split(sizes), shapes, strict=True)]
        for number, (parameter, block, span) in enumerate(self._spans()):
            self._amax[number].copy_(block.amax(wide[span], 0))
            self._scales[number].copy_(block.scales(self._amax[number]))
            self.values[span] = block.encode(wide[span], 0, self._scales[number])
            parameter.weight.data = no_numbers(parameter.weight, dtype)

    def _spans(self) -> Iterator[tuple[LocalParameter, WeightBlocks, slice]]:
        """Every parameter, its blocks, and where it lies in the bucket."""
        start = 0
        for parameter in self.parameters:
            assert parameter.blocks is not None
            stop = start + parameter.weight.numel()
            yield parameter, parameter.blocks, slice(start, stop)
            start = stop

    def _own(self) -> Iterator[tuple[int, WeightBlocks, int, slice, Tensor]]:
        """Of every parameter that the shard has some of: number, blocks, first element, place in the bucket, master."""
        for number, (_, blocks, span) in enumerate(self._spans()):
            low, high = max(span.start, self.shard.start), min(span.stop, self.shard.stop)
            if low < high:
                master = self.master[low - self.shard.start : high - self.shard.start]
                yield number, blocks, low - span.start, slice(low, high), master.to(self.values.device)

    def find_scales(self) -> dist.Work | None:
        """See `Bucket`: the largest magnitudes of all ranks' parts of each block."""
        self.amax.zero_()
        for number, blocks, start, _, master in self._own():
            self._amax[number].copy_(blocks.amax(master, start))
        if self.size == 1:
            return None
        return dist.all_reduce(self.amax, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def round_own(self) -> None:
        """See `Bucket`."""
        for number, (_, blocks, _) in enumerate(self._spans()):
            self._scales[number].copy_(blocks.scales(self._amax[number]))
        for number, blocks, start, place, master in self._own():
            self.values[place] = blocks.encode(master, start, self._scales[number])

    def gather(self) -> dist.Work | None:
        """See `Bucket`."""
        if self.size == 1:
            return None
        values = self.values.view(torch.uint8)
        return dist.all_gather_single(values, values[self.shard], group=self.group, async_op=True)

    def lay_weights(self, weights: Tensor) -> None:
        """There are none that could be laid."""
        raise TypeError("these weights are in FP8 alone: use fp8.primary_weights=bf16")

    def tensors(self) -> Iterator[tuple[str, QuantisedTensor]]:
        """Every weight by name, in the bucket's own memory."""
        for number, (parameter, blocks, span) in enumerate(self._spans()):
            yield parameter.name, blocks.whole(self.values[span], self._scales[number])

    def stats(self) -> Iterator[TensorStats]:
        """What rounding did to every weight; all ranks of the group call it together, before the masters change."""
        device = self.values.device
        sums = torch.zeros(len(self.parameters), 5, dtype=torch.float64, device=device)
        for number, blocks, start, place, master in self._own():
            sums[number] = blocks.figures(master, start, self.values[place], self._scales[number])
        if self.size > 1:
            dist.all_reduce(sums, group=self.group)
        for parameter, row, amax in zip(self.parameters, sums.tolist(), self._amax, strict=True):
            layer = parameter.name.removesuffix(".weight")
            yield weight_stats(layer, row, amax=amax.max().item(), numel=parameter.weight.numel())
