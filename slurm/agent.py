"""torchrun, with the words and the exit code of the ranks instead of its own.

torchrun answers every rank that ends with another code than 0 with a traceback of itself and exit code 1, the orderly
end with 75 ("start me again") included. Arguments are torchrun's.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(words: list[str]) -> int:
    """Run torchrun; the exit code of the rank that ended first, 128 and its number for a signal, as shells have it."""
    try:
        main(words)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()  # torchrun has logged which rank and code
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # to this process
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
