"""Rules on other projects' back ends, and what the installation pulls in."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launcher.check import packages, record
from launcher.check.run import checked
from launcher.config import ConfigError
from model import backends
from model.fp8.config import TRANSFORMER_ENGINE_FROM, TRANSFORMER_ENGINE_UNTIL

ROOT = Path(__file__).parents[3]
HEAVY = ("deepspeed", "megatron", "transformer-engine", "transformer_engine", "apex", "wandb", "triton", "submitit")


def messages(overrides: list[str]) -> list[str]:
    try:
        checked(overrides, with_data=False)
    except ConfigError as error:
        return error.errors
    return []


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of the packages that the rules see."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(backends, "installed", versions.get)
    return versions


@pytest.mark.parametrize("key", ["optim.zero1=deepspeed", "optim.adamw=deepspeed_cpu"])
def test_deepspeed_in_no_version_and_in_the_wrong_one(installed: dict[str, str], key: str) -> None:
    (line,) = messages([key])
    assert line.startswith(key) and "not installed" in line and "pip install -e .[deepspeed]" in line
    for version in ("0.18.9", "0.19.7", "0.20.0", "1.0"):
        installed["deepspeed"] = version
        (line,) = messages([key])
        assert f"DeepSpeed {version} is installed, 0.19.8 or newer, below 0.20 is needed: pip install -e .[dee" in line


def test_transformer_engine_in_no_version_and_in_the_wrong_one(installed: dict[str, str]) -> None:
    """The range that the rule on fp8.backend has."""
    key = "optim.adamw=transformer_engine"
    (line,) = messages([key])
    assert line == (
        f"{key}: Transformer Engine is not installed (2.20 or newer, below 2.21 is needed): pip install -e .[gpu], or "
        "use optim.adamw=torch_fused"
    )
    for version in ("1.13.0", "2.19.1", "2.21.0"):
        installed["transformer_engine"] = version
        (line,) = messages([key])
        assert f"Transformer Engine {version} is installed, 2.20 or newer, below 2.21 is needed" in line
    installed["transformer_engine"] = "2.20.2+1a2b3c"
    assert messages([key]) == []


def test_wandb_in_no_version_and_in_the_wrong_one(installed: dict[str, str]) -> None:
    (line,) = messages(["train.wandb=offline"])
    assert line == (
        "train.wandb=offline: wandb is not installed (0.31 or newer, below 0.32 is needed): pip install -e .[wandb], "
        "or use train.wandb=off"
    )
    for version in ("0.19.0", "0.30.2", "0.32.0", "1.0"):
        installed["wandb"] = version
        (line,) = messages(["train.wandb=offline"])
        assert f"wandb {version} is installed, 0.31 or newer, below 0.32 is needed: pip install -e .[wandb]" in line
    installed["wandb"] = "0.31.1"
    assert messages(["train.wandb=offline"]) == []


def test_a_good_deepspeed_is_taken(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["deepspeed"] = "0.19.8+cpu"
    monkeypatch.setattr(packages.shutil, "which", lambda tool, path: f"/usr/bin/{tool}")
    assert messages(["optim.zero1=deepspeed", "optim.adamw=deepspeed_cpu"]) == []


def test_cpu_adam_needs_its_tools(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["deepspeed"] = "0.19.8"
    monkeypatch.setattr(packages.shutil, "which", lambda tool, path: None if tool == "ninja" else tool)
    (line,) = messages(["optim.adamw=deepspeed_cpu"])
    assert "no ninja" in line and "torch_fused" in line and "g++" not in line


def test_the_other_apex_is_told_apart(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    present: set[str] = set()
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name in present else None)
    (line,) = messages(["optim.adamw=apex"])
    assert "it is not installed" in line
    installed["apex"] = "0.9.10.dev0"
    (line,) = messages(["optim.adamw=apex"])
    assert "apex 0.9.10.dev0 installed here is another project" in line
    present.add("apex.multi_tensor_apply")
    (line,) = messages(["optim.adamw=apex"])
    assert "without its CUDA extensions" in line
    present.add("amp_C")
    assert messages(["optim.adamw=apex"]) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.adamw=fused"], "use plain, torch_fused, deepspeed_cpu, apex or transformer_engine"),
        (["optim.zero1=megatron"], "use plain or deepspeed"),
        (["optim.adamw=transformer_engine"], "Transformer Engine is not installed"),
        (["optim.adamw=apex", "train.device=cpu"], "needs a GPU, but train.device=cpu"),
        (["optim.adamw=apex", "optim.offload=true"], "keeps masters on the host"),
        (["optim.adamw=deepspeed_cpu", "train.device=cuda"], "set optim.offload=true"),
        (["optim.offload=maybe"], "expected true or false"),
    ],
)
def test_what_cannot_be(installed: dict[str, str], overrides: list[str], words: str) -> None:
    assert sum(words in line for line in messages(overrides)) == 1


def test_the_command_says_it_in_one_line_with_exit_code_2() -> None:
    if backends.installed("deepspeed"):
        pytest.skip("DeepSpeed is installed here")
    command = [sys.executable, "-m", "launcher", "train", "experiment=tiny", "optim.zero1=deepspeed", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said
    assert sum("optim.zero1=deepspeed: DeepSpeed is not installed" in line for line in said.splitlines()) == 1


# --- the installation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """The arguments of setup() in setup.py that are written out."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "setup"]
    given = {k.arg: k.value for k in call.keywords if k.arg in ("install_requires", "extras_require")}
    names = {n.targets[0].id: ast.literal_eval(n.value) for n in tree.body
             if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}  # fmt: skip
    return {key: eval(compile(ast.Expression(value), "setup.py", "eval"), names) for key, value in given.items()}


