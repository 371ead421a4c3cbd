"""Environments with packages that the tests' own does not have: one for each set, a layer over the one that tests.

They are kept in the user's cache folder, named by what is in them, so that a machine installs each set once.
`python -m tests.extras grain==0.2.18` prints the interpreter of such a one.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def environment_with(*requirements: str) -> Path:
    """The interpreter of an environment with these packages over this one's; skips the test where it cannot be made."""
    constraints = ROOT / "constraints.txt"
    below = [part for part in sys.path if part.endswith("site-packages")]
    named = "\n".join([*requirements, sys.version, *below, constraints.read_text()])
    cache = Path.home() / ".cache" / "expertpipe" / "environments"
    root = cache / hashlib.sha256(named.encode()).hexdigest()[:16]
    python, done = root / "bin" / "python", root / "done"
    cache.mkdir(parents=True, exist_ok=True)
    with open(root.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with its process
        if not done.exists():
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
            (library,) = root.glob("lib/python*/site-packages")
            (library / "below.pth").write_text("\n".join(below) + "\n")
            command = [str(python), "-m", "pip", "install", "--quiet", "--no-build-isolation", "-c", str(constraints)]
            environment = os.environ | {"DS_BUILD_OPS": "0"}  # deepspeed's operations are compiled where they are used
            found = subprocess.run([*command, *requirements], env=environment, capture_output=True, text=True)
            if found.returncode:
                said = (found.stderr.strip().splitlines() or ["no message"])[-1]
                pytest.skip(f"{', '.join(requirements)} cannot be installed here: {said}")
            done.touch()
    return python


def run_there(python: Path, *arguments: str, timeout: float = 600) -> str:
    """Standard output of `python -m ...` from the repository's root, ninja on PATH; fails with what it said."""
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [str(python), "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert found.returncode == 0, f"{arguments}:\n{found.stdout[-4000:]}\n{found.stderr[-4000:]}"
    return found.stdout


if __name__ == "__main__":
    print(environment_with(*sys.argv[1:]))
