"""Starts the ranks of one machine as processes, watches them, and says which one failed first and where.

The ranks get the variables that torchrun would set, so `launcher` need not know who started it. Rank 0 has the
terminal; the others write to run_dir/ranks/rank<k>.log. No rank outlives this process, however it ends.
"""

import contextlib
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.record.recorder import read, recorder_path
from launcher.safety.watchdog import report_path

USER_ERROR, REQUEUE, INTERRUPTED = 2, 75, 130  # exit codes of a rank that are handed on as they are
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HANG_SECONDS = 5.0  # from the watchdog's report: long enough for every rank to see it and dump its stacks
GRACE_SECONDS = 1.0  # from the first failure: long enough to see the others' exits, which may hold the true cause
TERMINATE_SECONDS = 3.0  # from SIGTERM to SIGKILL
REAP_SECONDS = 5.0  # from SIGKILL to giving up on a process that the kernel does not release
TAIL_LINES = 12

# Runs between fork and the rank's own program, in the child: asks the kernel to kill it when its parent dies (kept
# across exec), and leaves if the parent died before that. A program of its own instead of preexec_fn, which is unsafe
# once the parent has threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
if os.getppid() != parent:
    sys.exit("the launcher died before this rank began")
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"cannot start {command[0]}: {error}")
"""


@dataclass(frozen=True)
class Exit:
    """How one rank ended."""

    rank: int
    pid: int
    code: int  # as subprocess has it: minus the signal's number when killed by a signal


@dataclass
class _Group:
    """The processes of a run and the queue on which their ends, and signals to this process, arrive in order."""

    ranks_dir: Path
    events: "queue.SimpleQueue[Exit | int]"  # an int is a signal; SimpleQueue may be filled from a signal handler
    running: dict[int, subprocess.Popen] = field(default_factory=dict)
    log_starts: dict[int, int] = field(default_factory=dict)  # bytes already in a rank's log before this run
    exits: list[Exit] = field(default_factory=list)  # in the order in which they came
    last_actions: dict[int, str] = field(default_factory=dict)  # of the ranks that ended, as it was at that moment

    @property
    def run_dir(self) -> Path:
        return self.ranks_dir.parent

    def log_path(self, rank: int) -> Path:
        return self.ranks_dir / f"rank{rank}.log"

    def start(self, rank: int, command: Sequence[str], env: dict[str, str]) -> None:
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        with contextlib.ExitStack() as stack:
            output = None
            if rank > 0:
                output = stack.enter_context(open(self.log_path(rank), "ab"))
                self.log_starts[rank] = output.tell()
            # a session of its own: Ctrl-C reaches a rank once, from here, and helpers it started can be killed with it
            self.running[rank] = subprocess.Popen(
                command,
                env=env,
                start_new_session=True,
                stdin=None if rank == 0 else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def watch(self) -> None:
        """One waiting thread per rank: ends are seen in the order in which they happen, without polling."""
        for rank, process in self.running.items():
            threading.Thread(target=self._wait, args=(rank, process), daemon=True, name=f"rank{rank}").start()

    def _wait(self, rank: int, process: subprocess.Popen) -> None:
        # the zombie keeps its number until wait(): the kill can only hit what the rank left in its process group
        with contextlib.suppress(OSError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            os.killpg(process.pid, signal.SIGKILL)
        self.events.put(Exit(rank=rank, pid=process.pid, code=process.wait()))

    def next_event(self, deadline: float) -> Exit | int | None:
        """The next end or signal; None when `deadline` (time.monotonic) passes first."""
        try:
            timeout = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
            event = self.events.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Exit):
            self.running.pop(event.rank, None)
            self.exits.append(event)
            self.last_actions[event.rank] = _last_action(recorder_path(self.run_dir, event.rank))
        return event

    def send(self, signum: int) -> None:
        for process in list(self.running.values()):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signum)

    def stop(self) -> None:
        """End what still runs: SIGTERM, then SIGKILL."""
        for signum, seconds in ((signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, REAP_SECONDS)):
            self.send(signum)
            deadline = time.monotonic() + seconds
            while self.running and self.next_event(deadline) is not None:
                pass

    def abandon(self) -> None:
        """Kill what an error in this process would leave behind; nothing to do after an orderly end."""
        self.send(signal.SIGKILL)
        for process in list(self.running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REAP_SECONDS)


def run_local(
    argv: Sequence[str],
    *,
    world_size: int,
    run_dir: Path,
    threads: int,
    command: Sequence[str] | None = None,
    stop_seconds: float = 300.0,
) -> int:
    """Run `python -m launcher *argv` (or `command`) as ranks 0 .. world_size - 1 of this machine until all have ended.

    `threads` is the number of CPU threads each rank may use. SIGINT, SIGTERM and SIGUSR1 are handed to every rank,
    whose orderly end is awaited for `stop_seconds`; a second SIGINT stops them at once. When a rank fails the others
    are stopped within 10 seconds and one message on stderr names the first to fail and its last recorded action.
    Returns 0 when all ranks returned 0; 2, 75 or 130 when a rank chose that code; 128 + n when signal n, handed on,
    ended them; 1 for every other failure. Call it from the main thread, or signals are not handed on.
    """
    if world_size < 1 or threads < 1:
        raise ValueError(f"world_size={world_size} and threads={threads} must both be at least 1")
    ranks_dir = Path(run_dir) / "ranks"
    ranks_dir.mkdir(parents=True, exist_ok=True)
    for stale in ranks_dir.glob("rank*.last"):
        stale.unlink(missing_ok=True)  # an earlier run's last action must not be taken for this one's
    report_path(run_dir).unlink(missing_ok=True)
    group = _Group(ranks_dir=ranks_dir, events=queue.SimpleQueue())
    command = list(command) if command is not None else [sys.executable, "-m", "launcher", *argv]
    port = free_port()
    with _signals_to(group.events):
        try:
            for rank in range(world_size):
                group.start(rank, command, rank_environment(rank, world_size=world_size, port=port, threads=threads))
            group.watch()
            return _supervise(group, world_size, stop_seconds)
        finally:
            group.abandon()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def rank_environment(rank: int, *, world_size: int, port: int, threads: int) -> dict[str, str]:
    """The environment of a local rank: this process's, with torchrun's variables and the thread limits."""
    env = dict(os.environ)
    env.setdefault("PYTHONUNBUFFERED", "1")  # what a killed rank printed last is in its log
    env.setdefault("PYTHONFAULTHANDLER", "1")  # and so is where it was when a library crashed
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="PASSIVE",  # a waiting thread must not take the core from another rank
        EXPERTPIPE_LOCAL="1",
    )
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


@contextlib.contextmanager
def _signals_to(events: "queue.SimpleQueue[Exit | int]") -> Iterator[None]:
    """While inside, the forwarded signals to this process are put on the queue instead of acting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, lambda number, _: events.put(number)) for signum in FORWARDED}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _supervise(group: _Group, world_size: int, stop_seconds: float) -> int:
    """Wait for the ranks, stop them when one fails or a deadline passes, report, and return the exit code."""
    sent: list[int] = []
    deadline, impatient = math.inf, False
    while group.running:
        event = group.next_event(deadline)
        if event is None:
            break
        if isinstance(event, int):
            if event == signal.SIGINT and signal.SIGINT in sent:
                impatient = True
                break
            sent.append(event)
            group.send(event)
            deadline = min(deadline, time.monotonic() + stop_seconds)
        elif event.code == REQUEUE and report_path(group.run_dir).exists():
            deadline = min(deadline, time.monotonic() + HANG_SECONDS)
        elif event.code in (REQUEUE, INTERRUPTED):  # orderly; the others are about to do the same
            deadline = min(deadline, time.monotonic() + stop_seconds)
        elif event.code != 0:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    seen, late = tuple(group.exits), len(group.running)
    group.stop()
    if impatient:
        return _say("interrupted twice: the ranks were stopped.", INTERRUPTED)
    if report_path(group.run_dir).exists():
        report = report_path(group.run_dir).read_text().strip()
        return _say(f"{report}. The ranks were stopped; start again to go on.", REQUEUE)
    by_request = [-event.code for event in seen if -event.code in sent]
    if by_request:
        return _say(f"stopped by {_signal_name(by_request[0])}.", 128 + by_request[0])
    failures = [event for event in seen if event.code not in (0, REQUEUE, INTERRUPTED)]
    if failures:
        cause = first_cause(failures)
        if cause.code == USER_ERROR and any(event.rank == 0 and event.code == USER_ERROR for event in failures):
            return USER_ERROR  # rank 0 has said so on the terminal
        _say(_failure_message(group, cause, world_size), 1)
        return USER_ERROR if cause.code == USER_ERROR else 1
    if late:
        return _say(
            f"{late} of {world_size} ranks had not ended {stop_seconds:g} s after the stop; they were killed.", 1
        )
    codes = {event.code for event in seen}
    return next((code for code in (REQUEUE, INTERRUPTED) if code in codes), 0)


