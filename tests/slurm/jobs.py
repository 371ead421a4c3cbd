"""A small run as a job of the test cluster, and what is asked of it."""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.corpus import Document
from data.prepare import prepare
from slurm.test_cluster.cluster import Cluster
from tests.launcher.live import losses

MODEL = "vocab_size=320 hidden_size=32 num_hidden_layers=4 max_position_embeddings=32"
TRAIN = (
    "global_batch_size=8 micro_batch_size=1 precision=fp32 device=cpu threads=1 checkpoint_every=5 timeout_seconds=60"
)
RUN = [
    "experiment=tiny",
    *(f"model.{word}" for word in MODEL.split()),
    *(f"train.{word}" for word in TRAIN.split()),
    "data.sequence_length=32",
    "parallel.schedule=1f1b",
]
# Runs of four ranks, which is 2 pipeline ranks x 2 data ranks that share the experts, and of the latter two alone.
RANKS = {4: "parallel.pipeline=2", 2: "parallel.pipeline=1"}
NODES_4X1 = ["--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2"]
NODES_2X2 = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
NODES_1X2 = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
NODES_2X1 = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2"]


def prepared(folder: Path) -> str:
    """Prefix of a small prepared training set of at most 300 tokens."""
    draw = random.Random(0)
    words = ["the", "router", "picks", "an", "expert", "returns", "x_TD", "1024", "=", "):"]
    documents = [Document("made up", f"{i}", " ".join(draw.choices(words, k=draw.randint(30, 60)))) for i in range(99)]
    return prepare(corpus=documents, out_dir=folder, vocab_size=300, heldout_fraction=0.2).train_prefix


def overrides(prefix: str, run_dir: Path, *, steps: int, ranks: int = 2) -> list[str]:
    """The words of a run on 2 or 4 ranks."""
    return [*RUN, RANKS[ranks], f"data.prefix={prefix}", f"run_dir={run_dir}", f"train.steps={steps}"]


@dataclass(frozen=True)
class Job:
    """One job of the cluster."""

    cluster: Cluster
    number: int
    run_dir: Path
    log_path: Path

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm knows of it."""
        shown = self.cluster.run("scontrol", "show", "job", str(self.number)).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    @property
    def log(self) -> str:
        """What it has printed."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def nodes(self) -> list[str]:
        """Where it runs, the node of its batch shell first."""
        return self.cluster.run("scontrol", "show", "hostnames", self.facts["NodeList"]).stdout.split()

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step."""
        return losses(self.run_dir)

    def until(self, what: str, condition: Callable[[], bool], seconds: float = 90) -> None:
        """Wait for something; AssertionError with the log when it does not happen."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not in {seconds:g} s\n{self.facts}\n{self.log[-3000:]}")
            time.sleep(0.3)

    def until_step(self, step: int) -> None:
        """Wait until a step is in the event log."""
        events = self.run_dir / "events.jsonl"
        self.until(f"step {step}", lambda: events.exists() and f'"step":{step},' in events.read_text().replace(" ", ""))

    def end(self, seconds: float = 120) -> str:
        """Wait for the end of the job; its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.until("end of the job", lambda: self.facts["JobState"] in ended, seconds)
        return self.facts["JobState"]


def sbatch(cluster: Cluster, script: str, options: list[str], words: list[str], run_dir: Path, **env: str) -> Job:
    """Submit one of the repository's scripts."""
    run_dir.mkdir(parents=True, exist_ok=True)
    exports = ",".join(["ALL", *(f"{name}={value}" for name, value in env.items())])
    command = ["sbatch", "--parsable", *options, f"--export={exports}", f"--output={run_dir}/slurm-%j.log"]
    number = int(cluster.run(*command, f"slurm/{script}.sbatch", *words).stdout)
    return Job(cluster, number, run_dir, run_dir / f"slurm-{number}.log")


def ranks_of(cluster: Cluster, run_dir: Path) -> set[str]:
    """Numbers of the processes of a run, on all nodes."""
    return set(cluster.run("pgrep", "-f", f"launcher train.*run_dir={run_dir}", check=False).stdout.split())
