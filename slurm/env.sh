# Environment of every task; sourced by the job scripts. Each line with its reason.

# the environment made by `make setup`, if the cluster image has none of its own
[ -f .venv/bin/activate ] && source .venv/bin/activate

# one intra-op thread a rank unless the job says otherwise: the data path is light, and 8 ranks share a node
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# a rank that has lost its peer must end, not hang: NCCL errors are raised in the process
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# names the collective that hung when the watchdog fires
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
