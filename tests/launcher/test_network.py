"""Network namespaces as nodes: traffic crosses a shaped link, and nothing is left behind however the parent ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.network import LINK, NetworkError, missing, network, sent_bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def needed() -> Iterator[None]:
    """Skips aloud where namespaces cannot be made."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    yield


SEND = """
import socket, sys
from launcher.network import sent_bytes
before = sent_bytes("rail0")
with socket.create_connection((sys.argv[1], 5000)) as link:
    link.sendall(bytes(2_000_000))
    link.shutdown(socket.SHUT_WR)
    link.recv(1)
print(sent_bytes("rail0") - before)
"""
RECEIVE = """
import socket, time
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("ready", flush=True)
    link, _ = server.accept()
    started, size = time.perf_counter(), 0
    while data := link.recv(1 << 16):
        size += len(data)
    link.sendall(b"x")
    print(size / (time.perf_counter() - started), flush=True)
"""


@pytest.mark.slow
def test_a_link_has_its_rate_and_the_kernel_counts_it(needed: None) -> None:
    with network(2, megabits=40) as (first, second):
        receiving = subprocess.Popen(second.command([sys.executable, "-c", RECEIVE]), stdout=subprocess.PIPE, text=True)
        assert receiving.stdout is not None and receiving.stdout.readline() == "ready\n"
        command = first.command([sys.executable, "-c", SEND, second.address])
        counted = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        rate = float(receiving.communicate()[0])
    assert 2_000_000 < counted < 2_100_000
    assert rate < 40e6 / 8 * 1.25  # the bucket's first 256 KiB come at once
    assert rate > 40e6 / 8 * 0.3


HOLD = """
import signal, time
from launcher.network import network
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background has it ignored
with network(2, megabits=100) as nodes:
    print(*[node.pid for node in nodes], flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_however_the_parent_ends(needed: None, end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    holders = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(holders) == 2 and all(Path(f"/proc/{pid}").exists() for pid in holders)
    parent.send_signal(end)
    parent.wait(20)
    parent.stdout.close()
    until = time.monotonic() + 10
    alive = holders
    while alive and time.monotonic() < until:
        alive = [pid for pid in holders if Path(f"/proc/{pid}/ns/net").is_symlink() and _runs(pid)]
        time.sleep(0.05)
    assert not alive  # and with its last process the kernel takes a namespace, its links and its qdiscs


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_root_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match=r"^network namespaces need root$"), network(2, megabits=10):
        raise AssertionError("made a network without root")


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing() == ("network namespaces need ip, tc, nsenter, unshare, setpriv: install iproute2 and util-linux")


def test_an_unknown_interface_is_named() -> None:
    assert sent_bytes("lo") >= 0
    with pytest.raises(NetworkError, match=f"no interface {LINK}9"):
        sent_bytes(f"{LINK}9")
