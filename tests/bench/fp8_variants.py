"""What blocks and promotion are for: the same small training in BF16, in FP8, and in FP8 broken on purpose.

    python -m tests.bench.fp8_variants --png model/fp8/variants.png

One feature in a tile of its own never changes and is 2^20 times as large as the others (an offset, a massive
activation); the hidden layer is normalised over the batch, which takes it out again, so that all there is to learn is
in the small tile. One scale for a whole tensor rounds that tile to zero; one 14-bit accumulator for all of K cuts it
off beside the large product. On the same data without the large feature the four curves are one. Products give FP32
(rounded to BF16 an output loses the small tile in any of them), the model of the tensor core is
`model.fp8.reference.hopper_accumulate`. Prints the mean loss of the last tenth as JSON: 1 is what a constant reaches.
"""

import json
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.show.pictures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, new_figure, save_figure
from model.fp8.formats import TILE_SIZE, QuantisedTensor, Rows, Tile
from model.fp8.quantise import Encoded, Kernels, Quantiser, Request, TorchKernels
from model.fp8.reference import Product, dgrad, fprop, hopper_product, unpromoted_product, wgrad

EXPONENT = 20


class Arithmetic(Protocol):
    """The three products of a linear layer, FP32 to FP32."""

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [rows, in], weight [out, in] -> [rows, out]."""
        ...

    def dgrad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad [rows, out], weight [out, in] -> [rows, in]."""
        ...

    def wgrad(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad [rows, out], x [rows, in] -> [out, in]."""
        ...


class BF16:
    """Operands in BF16, sums and results in FP32."""

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Arithmetic."""
        return _rounded(x) @ _rounded(weight).t()

    def dgrad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """See Arithmetic."""
        return _rounded(grad) @ _rounded(weight)

    def wgrad(self, grad: Tensor, x: Tensor) -> Tensor:
        """See Arithmetic."""
        return _rounded(grad).t() @ _rounded(x)


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


class OneScale(TorchKernels):
    """One scale for the whole tensor: the floor of every tile's amax is the tensor's."""

    def encode(self, x: Tensor, rows: Rows, request: Request) -> Encoded:
        """See quantise.Kernels."""
        return super().encode(x, rows, replace(request, amax_floor=float(x.abs().max())))


@dataclass(frozen=True)
class FP8:
    """The oracle's tiles and products, either of them replaceable."""

    kernels: Kernels
    product: Product

    def _tiles(self, x: Tensor, tile: Tile) -> QuantisedTensor:
        return Quantiser(tile, amax_floor=0.0, kernels=self.kernels).quantise(x)

    def fprop(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Arithmetic."""
        return fprop(self._tiles(x, Tile.ROW), self._tiles(weight, Tile.BLOCK), self.product)

    def dgrad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """See Arithmetic."""
        return dgrad(self._tiles(grad, Tile.ROW), self._tiles(weight, Tile.BLOCK), self.product)

    def wgrad(self, grad: Tensor, x: Tensor) -> Tensor:
        """See Arithmetic."""
        return wgrad(self._tiles(grad, Tile.COLUMN), self._tiles(x, Tile.COLUMN), self.product)[0]


def variants() -> dict[str, Arithmetic]:
    """What is compared, by name: the last two are the broken ones."""
    tiles = TorchKernels()
    return {
        "BF16": BF16(),
        "FP8, blocks": FP8(tiles, hopper_product),
        "FP8, one scale a tensor": FP8(OneScale(), hopper_product),
        "FP8, blocks, no promotion": FP8(tiles, unpromoted_product),
    }


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arithmetic = arithmetic
        return arithmetic.fprop(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        grad_x = ctx.arithmetic.dgrad(grad, weight) if ctx.needs_input_grad[0] else None
        return grad_x, ctx.arithmetic.wgrad(grad, x), None


@dataclass(frozen=True)
class Size:
    """Steps, rows a step, hidden width and outputs of a training."""

    steps: int = 150
    rows: int = 256
    hidden: int = 64
    outputs: int = 8


def batch(size: Size, teacher: Tensor, exponent: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """x [rows, 256]: in the first tile the large feature alone (None: nothing), Gaussian numbers in the second.

    The target [rows, outputs] depends on the second tile only.
    """
    features = torch.randn(size.rows, TILE_SIZE, generator=torch.Generator().manual_seed(seed))
    offset = torch.zeros(size.rows, TILE_SIZE)
    if exponent is not None:
        offset[:, 0] = 2.0**exponent
    return torch.cat([offset, features], dim=1), torch.tanh(features @ teacher)


def train(arithmetic: Arithmetic, *, exponent: int | None, size: Size) -> list[float]:
    """Losses of every step, over the variance of the target; the same seeds and data whatever the arithmetic."""
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(TILE_SIZE, size.outputs, generator=draw) / TILE_SIZE**0.5
    first = nn.Parameter(torch.randn(size.hidden, 2 * TILE_SIZE, generator=draw) / TILE_SIZE**0.5)
    second = nn.Parameter(torch.randn(size.outputs, size.hidden, generator=draw) / size.hidden**0.5)
    optimizer = torch.optim.Adam([first, second], lr=3e-3)
    losses = []
    for step in range(size.steps):
        x, target = batch(size, teacher, exponent, seed=1 + step)
        hidden: Any = _Linear.apply(x, first, arithmetic)
        output: Any = _Linear.apply(F.silu(F.batch_norm(hidden, None, None, training=True)), second, arithmetic)
        loss = F.mse_loss(output, target) / target.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare(exponent: int | None, size: Size) -> dict[str, list[float]]:
    """The losses of every variant."""
    return {name: train(arithmetic, exponent=exponent, size=size) for name, arithmetic in variants().items()}


def last(losses: Sequence[float]) -> float:
    """Mean of the last tenth."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def draw_png(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """One panel for each data set, the variants' losses in it; in the legend the mean of the last tenth."""
    figure = new_figure(10.0, 4.0)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.92, bottom=0.12, wspace=0.06)
    styles = {
        "BF16": (INK, 3.4, "-"), "FP8, blocks": (BLUE, 1.8, "-"), "FP8, one scale a tensor": (ORANGE, 1.6, "-"),
        "FP8, blocks, no promotion": (GREEN, 1.6, (0, (4, 2))),
    }  # fmt: skip
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for name, losses in curves.items():
            colour, width, dashes = styles[name]
            axes.plot(losses, color=colour, linewidth=width, linestyle=dashes, label=f"{name}: {last(losses):.3f}")
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_yscale("log")
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        axes.minorticks_off()
        axes.tick_params(labelsize=8.5, colors=MUTED, length=0)
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("step", fontsize=9, color=MUTED)
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="center right", bbox_to_anchor=(1, 0.5))
        axes.spines[:].set_visible(False)
    row[0].set_ylabel("loss over the target's variance", fontsize=9, color=MUTED)
    save_figure(figure, path)


def main() -> int:
    """Train all, print the losses as JSON, draw them."""
    parser = ArgumentParser(prog="python -m tests.bench.fp8_variants")
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--exponent", type=int, default=EXPONENT, help="of the large feature, a power of two")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(steps=args.steps)
    panels = {
        "all tiles of one magnitude": compare(None, size),
        f"one tile 2^{args.exponent} times as large": compare(args.exponent, size),
    }
    print(json.dumps({title: {name: round(last(v), 4) for name, v in c.items()} for title, c in panels.items()}))
    if args.png:
        draw_png(panels, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
