"""The fused kernels against torch.optim, bit for bit, and against the plain twin by a bound.

What needs a package or a GPU that is not here: DeepSpeed's CPU Adam in an environment with it (slow), apex's and
Transformer Engine's kernels on a stand-in with their signature, and against the wheel (slow); tests/gpu has the rest.
"""

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optim import cpu_adam, fused
from optim.adamw import AdamW
from optim.config import OptimConfig
from optim.fused import ADAMW, STRETCH, FusedAdamW
from optim.missing import MissingKernel
from tests.extras import environment_with, run_there

CONFIG = OptimConfig(moments="fp32", weight_decay=0.1)
BOUNDS = [("fp32", 2e-6), ("bf16", 2e-2)]
# The factor 1 - lr * weight_decay is rounded to FP32 in torch and the plain twin, and not in DeepSpeed: 3e-8 of every
# weight in every step, here a few 1e-4 of what decay does, and decay is a tenth of the change.
CPU_ADAM_BOUNDS = {"fp32": 2e-4, "bf16": 2e-2}
TRANSFORMER_ENGINE = "2.20.2"


def masters_and_grads(sizes: tuple[int, ...], seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw) for size in sizes], [torch.empty(size) for size in sizes]


def fill(grads: list[torch.Tensor], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, generator=draw) * 10.0 ** (step % 5 - 3))


def changes(kind: type[AdamW], moments: str) -> list[torch.Tensor]:
    """What 20 steps change in two masters, one decayed."""
    masters, grads = masters_and_grads((5000, 100))
    before = [master.clone() for master in masters]
    optimizer = kind(masters, grads, [True, False], replace(CONFIG, moments=moments))
    for step in range(20):
        fill(grads, step)
        optimizer.step(lr=1e-3, grad_scale=0.5)
    return [master - old for master, old in zip(masters, before, strict=True)]


