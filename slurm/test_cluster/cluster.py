"""A real Slurm of several nodes on one machine, for tests: slurmctld, munge and a slurmd a node.

Everything lives in a process namespace of its own: when its first process ends, however it ends, the kernel kills all
that Slurm and its jobs have started. Each node has a host name, an address and a link of its own (launcher/network.py),
so that ranks cross a network and a node can be lost as nodes are: silently. Names are in a private /etc/hosts. Needs
root, slurm-wlm and munge, and what launcher/network.py needs. GPUs are counted, not real: device files of /dev/null.

    cluster.py start FOLDER [--nodes 4]     cluster.py run FOLDER -- sinfo -N     cluster.py lose FOLDER n2
    cluster.py stop FOLDER                                                        cluster.py mend FOLDER n2
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launcher import network  # noqa: E402 (a script beside the package)

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "unshare", "nsenter", "hostname", "mount")
MEGABITS = 2000.0  # of a node's link
START_SECONDS = 60.0

# cred_expire: how long a requeued job is held; SlurmdTimeout: after which a silent node counts as lost. Both are made
# short here (120 s and 300 s are the defaults), nothing else differs from a cluster in how a job is treated.
CONFIG = """ClusterName=test
SlurmctldHost=head(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=20
SlurmdTimeout=6
KillWait=5
MessageTimeout=5
MinJobAge=3600
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
"""


def missing() -> str | None:
    """Why no cluster can be started here, if so."""
    if os.geteuid() != 0:
        return "a Slurm test cluster needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"a Slurm test cluster needs {', '.join(absent)}: apt install slurm-wlm munge"
    return network.missing()


class ClusterError(RuntimeError):
    """The cluster does not come up, or a command in it fails; with what it said."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster. init: process number of the namespace's first process, seen from outside.

    outer: the process that holds it, where this one has started it.
    """

    folder: Path
    init: int
    outer: subprocess.Popen[bytes] | None = None

    @property
    def links(self) -> dict[str, int]:
        """Process that holds each node's network, seen from inside, by the node's name; the switch is one too."""
        return json.loads((self.folder / "state.json").read_text())

    def command(self, command: Sequence[str], *, node: str = "head", cwd: Path = ROOT) -> list[str]:
        """A command that runs on a node, in the folder `cwd`: entering a mount namespace forgets where one was."""
        inside = ["nsenter", "-t", str(self.init), "-m", "-p", "--", "nsenter", "-t", str(self.links[node]), "-n", "--"]
        return [*inside, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *command]

    def run(
        self, *command: str, node: str = "head", check: bool = True, seconds: float = 60, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with its output. ClusterError when it fails and `check` is on."""
        done = subprocess.run(
            self.command(command, node=node, cwd=cwd), capture_output=True, text=True, timeout=seconds, env=self.env
        )
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands find this cluster, without an outer job's variables."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return ours | {
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": network.LINK,
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch looks up names of addresses, which these networks cannot answer
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def lose(self, name: str) -> None:
        """Cut a node off and kill all that runs on it: nobody is told."""
        self.run(*f"ip link set {_port(name)} down".split(), node="switch")
        self.run(sys.executable, __file__, "kill", str(self.folder), name, node="head")

    def lose_daemon(self, name: str) -> None:
        """Kill a node's slurmd and nothing else: its job's processes live on, and the network too."""
        self.run("sh", "-c", f"kill -9 $(cat {self.folder}/run/slurmd.{name}.pid)")

    def mend(self, name: str) -> None:
        """Bring a lost node back, or its slurmd."""
        self.run(*f"ip link set {_port(name)} up".split(), node="switch")
        command = shlex.join(["setsid", *_slurmd(self.folder, name)])
        self.run("sh", "-c", f"{command} </dev/null >/dev/null 2>&1 &", node=name)

    def stop(self) -> None:
        """End everything and remove the folder."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)  # the kernel kills the rest of its namespace before it is gone
        deadline = time.monotonic() + 20
        while _runs(self.init):
            if time.monotonic() > deadline:
                raise ClusterError(f"process {self.init} does not end")
            time.sleep(0.05)
        if self.outer is not None:
            self.outer.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


def start(folder: Path, *, num_nodes: int = 4, gpus: int = 8, stay: bool = False) -> Cluster:
    """Start a cluster whose files are in `folder` and wait until its nodes are idle.

    stay: it outlives this process. gpus: of each node. Raises ClusterError with the end of the logs.
    """
    reason = missing()
    if reason is not None:
        raise ClusterError(reason)
    folder.mkdir(parents=True, exist_ok=True)
    command = [*(() if stay else network.WITH_PARENT), "unshare", "-m", "-p", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, __file__, "serve", str(folder), "--nodes", str(num_nodes), "--gpus", str(gpus)]
    with open(folder / "serve.log", "wb") as log:
        outer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=stay)
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "ready").exists():
        if outer.poll() is not None or time.monotonic() > deadline:
            outer.kill()
            outer.wait()
            tails = [f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.rglob("*.log"))]
            raise ClusterError("\n".join(["the test cluster does not start", *tails]))
        time.sleep(0.1)
    init = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
    (folder / "init.pid").write_text(str(init))
    return Cluster(folder, init, outer)


@contextlib.contextmanager
def running(folder: Path, *, num_nodes: int = 4) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts."""
    cluster = start(folder, num_nodes=num_nodes)
    try:
        yield cluster
    finally:
        cluster.stop()


# --- inside the namespace ----------------------------------------------------------------------------------------


def serve(folder: Path, num_nodes: int, gpus: int) -> None:
    """The first process of the namespace: starts everything, says so, and buries the dead until it is killed."""
    names = ["head", *(f"n{number + 1}" for number in range(num_nodes))]
    _write_files(folder, names, gpus)
    subprocess.run(["mount", "--bind", str(folder / "etc" / "hosts"), "/etc/hosts"], check=True)
    with network.network(len(names), megabits=MEGABITS) as nodes:
        links = {name: node.pid for name, node in zip(names, nodes, strict=True)}
        links["switch"] = _switch(set(links.values()))
        (folder / "state.json").write_text(json.dumps(links))
        env = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        _spawn(nodes[0], _munged(folder), env)
        _wait_for(lambda: (folder / "munge" / "socket").exists(), "munge")
        _spawn(nodes[0], ["unshare", "-u", "sh", "-c", "hostname head && exec slurmctld -D"], env)
        for name, node in zip(names[1:], nodes[1:], strict=True):
            _spawn(node, _slurmd(folder, name), env)
        sinfo = nodes[0].command(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"])

        def idle() -> bool:
            done = subprocess.run(sinfo, env=env, capture_output=True, text=True)
            return len(set(done.stdout.split())) == num_nodes

        _wait_for(idle, "nodes")
        (folder / "ready").touch()
        while True:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)


def _spawn(node: network.Node, command: list[str], env: dict[str, str]) -> None:
    subprocess.Popen(node.command(command), env=env, stdin=subprocess.DEVNULL)


def _slurmd(folder: Path, name: str) -> list[str]:
    return ["unshare", "-u", "sh", "-c", f"hostname {name} && exec slurmd -D -N {name} -f {folder}/etc/slurm.conf"]


def _munged(folder: Path) -> list[str]:
    at = folder / "munge"
    return [
        "munged", "--foreground", "--force", f"--socket={at}/socket", f"--key-file={at}/key",
        f"--pid-file={at}/pid", f"--log-file={folder}/log/munged.log", f"--seed-file={at}/seed",
    ]  # fmt: skip


def _write_files(folder: Path, names: Sequence[str], gpus: int) -> None:
    for name in ("etc", "log", "run", "state", "munge", "dev", *(f"spool/{name}" for name in names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))  # made anew for each cluster, gone with it
    hosts = ["127.0.0.1 localhost", *(f"10.99.0.{number + 1} {name}" for number, name in enumerate(names))]
    (folder / "etc" / "hosts").write_text("\n".join(hosts) + "\n")
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr=10.99.0.{number} CPUs=8 RealMemory=5000 Gres=gpu:{gpus}"
        for number, name in enumerate(names[1:], start=2)
    ]
    last = len(names) - 1
    partitions = [
        f"PartitionName=main Nodes=n[1-{last}] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP",
        "PartitionName=short Nodes=n1 MaxTime=5 PriorityTier=1 State=UP",
        f"PartitionName=urgent Nodes=n[1-{last}] MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP",
    ]
    (folder / "etc" / "slurm.conf").write_text(CONFIG.format(folder=folder) + "\n".join([*nodes, *partitions]) + "\n")
    (folder / "etc" / "cgroup.conf").write_text("CgroupAutomount=no\n")
    for gpu in range(gpus):
        os.mknod(folder / "dev" / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
    devices = f"{folder}/dev/gpu[0-{gpus - 1}]" if gpus > 1 else f"{folder}/dev/gpu0"
    (folder / "etc" / "gres.conf").write_text(f"NodeName=n[1-{last}] Name=gpu File={devices}\n")


def _switch(others: set[int]) -> int:
    """The process that holds the switch: it stands in a network of its own, and none of the nodes is it."""
    own = os.readlink("/proc/self/ns/net")
    known = {os.readlink(f"/proc/{pid}/ns/net") for pid in others} | {own}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if os.readlink(f"/proc/{pid}/ns/net") not in known:
            return int(pid)
    raise ClusterError("there is no switch")


def _port(name: str) -> str:
    return f"port{int(name.removeprefix('n'))}"


def kill_all_on(folder: Path, name: str) -> None:
    """Kill what runs in a node's network, but the process that holds it."""
    holder = json.loads((folder / "state.json").read_text())[name]
    where = os.readlink(f"/proc/{holder}/ns/net")
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(pid) != holder and os.readlink(f"/proc/{pid}/ns/net") == where:
                os.kill(int(pid), signal.SIGKILL)


def _wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not there after {START_SECONDS:g} s")
        time.sleep(0.2)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> int:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="cluster.py", description="A Slurm cluster on one machine, for tests.")
    parser.add_argument("what", choices=("start", "stop", "run", "lose", "lose_daemon", "mend", "serve", "kill"))
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("words", nargs="*", help="a command, or a node")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    args = parser.parse_args()
    if args.what == "serve":
        serve(args.folder, args.nodes, args.gpus)
    if args.what == "kill":
        kill_all_on(args.folder, args.words[0])
        return 0
    try:
        if args.what == "start":
            started = start(args.folder, num_nodes=args.nodes, gpus=args.gpus, stay=True)
            if started.outer is not None:
                started.outer.returncode = 0  # left behind on purpose
            print(f"{args.nodes} nodes of {args.gpus} GPUs; cluster.py run {args.folder} -- sinfo -N")
            return 0
        cluster = Cluster(args.folder, int((args.folder / "init.pid").read_text()))
        if args.what == "run":
            return subprocess.run(cluster.command(args.words, cwd=Path.cwd()), env=cluster.env).returncode
        cluster.stop() if args.what == "stop" else getattr(cluster, args.what)(args.words[0])
    except (ClusterError, OSError) as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
