"""The repository's own job scripts under a real Slurm: what they compute, and that they go on by themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.network import LINK, missing, network
from slurm.test_cluster.cluster import ROOT, Cluster
from tests.launcher.live import losses
from tests.slurm.conftest import STEPS, STEPS_4, Straight
from tests.slurm.jobs import NODES_1X2, NODES_2X1, NODES_2X2, NODES_4X1, Job, overrides, ranks_of, sbatch

pytestmark = pytest.mark.slow

PAIRS = "gpus_per_node: {value: 2, source: the test cluster}"


def test_submit_on_two_nodes_equals_local_processes(cluster: Cluster, straight_4: Straight, tmp_path: Path) -> None:
    hardware = (ROOT / "configs" / "cluster" / "h100.yaml").read_text().splitlines()
    lines = [PAIRS if line.startswith("gpus_per_node") else line for line in hardware]
    (tmp_path / "pairs.yaml").write_text("\n".join(lines))
    words = overrides(straight_4.prefix, tmp_path / "run", steps=STEPS_4, ranks=4)
    done = cluster.run(sys.executable, "-m", "launcher", "submit", *words, f"cluster={tmp_path}/pairs.yaml")
    number = int(done.stdout.partition("\njob ")[2].partition(":")[0])
    log = tmp_path / "run" / f"slurm-{number}.log"
    for path in (log, tmp_path / "run" / "events.jsonl", tmp_path / "run" / "train.sbatch"):
        assert str(path) in done.stdout
    job = Job(cluster, number, tmp_path / "run", log)
    assert job.end() == "COMPLETED", job.log
    assert job.facts["NumNodes"] == "2" and job.facts["NumTasks"] == "4"
    assert job.losses == straight_4.losses


def test_four_nodes_equal_local_processes(cluster: Cluster, straight_4: Straight, tmp_path: Path) -> None:
    words = overrides(straight_4.prefix, tmp_path, steps=STEPS_4, ranks=4)
    job = sbatch(cluster, "train", NODES_4X1, words, tmp_path)
    assert job.end() == "COMPLETED", job.log
    assert job.losses == straight_4.losses


def test_a_signal_saves_requeues_and_resumes(cluster: Cluster, straight: Straight, tmp_path: Path) -> None:
    """As Slurm sends it before the time limit, and here at a known step: nothing of the run is another."""
    words = overrides(straight.prefix, tmp_path, steps=STEPS)
    job = sbatch(cluster, "train", NODES_2X1, words, tmp_path)
    job.until_step(7)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.end() == "COMPLETED", job.log
    assert job.facts["Restarts"] == "1", job.log
    assert "by SIGUSR1; start again to go on" in job.log and "goes back into the queue" in job.log
    assert "resumed after step" in job.log
    assert job.losses == straight.losses


def test_before_the_time_limit_it_requeues_and_a_cancelled_job_stays_ended(
    cluster: Cluster, straight: Straight, tmp_path: Path
) -> None:
    options = [*NODES_2X1, "--time=1", "--signal=B:USR1@10"]
    job = sbatch(cluster, "train", options, overrides(straight.prefix, tmp_path, steps=10**6), tmp_path)
    job.until("resumed after the limit", lambda: "resumed after step" in job.log, 150)
    assert job.facts["Restarts"] == "1" and "by SIGUSR1" in job.log
    cluster.run("scancel", str(job.number))
    assert job.end() == "CANCELLED"
    seen = {step: loss for step, loss in job.losses.items() if step <= STEPS}
    assert len(seen) > 2 and seen == {step: straight.losses[step] for step in seen}


def test_a_preempted_job_saves_and_resumes_when_there_is_room(
    cluster: Cluster, straight: Straight, tmp_path: Path
) -> None:
    """By a partition of a higher tier that wants all nodes: Slurm's own signals, and its own choice of who goes."""
    job = sbatch(cluster, "train", NODES_2X1, overrides(straight.prefix, tmp_path, steps=STEPS), tmp_path)
    job.until_step(7)
    options = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    urgent = Job(cluster, int(cluster.run("sbatch", "--parsable", *options).stdout), tmp_path, tmp_path / "none")
    assert urgent.end() == "COMPLETED"
    assert job.end() == "COMPLETED", job.log
    assert job.facts["Restarts"] == "1", job.log
    assert "; start again to go on" in job.log and "resumed after step" in job.log
    assert job.losses == straight.losses


@pytest.mark.parametrize("which", [1, 0], ids=["second-node", "batch-host"])
def test_a_lost_node_is_replaced_unattended(cluster: Cluster, straight: Straight, tmp_path: Path, which: int) -> None:
    """The node is cut off and all on it killed: slurmd, step, ranks; on the first one the batch shell, srun and rank 0
    too. Nobody is told, nobody starts anything again.
    """
    words = overrides(straight.prefix, tmp_path, steps=STEPS)
    job = sbatch(cluster, "train", NODES_2X1, ["train.silent_rank_seconds=5", *words], tmp_path)
    job.until_step(7)
    lost = job.nodes[which]
    cluster.lose(lost)
    try:
        assert job.end(150) == "COMPLETED", job.log
    finally:
        cluster.mend(lost)
    assert job.facts["Restarts"] == "1" and "resumed after step" in job.log
    assert lost not in job.nodes
    assert job.losses == straight.losses