def first_cause(failures: Sequence[Exit]) -> Exit:
    """Of failures close together, in the order in which they were seen: the one that brought about the others.

    A rank that was killed loses its connections at once and its peers then fail with communication errors, so a death
    by signal outranks an exit. SIGABRT does not: communication libraries abort when a peer is gone.
    """
    killed = [event for event in failures if event.code < 0 and event.code != -signal.SIGABRT]
    return (killed or list(failures))[0]


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _last_action(path: Path) -> str:
    entry = read(path)
    if entry is None:
        return " before its first recorded action"
    return f" in step {entry.step}, last action: {entry.action} ({entry.seconds_since:.1f} s ago)"


def _failure_message(group: _Group, cause: Exit, world_size: int) -> str:
    if cause.code < 0:
        what = f"was killed by signal {-cause.code} ({_signal_name(-cause.code)})"
    else:
        what = f"ended with exit code {cause.code}"
    others = {1: "", 2: " The other rank was stopped."}.get(
        world_size, f" The other {world_size - 1} ranks were stopped."
    )
    lines = [f"rank {cause.rank} (pid {cause.pid}) {what}{group.last_actions[cause.rank]}.{others}"]
    if cause.code == -signal.SIGKILL:
        lines.append(
            "SIGKILL comes from outside the program: most often from the kernel when memory runs out (see dmesg)."
        )
    tail = _log_tail(group, cause.rank)
    if cause.rank == 0:
        lines.append("What rank 0 wrote is above.")
    elif tail:
        lines += [f"The end of {group.log_path(cause.rank)}:", *(f"  {line}" for line in tail)]
    return "\n".join(lines)


def _log_tail(group: _Group, rank: int) -> list[str]:
    """The last lines that a rank wrote in this run."""
    try:
        with open(group.log_path(rank), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(group.log_starts.get(rank, 0), size - 16384))
            return file.read().decode("utf-8", "replace").rstrip().splitlines()[-TAIL_LINES:]
    except OSError:
        return []


def _say(message: str, code: int) -> int:
    """Print on stderr, below whatever rank 0's progress bar left there, and return `code`."""
    if sys.stderr.isatty():
        message = "\x1b[?25h\n" + message  # a rank killed while drawing leaves the cursor hidden
    print(message, file=sys.stderr, flush=True)
    return code
