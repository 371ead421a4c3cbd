"""Nodes on one machine: network namespaces joined by a switch, their links shaped, for ranks that must cross a network.

Each node is a namespace with a loopback, over which its own ranks talk, and one link `rail0` to the switch (a bridge in
a namespace of its own), held to a rate in both directions by a token bucket. No name is left anywhere: a namespace
lives as long as the process that holds it, and the kernel kills that one when this process ends, however it ends.
Needs root, and ip, tc, nsenter, unshare and setpriv (Debian: iproute2, util-linux).
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

LINK = "rail0"
TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv")
# The kernel kills what runs behind this when the process that started it ends.
WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
BURST_BYTES = 256 * 1024  # more than the largest packet that TCP hands to a link (64 KiB)
QUEUE_MS = 400


class NetworkError(RuntimeError):
    """The namespaces cannot be made; the message says what is missing."""

    user_error = True


@dataclass(frozen=True)
class Node:
    """One namespace. pid: of the process that holds it; address: of its link."""

    pid: int
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """A command that runs in this node and ends with the process that starts it."""
        return [*WITH_PARENT, "nsenter", "-t", str(self.pid), "-n", "--", *command]


def missing() -> str | None:
    """Why no network can be made here, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"network namespaces need {', '.join(absent)}: install iproute2 and util-linux" if absent else None


def sent_bytes(interface: str) -> int:
    """Bytes that an interface of this process's namespace has sent, by the kernel's own counter."""
    with open("/proc/self/net/dev", encoding="ascii") as lines:
        for line in lines:
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return int(counters.split()[8])
    raise NetworkError(f"there is no interface {interface} here")


@contextmanager
def network(num_nodes: int, *, megabits: float) -> Iterator[list[Node]]:
    """num_nodes namespaces, each with a link of so many megabits a second each way. Raises NetworkError."""
    reason = missing()
    if reason is not None:
        raise NetworkError(reason)
    with ExitStack() as stack:
        switch = stack.enter_context(_namespace())
        _run(switch, "ip link add bridge0 type bridge")
        _run(switch, "ip link set bridge0 up")
        nodes = []
        for number in range(num_nodes):
            node = Node(stack.enter_context(_namespace()).pid, f"10.99.0.{number + 1}")
            nodes.append(node)
            port = f"port{number}"
            _run(switch, f"ip link add {port} type veth peer name {LINK} netns {node.pid}")
            _run(switch, f"ip link set {port} master bridge0 up")
            _run(node, "ip link set lo up")
            _run(node, f"ip address add {node.address}/24 dev {LINK}")
            _run(node, f"ip link set {LINK} up")
            for where, interface in ((node, LINK), (switch, port)):
                rate = f"rate {megabits:g}mbit burst {BURST_BYTES} latency {QUEUE_MS}ms"
                _run(where, f"tc qdisc add dev {interface} root tbf {rate}")
        yield nodes


@contextmanager
def _namespace() -> Iterator[Node]:
    holder = subprocess.Popen([*WITH_PARENT, "unshare", "-n", "sleep", "infinity"])
    try:
        end = time.monotonic() + 10
        while _namespace_of(holder.pid) in ("", _namespace_of(os.getpid())):
            if holder.poll() is not None or time.monotonic() > end:
                raise NetworkError("this machine lets no process make a network namespace (unshare -n)")
            time.sleep(0.01)
        yield Node(holder.pid, "")
    finally:
        holder.kill()
        holder.wait()


def _namespace_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def _run(node: Node, command: str) -> None:
    result = subprocess.run(node.command(command.split()), capture_output=True, text=True)
    if result.returncode != 0:
        raise NetworkError(f"{command}: {result.stderr.strip() or result.returncode}")
