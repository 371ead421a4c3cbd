# Environment of every task; sourced by the job scripts. Each line with its reason and source. What is set already is
# kept, so a site's own settings win. None of the settings for NCCL has been measured by us on GPUs.
#
# Sources: [nccl] NVIDIA's NCCL user guide, "Environment Variables", as of 2.30; [torch] PyTorch's "ProcessGroupNCCL
# Environment Variables" and the headers of 2.13; [insights] arXiv 2505.09343, section 5; [report] arXiv 2412.19437.
# NVIDIA sorts its variables: "system configuration" is meant for scripts, "debugging" is not, because a value that is
# forced keeps a later version from choosing. Of the second sort one is set here, NCCL_NVLS_ENABLE, and says why.

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
# an NCCL error ends the process without waiting for an abort that may itself hang; torch's default (3), said here
# because the requeue depends on it [torch]
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# the last 2000 collectives of every rank (torch's default, and its newer name for TORCH_NCCL_TRACE_BUFFER_SIZE), written
# out when one times out, which needs a buffer: `torchfrtrace` then tells which rank was missing. job.sh says where to
# [torch]
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# a message when a call of NCCL fails; INFO prints pages a rank [nccl: system configuration]
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# --- InfiniBand, 8 adapters a node, one a GPU ---
# a link that flaps: 7 tries of 4.096 us * 2^22 = 17 s are 2 minutes before NCCL gives the connection up; the default,
# 20, gives up after 30 s [nccl: system configuration, "can help on very large networks"]. A rank that is gone is not
# found by this, but by its peers' watchdogs within seconds.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
# rail-optimised fabric, one switch an adapter: rings and trees keep to their rail; crossing costs a spine hop or, where
# rails are planes of their own, is not possible at all. A site whose adapters share a switch sets 1; NCCL's default, 2,
# crosses where that looks faster [nccl: system configuration; insights: multi-plane fat tree]
export NCCL_CROSS_NIC="${NCCL_CROSS_NIC:-0}"
# set by the site, if at all: which adapters are for compute and which interface reaches all nodes. "=" means just these
# names: mlx5_1 alone also takes mlx5_10 to mlx5_19 [nccl]
#   NCCL_IB_HCA==mlx5_0,mlx5_3,...   leave storage and management adapters out
#   NCCL_SOCKET_IFNAME==bond0        bootstrap; wrong where a node has an interface that others cannot reach
#   NCCL_IB_SL, NCCL_IB_TC           a virtual lane of their own for all-to-alls [insights: traffic isolation]
# not set, because it is the default: NCCL_PXN_DISABLE=0. To another rail a message goes over NVLink first and then over
# that GPU's adapter, which `flat` relies on; our own dispatchers do the same themselves [nccl: debugging; report, 3.2.2]

# --- NVLink ---
# 0: no multicast buffers of NVSwitch. They are memory in every communicator, and a run has one for each axis and
# direction; since 2.29 a communicator that cannot get them does not start [nccl]. NVIDIA's own launcher of LLM training
# did the same to save memory (NeMo-Framework-Launcher, pull request 127). The price: the reduce-scatter and all-gather
# of the gradients, once a step, go without the switch's sums where several ranks of their group share a node.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# --- the native dispatcher: GPU-initiated networking (GIN) ---
# nothing to set: it asks for GIN on its own rail by GPUs that post to the adapter themselves (GDAKI), which needs
# GPUDirect async in driver and firmware, and is told by NCCL if there is none. Its windows are memory of CUDA's virtual
# memory calls, which NCCL takes by itself since 2.19 where the system has them: do not set NCCL_CUMEM_ENABLE=0, as
# images for inference do [nccl: debugging]. `expertpipe preflight` tests what came of it.

# --- memory ---
# rows an expert gets differ in every step: segments that grow instead of blocks that never fit again [torch: CUDA
# semantics, memory management; since 2.9 under this name]
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
