"""One thread for every test: ranks share the machine's cores, and waiting OpenMP threads would spin."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
