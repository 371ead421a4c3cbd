import re

import pytest
import yaml

from parallel.plan.hardware import HardwareError, check_cluster, of_tree, read
from tests.parallel.plan.jobs import CLUSTERS, h800


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_number_of_every_cluster_has_a_source(path):
    found = read(path)
    assert all(len(source) > 5 for source in found.sources.values()) and len(found.sources) == 10


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


def test_whole_nodes_or_inside_one():
    for fine in (1, 2, 8, 16, 2048):
        check_cluster(h800(), fine)
    with pytest.raises(HardwareError, match=re.escape("2047 GPUs are not whole nodes of 8 H800: use 2040 or 2048")):
        check_cluster(h800(), 2047)
