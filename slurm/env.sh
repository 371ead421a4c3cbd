# Environment of every task; sourced by the job scripts. Each line with its reason and source. What is set already is
# kept, so a site's own settings win. None of the settings for NCCL has been measured by us on GPUs.
#
# Sources: [nccl] NVIDIA's NCCL user guide, Environment Variables; [nccl.h] src/include/nccl_device/core.h of NCCL 2.30;
# [torch] torch's ProcessGroupNCCL environment variables; [insights] arXiv 2505.09343, section 5; [report] arXiv 2412.19437.

# the environment made by `make setup`, if the cluster image has none of its own
[ -f "${EXPERTPIPE_SLURM:-slurm}/../.venv/bin/activate" ] && source "${EXPERTPIPE_SLURM:-slurm}/../.venv/bin/activate"

# --- processes ---
# one intra-op thread a rank unless the job says otherwise: the data path is light, and 8 ranks share a node
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# what a killed rank printed last is in the log, and where a library crashed
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# InfiniBand registers (locks) memory, and each of thousands of connections is a file: batch shells often inherit 64 KiB
# and 1024
ulimit -l unlimited 2>/dev/null || true
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

# --- errors are seen, and say where ---
# an NCCL error ends the process without waiting for an abort that may itself hang; torch's default, said here because
# the requeue depends on it [torch]
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# the last collectives of every rank, dumped when one times out: names the one that hung [torch]
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# version and failures only; INFO prints pages a rank [nccl]
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# --- InfiniBand, 8 adapters a node, one a GPU ---
# a link that flaps is given 4.096 us * 2^22 = 17 s a try before the connection is lost, instead of 4 s (the default, 20):
# one flap a day is normal on thousands of links [nccl: for large networks]
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
# rail-optimised fabric: an adapter talks to adapters of its own rail, crossing rails costs a spine hop or, where rails
# are planes of their own, is not possible at all [nccl; insights: multi-plane fat tree]
export NCCL_CROSS_NIC="${NCCL_CROSS_NIC:-0}"
# to another rail a token goes over NVLink first, then over its own adapter: PXN, on by default, said because the
# dispatchers do the same [nccl; report, section 3.2.2]
export NCCL_PXN_DISABLE="${NCCL_PXN_DISABLE:-0}"
# set by the site, if at all: which adapters are for compute and which interface reaches all nodes
#   NCCL_IB_HCA=mlx5_0,mlx5_3,...    leave storage and management adapters out
#   NCCL_SOCKET_IFNAME=bond0         bootstrap; wrong where a node has an interface that others cannot reach
#   NCCL_IB_SL, NCCL_IB_TC           a virtual lane of their own for all-to-alls [insights: traffic isolation]

# --- NVLink ---
# multicast buffers of NVSwitch cost memory in every communicator, and a run has one for each axis and direction; our
# collectives inside a node are all-to-alls, which do not use them [nccl: NCCL_NVLS_ENABLE]
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# --- the native dispatcher: GPU-initiated networking (GIN) ---
# windows of symmetric memory are made by CUDA's virtual memory calls [nccl]
export NCCL_CUMEM_ENABLE="${NCCL_CUMEM_ENABLE:-1}"
# 3: the GPU rings the adapter's doorbell itself, which needs a driver and firmware with GPUDirect async; 2: through a
# thread of the host. Unset: NCCL takes what it finds [nccl.h]. `expertpipe preflight` tests what came of it.
#   NCCL_GIN_TYPE=3

# --- memory ---
# rows an expert gets differ in every step: segments that grow instead of blocks that never fit again [torch: CUDA
# semantics, memory management]
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