def worst(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    assert all(bool(change.any()) for change in first)
    return max(float((a - b).norm() / a.norm()) for a, b in zip(first, second, strict=True))


def test_equal_to_torchs_fused_adamw_bit_for_bit() -> None:
    sizes = (STRETCH + 77, 33)
    ours, grads = masters_and_grads(sizes)
    theirs = [torch.nn.Parameter(master.clone()) for master in ours]
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    optimizer = FusedAdamW(ours, grads, [True, False], CONFIG)
    for step in range(6):
        fill(grads, step)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        reference.step()
        optimizer.step(lr=1e-3)
    for shard, parameter in zip(optimizer.shards, theirs, strict=True):
        assert torch.equal(shard.master, parameter)
        assert torch.equal(shard.exp_avg, reference.state[parameter]["exp_avg"])
        assert torch.equal(shard.exp_avg_sq, reference.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize(("moments", "bound"), BOUNDS)
def test_within_the_bound_of_the_plain_twin(moments: str, bound: float) -> None:
    """bound: on the difference of the masters over what 20 steps have changed in them."""
    assert worst(changes(AdamW, moments), changes(FusedAdamW, moments)) < bound


def test_the_clip_scales_the_gradient() -> None:
    changed = []
    for scale, factor in ((0.25, 1.0), (1.0, 0.25)):
        masters, grads = masters_and_grads((100,))
        fill(grads, 3)
        grads[0].mul_(factor)
        optimizer = FusedAdamW(masters, grads, [True], CONFIG)
        optimizer.step(lr=1e-3, grad_scale=scale)
        changed.append(masters[0])
    assert torch.equal(*changed)


@pytest.mark.parametrize("kind", [AdamW, FusedAdamW])
def test_shard_by_shard_is_the_step(kind: type[AdamW]) -> None:
    """As a ZeRO that calls its optimizer for one bucket at a time does it."""
    results = []
    for by_shard in (False, True):
        masters, grads = masters_and_grads((70, 30))
        fill(grads, 1)
        optimizer = kind(masters, grads, [True, False], CONFIG)
        if by_shard:
            optimizer.steps += 1
            for shard in reversed(optimizer.shards):
                optimizer.update(shard, lr=1e-3, grad_scale=0.5)
        else:
            optimizer.step(lr=1e-3, grad_scale=0.5)
        results.append(torch.cat(masters))
    assert torch.equal(*results)


def test_names() -> None:
    assert list(ADAMW) == ["plain", "torch_fused", "deepspeed_cpu", "apex", "transformer_engine"]


# --- DeepSpeed's CPU Adam ---------------------------------------------------------------------------------------


def deepspeed_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_adam, "version", lambda name: "0.19.8")


def test_no_deepspeed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise cpu_adam.PackageNotFoundError(name)

    monkeypatch.setattr(cpu_adam, "version", absent)
    with pytest.raises(MissingKernel, match="DeepSpeed is not installed") as caught:
        ADAMW["deepspeed_cpu"](*masters_and_grads((8,)), [True], CONFIG)
    assert "\n" not in str(caught.value) and caught.value.user_error


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deepspeed_installed(monkeypatch)
    monkeypatch.setattr(cpu_adam.shutil, "which", lambda tool, path: None)
    with pytest.raises(MissingKernel, match=r"there is no g\+\+ and no ninja: install it, or use optim.adamw="):
        cpu_adam.build_cpu_adam(tmp_path)


def test_a_build_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deepspeed_installed(monkeypatch)
    monkeypatch.setattr(cpu_adam, "_tools", lambda: "/usr/bin")
    monkeypatch.setattr(cpu_adam, "PROGRAM", "import sys; sys.exit('x.cpp:3: error: no such thing\\nmore')")
    with pytest.raises(MissingKernel, match=r"does not build here \(x.cpp:3: error: no such thing\)") as caught:
        cpu_adam.build_cpu_adam(tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("done"))


def test_what_a_killed_build_left_is_removed_and_the_next_one_builds_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch's loader waits for as long as `lock` lies in the folder of the extension."""
    deepspeed_installed(monkeypatch)
    monkeypatch.setattr(cpu_adam, "_tools", lambda: "/usr/bin")
    program = """
import os, pathlib
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam"
assert not (folder / "lock").exists(), "the build would wait for ever"
folder.mkdir()
(folder / "cpu_adam.so").write_text("not a library")
with open(folder.parent / "builds", "a") as builds:
    builds.write("x")
"""
    monkeypatch.setattr(cpu_adam, "PROGRAM", program)
    (stale,) = [tmp_path / cpu_adam._key("0.19.8") / "cpu_adam"]
    stale.mkdir(parents=True)
    (stale / "lock").touch()
    (stale / "cpu_adam.so").touch()  # half written
    library = cpu_adam.build_cpu_adam(tmp_path)
    assert library == cpu_adam.build_cpu_adam(tmp_path) and library.read_text() == "not a library"
    assert (stale.parent / "builds").read_text() == "x"
    with pytest.raises(MissingKernel, match="does not load"):
        cpu_adam.load_cpu_adam(tmp_path)


@pytest.mark.slow
def test_deepspeeds_cpu_adam_is_within_the_bound_of_the_plain_twin() -> None:
    python = environment_with("deepspeed==0.19.8", "ninja")
    found = json.loads(run_there(python, "tests.optim.cpu_adam_program", timeout=1200).splitlines()[-1])
    assert found.keys() == CPU_ADAM_BOUNDS.keys()
    assert all(0 < found[moments] < bound for moments, bound in CPU_ADAM_BOUNDS.items()), found


# --- apex and Transformer Engine --------------------------------------------------------------------------------


def multi_tensor_adam(
    chunk: int, overflow: Any, lists: list[list[torch.Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """What apex's kernel computes, in its own order of arguments."""
    assert chunk > 0 and mode == bias_correction == 1
    for grad, master, avg, avg_sq in zip(*lists, strict=True):
        assert grad.dtype == master.dtype == avg.dtype == avg_sq.dtype == torch.float32
        avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (avg_sq / (1 - beta2**step)).sqrt().add_(eps)
        master.sub_(avg / (1 - beta1**step) / denominator + weight_decay * master, alpha=lr)


@pytest.mark.parametrize("name", ["apex", "transformer_engine"])
@pytest.mark.parametrize(("moments", "bound"), [("fp32", 2e-4), ("bf16", 2e-2)])
def test_gpu_kernels_are_called_as_they_are_meant(
    monkeypatch: pytest.MonkeyPatch, name: str, moments: str, bound: float
) -> None:
    kind = type("OnStandIn", (ADAMW[name],), {"on_gpu": staticmethod(lambda master: True)})
    monkeypatch.setattr(
        fused.importlib, "import_module", lambda module: SimpleNamespace(multi_tensor_adam=multi_tensor_adam)
    )
    assert worst(changes(AdamW, moments), changes(kind, moments)) < bound


@pytest.mark.parametrize(
    ("name", "words"), [("apex", "`pip install apex` is another project"), ("transformer_engine", "cannot be imported")]
)
def test_a_missing_gpu_kernel_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    def absent(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(fused.importlib, "import_module", absent)
    with pytest.raises(MissingKernel, match=words) as caught:
        ADAMW[name](*masters_and_grads((8,)), [True], CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["apex", "transformer_engine"])
def test_a_gpu_kernel_refuses_host_memory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(
        fused.importlib, "import_module", lambda module: SimpleNamespace(multi_tensor_adam=multi_tensor_adam)
    )
    with pytest.raises(MissingKernel, match=f"optim.adamw={name} needs masters on a GPU, these are on cpu"):
        ADAMW[name](*masters_and_grads((8,)), [True], CONFIG)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    done = subprocess.run([*command, f"transformer_engine=={TRANSFORMER_ENGINE}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no wheel of transformer_engine: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        yield opened


@pytest.mark.slow
def test_the_kernel_is_called_as_transformer_engines_own_optimizer_calls_it(wheel: zipfile.ZipFile) -> None:
    """Its FusedAdam gives the kernel, after tensors: lr, betas, eps, step, mode, bias correction, weight decay."""
    tree = ast.parse(wheel.read("transformer_engine/pytorch/optimizers/fused_adam.py"))
    (applied,) = [
        n for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "multi_tensor_applier"
        and ast.unparse(n.args[0]) == "adam_func"
    ]  # fmt: skip
    assert [ast.unparse(argument) for argument in applied.args[1:-2]] == [
        "self._dummy_overflow_buf", "tensor_list_chunk", "group['lr']", "beta1", "beta2", "group['eps']",
        "group['step']", "self.adam_w_mode", "bias_correction", "group['weight_decay']",
    ]  # fmt: skip
    assert all(isinstance(argument, ast.Starred) for argument in applied.args[-2:])  # of other kernels
    applier = ast.unparse(ast.parse(wheel.read("transformer_engine/pytorch/optimizers/multi_tensor_apply.py")))
    assert "op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)" in applier
    (ours,) = [
        n for n in ast.walk(ast.parse(Path(fused.__file__).read_text()))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "self._multi_tensor_adam"
    ]  # fmt: skip
    assert [ast.unparse(argument) for argument in ours.args] == [
        "GPU_CHUNK", "self._overflow", "lists", "lr", "c.beta1", "c.beta2", "c.eps", "self.steps", "1", "1",
        "weight_decay",
    ]  # fmt: skip
    assert "self.multi_tensor_adam = tex.multi_tensor_adam" in ast.unparse(tree)
    assert "import transformer_engine_torch as tex" in ast.unparse(tree)
