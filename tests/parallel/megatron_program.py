"""Run by test_megatron_groups.py in an environment with megatron-core: `python -m ... SIZES` prints its groups as JSON.

SIZES: JSON list of [pipeline, data, expert]. Every rank of every size is played in turn by this one process, on torch's
fake process group, through `initialize_model_parallel` with its own default order.
"""

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # type: ignore[import-not-found]  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402


def groups(rank: int, pipeline: int, data: int, expert: int) -> dict[str, Any]:
    """Ranks of each of one rank's groups."""
    dist.init_process_group("fake", rank=rank, world_size=pipeline * data, store=FakeStore())
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=pipeline, expert_model_parallel_size=expert, create_gloo_process_groups=False
    )
    found = {
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert_data": parallel_state.get_expert_data_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
    }
    ranks = {
        name: dist.get_process_group_ranks(group)
        for name, group in found.items()
        if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER
    }
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return ranks


if __name__ == "__main__":
    print(json.dumps([[groups(rank, *size) for rank in range(size[0] * size[1])] for size in json.loads(sys.argv[1])]))