def test_the_default_installation_is_small(setup: dict[str, Any]) -> None:
    required = setup["install_requires"]
    assert not [line for line in required if line.lower().startswith(HEAVY)]
    assert len(required) <= 12


def test_a_cluster_gets_every_package_of_the_registry_at_once(setup: dict[str, Any]) -> None:
    """apex alone is not on a registry; torch and hydra-core are always there."""
    names = {line.partition("[")[0].partition(">")[0].partition("=")[0] for line in setup["extras_require"]["cluster"]}
    assert {"deepspeed", "megatron-core", "transformer-engine", "wandb", "ninja"} <= names and "apex" not in names
    always = [line.partition(">")[0] for line in setup["install_requires"]]
    assert {"torch", "hydra-core"} <= set(always)


def test_the_seven_of_a_cluster_come_with_one_command(setup: dict[str, Any]) -> None:
    """slurm/install.sh: torch and hydra-core with the package, four of the extra, apex by itself."""
    script = (ROOT / "slurm" / "install.sh").read_text()
    assert "-e '.[cluster]'" in script and "apex @ git+https://github.com/NVIDIA/apex@" in script
    asked = {Requirement(line).name for line in (*setup["install_requires"], *setup["extras_require"]["cluster"])}
    assert {"torch", "hydra-core", "deepspeed", "megatron-core", "transformer-engine", "wandb"} <= asked


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pinned_versions_lie_in_the_ranges(setup: dict[str, Any], python: str) -> None:
    """What was resolved together is what setup.py allows, and each package of the extra is pinned once."""
    pinned: dict[str, str] = {}
    for file in ("constraints.txt", "slurm/constraints.txt"):
        for line in (ROOT / file).read_text().splitlines():
            pin = Requirement(line) if line and not line.startswith("#") else None
            if pin and (pin.marker is None or pin.marker.evaluate({"python_version": python})):
                assert pin.name not in pinned, pin.name
                (pinned[pin.name],) = [clause.version for clause in pin.specifier]
    for line in (*setup["install_requires"], *setup["extras_require"]["cluster"]):
        asked = Requirement(line)
        name = next(n for n in pinned if canonicalize_name(n) == canonicalize_name(asked.name))
        assert asked.specifier.contains(pinned[name]), f"{line}: {pinned[name]} is pinned"


def test_ranges_agree_with_the_rules(setup: dict[str, Any]) -> None:
    from optim.cpu_adam import NAME
    from parallel import deepspeed_zero1

    assert NAME == "cpu_adam"
    wanted = f"deepspeed>={packages.DEEPSPEED_FROM},<{packages.DEEPSPEED_UNTIL}"
    extras = setup["extras_require"]
    assert wanted in extras["deepspeed"] and wanted in extras["cluster"]
    tested = (deepspeed_zero1.TESTED_FROM, deepspeed_zero1.TESTED_UNTIL)
    assert tested == (packages.DEEPSPEED_FROM, packages.DEEPSPEED_UNTIL)
    others = {
        f"wandb>={record.WANDB_FROM},<{record.WANDB_UNTIL}": ("wandb", "gpu", "cluster", "test"),
        f"transformer-engine[pytorch]>={TRANSFORMER_ENGINE_FROM},<{TRANSFORMER_ENGINE_UNTIL}": ("gpu", "cluster"),
    }
    for asked, names in others.items():
        assert all(asked in extras[name] for name in names), asked
        # and in no other words elsewhere
        kin = [line for lines in extras.values() for line in lines if line.startswith(Requirement(asked).name)]
        assert set(kin) == {asked}


def test_importing_the_launcher_is_quick_and_brings_nothing_heavy() -> None:
    """CPU seconds of `import launcher` and of its command line, which bring neither torch nor any other back end."""
    program = (
        "import sys, time; start = time.process_time(); import launcher, launcher.__main__; "
        "print(time.process_time() - start, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert float(seconds) < 2
    assert not {"torch", "deepspeed", "megatron", "transformer_engine", "apex", "wandb", "transformers"} & set(loaded)
