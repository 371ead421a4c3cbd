"""The released FP8 kernels, run from their own source (`run_published.py`)."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PUBLISHED = "https://raw.githubusercontent.com/deepseek-ai/DeepSeek-V3/9b4e9788e4a3a731f7567338ed15d3ec549ce03b/"


def run_published(folder: Path, **arrays: np.ndarray) -> Any:
    """What they make of these arrays, by name; see `run_published.py`.

    EXPERTPIPE_DEEPSEEK_V3: a checkout of deepseek-ai/DeepSeek-V3; fetched from GitHub where it is not set, and skipped
    where that is out of reach.
    """
    source, checkout = folder / "kernel.py", os.environ.get("EXPERTPIPE_DEEPSEEK_V3")
    if checkout:
        source = Path(checkout) / "inference" / "kernel.py"
    else:
        try:
            with urllib.request.urlopen(PUBLISHED + "inference/kernel.py", timeout=20) as response:
                source.write_bytes(response.read())
        except (urllib.error.URLError, TimeoutError) as error:
            pytest.skip(f"GitHub is out of reach ({error}) and EXPERTPIPE_DEEPSEEK_V3 is not set")
    np.savez(folder / "in.npz", **arrays)  # type: ignore[arg-type]
    script = Path(__file__).parent / "run_published.py"
    paths = [str(path) for path in (source, folder / "in.npz", folder / "out.npz")]
    subprocess.run([sys.executable, str(script), *paths], check=True)
    return np.load(folder / "out.npz")
