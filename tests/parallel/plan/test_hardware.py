import re

import pytest
import yaml

from parallel.plan.hardware import HardwareError, check_cluster, check_precision, of_tree, read
from tests.parallel.plan.jobs import CLUSTERS, h800


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_number_of_every_cluster_has_a_source(path):
    found = read(path)
    assert all(len(source) > 5 for source in found.sources.values()) and len(found.sources) == 11


def test_every_mistake_of_a_file_is_told_at_once():
    tree = yaml.safe_load((CLUSTERS / "h800.yaml").read_text())
    tree["bf16_flops"] = 1e15
    tree["num_sms"]["value"] = 1.5
    tree["memory_bytes"]["value"] = -1
    tree["colour"] = "green"
    with pytest.raises(HardwareError) as caught:
        of_tree(tree, where="mine.yaml")
    for word in ("mine.yaml", "bf16_flops", "num_sms=1.5", "memory_bytes=-1", "colour"):
        assert word in str(caught.value)


def test_a_file_may_leave_fp32_out():
    """As those written before it was asked for; runs in FP32 are then refused."""
    tree = yaml.safe_load((CLUSTERS / "h800.yaml").read_text())
    assert of_tree(tree, where="mine.yaml").fp32_flops == 67e12
    del tree["fp32_flops"]
    found = of_tree(tree, where="mine.yaml")
    check_precision(found, "bf16")
    with pytest.raises(HardwareError, match="H800 has no fp32_flops"):
        check_precision(found, "fp32")
    tree["fp32_flops"] = {"value": 0, "source": "test"}
    with pytest.raises(HardwareError, match="fp32_flops=0: use a number above 0"):
        of_tree(tree, where="mine.yaml")


def test_whole_nodes_or_inside_one():
    for fine in (1, 2, 8, 16, 2048):
        check_cluster(h800(), fine)
    with pytest.raises(HardwareError, match=re.escape("2047 GPUs are not whole nodes of 8 H800: use 2040 or 2048")):
        check_cluster(h800(), 2047)
