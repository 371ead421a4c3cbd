"""Who is missing when an all-to-all fails: the ranks that still live sign in, those that do not are named.

A collective fails on every member of its group, by the loss of a connection or by the timeout, but says nothing of who
caused it. So a rank whose transfer failed writes its name to the group's store and looks who else of the group waited
for has. Nothing is written while all is well.
"""

import threading
import time
from collections.abc import Iterable

import torch.distributed as dist

POLL_SECONDS = 0.05
STORE_HOST = "so rank 0, which keeps it, may be the one"


class ExpertError(RuntimeError):
    """An all-to-all that cannot be done, or a peer that did not do its part; one line that names rank and cause."""

    user_error = True


class RollCall:
    """The ranks of one expert group, asked after a failure. grace_seconds: how long an answer may take."""

    def __init__(self, group: dist.ProcessGroup, *, grace_seconds: float) -> None:
        self._store, self._rank, self._grace = group.get_group_store(), dist.get_rank(), grace_seconds

    def failure(self, what: str, ranks: Iterable[int], cause: BaseException) -> ExpertError:
        """The error to raise: which transfer, which ranks were waited for, which of them gave no sign of life."""
        others = [rank for rank in ranks if rank != self._rank]
        reason = str(cause).splitlines()[0]
        found: list[str] = []
        # A store whose host has stopped may never answer: it is asked from a thread that can be left behind.
        asking = threading.Thread(target=self._ask, args=(others, found), daemon=True)
        asking.start()
        asking.join(3 * self._grace + 1)
        who = found[0] if found else f"the group's store does not answer, {STORE_HOST}"
        line = f"rank {self._rank}: {what}: {who}; waited for ranks {others} ({reason})"
        if found:
            self._sign("verdict", line)
        return ExpertError(line)

    def _ask(self, others: list[int], found: list[str]) -> None:
        try:
            self._sign("here", "1")
            missing = self._wait("here", others, self._grace)
            if missing:
                verb = "gives" if len(missing) == 1 else "give"
                names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
                found.append(f"{names} {verb} no sign of life")
                return
            silent = self._wait("verdict", others, 2 * self._grace, any_one=True)
            told = [rank for rank in others if rank not in silent]
            words = [self._store.get(f"verdict/{rank}").decode() for rank in told]
            found.append(f"it failed elsewhere first: {words[0]}" if words else "all ranks waited for are alive")
        except RuntimeError as error:
            found.append(f"the group's store is gone ({str(error).splitlines()[0]}), {STORE_HOST}")

    def _wait(self, kind: str, ranks: list[int], seconds: float, *, any_one: bool = False) -> list[int]:
        """Those of the ranks that have not written `kind` when all have (or one has), or the time is over."""
        end = time.monotonic() + seconds
        while True:
            missing = [rank for rank in ranks if not self._store.check([f"{kind}/{rank}"])]
            enough = not missing or (any_one and len(missing) < len(ranks))
            if enough or time.monotonic() > end:
                return missing
            time.sleep(POLL_SECONDS)

    def _sign(self, kind: str, text: str) -> None:
        try:
            self._store.set(f"{kind}/{self._rank}", text)
        except RuntimeError:
            return  # the store is gone: `failure` has said so, or will
