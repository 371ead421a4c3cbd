"""Run by test_fused.py in an environment with DeepSpeed: how far its CPU Adam is from the plain twin, as JSON."""

import json
import sys

import torch

from optim.adamw import AdamW
from optim.fused import DeepSpeedCPUAdamW
from tests.optim.test_fused import changes, worst

if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {m: worst(changes(AdamW, m), changes(DeepSpeedCPUAdamW, m)) for m in ("fp32", "bf16")}
    assert "deepspeed" not in sys.modules, "a rank needs the library alone"
    print(json.dumps(found))