def test_a_job_whose_slurmd_died_runs_once(cluster: Cluster, straight: Straight, tmp_path: Path) -> None:
    """Its processes live on, with the network and the lock of the run, while Slurm starts the job again elsewhere: the
    first start must end by itself, and nothing that it does may show in the run.
    """
    words = overrides(straight.prefix, tmp_path, steps=10**6)
    job = sbatch(cluster, "train", NODES_1X2, words, tmp_path)
    job.until_step(7)
    (lost,) = job.nodes
    first = ranks_of(cluster, tmp_path)
    assert len(first) >= 2
    cluster.lose_daemon(lost)
    try:
        job.until("resumed elsewhere", lambda: "resumed after step" in job.log, 150)
        job.until("first start gone", lambda: not first & ranks_of(cluster, tmp_path), 60)
        assert "now belongs to" in (tmp_path / "faults.jsonl").read_text()
        resumed = max(job.losses)
        job.until_step(resumed + 5)
        assert job.facts["Restarts"] == "1" and job.nodes != [lost]
        cluster.run("scancel", str(job.number))
        assert job.end() == "CANCELLED"
    finally:
        cluster.mend(lost)
    steps = [json.loads(line).get("step") for line in (tmp_path / "events.jsonl").read_text().splitlines()[1:]]
    assert steps == list(range(1, len(steps) + 1))
    assert {step: loss for step, loss in job.losses.items() if step <= STEPS}.items() <= straight.losses.items()


def test_torchrun_on_two_nodes_saves_requeues_and_resumes(cluster: Cluster, straight: Straight, tmp_path: Path) -> None:
    words = overrides(straight.prefix, tmp_path, steps=STEPS)
    job = sbatch(cluster, "torchrun", NODES_2X1, words, tmp_path, EXPERTPIPE_PROCESSES_PER_NODE="1")
    job.until_step(7)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.end() == "COMPLETED", job.log
    assert job.facts["Restarts"] == "1" and "by SIGUSR1" in job.log and "resumed after step" in job.log
    assert "Traceback" not in job.log and "Exited with exit code 75" in job.log
    assert job.losses == straight.losses


def test_wrong_partition_and_gpu_count_are_one_line(cluster: Cluster, prefix: str, tmp_path: Path) -> None:
    words = overrides(prefix, tmp_path / "run", steps=1)
    there = (
        "there are main (4 nodes of 8 GPUs, no time limit), short (1 node of 8 GPUs, at most 5:00), "
        "urgent (4 nodes of 8 GPUs, no time limit)"
    )

    def submit(*more: str) -> list[str]:
        command = [sys.executable, "-m", "launcher", "submit", *words, "cluster=h100", *more]
        done = cluster.run(*command, check=False)
        assert done.returncode == 2
        return done.stderr.splitlines()

    assert submit("--partition", "nope") == [f"expertpipe: --partition nope: no such partition; {there}"]
    layout = ["parallel.data=40", "train.global_batch_size=80", "train.device=auto"]
    assert submit("--partition", "main", *layout) == [
        f"expertpipe: the run needs 5 nodes with 8 GPUs each, partition main does not have them; {there}"
    ]
    assert not (tmp_path / "run").exists()


def test_wrong_number_of_tasks_and_arrays_start_no_task(cluster: Cluster, prefix: str, tmp_path: Path) -> None:
    words = overrides(prefix, tmp_path, steps=1)
    job = sbatch(cluster, "train", [*NODES_2X1, "--nodes=3"], words, tmp_path)
    assert job.end() == "FAILED"
    assert "3 processes were started, parallel.pipeline=1 * parallel.data=2 needs 2: start 2" in job.log
    job = sbatch(cluster, "train", [*NODES_2X1, "--array=1"], words, tmp_path / "array")
    assert job.end() == "FAILED" and "job arrays are not for training" in job.log


def test_preflight_of_two_nodes(cluster: Cluster, prefix: str, tmp_path: Path) -> None:
    flags = "--slow 0.01 --mebibytes 1"
    words = overrides(prefix, tmp_path, steps=1, ranks=4)
    job = sbatch(cluster, "preflight", NODES_2X2, words, tmp_path, EXPERTPIPE_PREFLIGHT_FLAGS=flags)
    assert job.end() == "COMPLETED", job.log
    assert "pairs between nodes" in job.log and "BAD" not in job.log


def test_torchrun_over_two_networks(straight_4: Straight, tmp_path: Path) -> None:
    """Without Slurm: two namespaces with addresses of their own, an agent in each."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    words = overrides(straight_4.prefix, tmp_path, steps=STEPS_4, ranks=4)
    with network(2, megabits=1000) as nodes:
        agents = [
            subprocess.Popen(
                node.command([
                    "env", f"GLOO_SOCKET_IFNAME={LINK}", "OMP_NUM_THREADS=1", "TORCH_CPP_LOG_LEVEL=ERROR",
                    sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}",
                    "--nproc-per-node=2", "--rdzv-backend=static", f"--master-addr={nodes[0].address}",
                    "--master-port=29500", "-m", "launcher", "train", *words,
                ]),
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for number, node in enumerate(nodes)
        ]  # fmt: skip
        try:
            said = [agent.communicate(timeout=120)[0] for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
                agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert losses(tmp_path) == straight_4.losses
