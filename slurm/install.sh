#!/usr/bin/env bash
# All packages of a run on GPUs in one command, into .venv: torch, hydra-core, DeepSpeed, megatron-core, Transformer
# Engine, wandb and NVIDIA's apex.
#
#     slurm/install.sh              on a node with the CUDA toolkit (nvcc) and a network; it needs no GPU
#     slurm/install.sh --dry-run    what is missing, and the commands; installs nothing
#
# Not one call of pip, because two of the seven are compiled against torch and ask it for its CUDA version before pip
# knows what they need: Transformer Engine's torch library, a source distribution that names the core library of that
# CUDA version then, and apex, which is on no registry (the `apex` there is another project) and refuses an nvcc of
# another version than torch's. So: torch, then the registry's packages, then apex.
#
# Settings, as variables: PYTHON3 (python3); VENV (.venv); TORCH_INDEX, torch's package index for another CUDA version;
# TORCH_CUDA_ARCH_LIST (9.0: H100, H800, H200); MAX_JOBS (16), compilers at once; APEX, a checkout of NVIDIA/apex where
# there is no network to clone it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# NVIDIA/apex of 2026-07-08: its newest tag, 25.09, is older than torch's step to C++20 for what is compiled against it
APEX="${APEX:-apex @ git+https://github.com/NVIDIA/apex@6424da3b4faa6c8f062da4a48c424fff3f02d42d}"
VENV="${VENV:-.venv}"
PYTHON="$VENV/bin/python"
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" MAX_JOBS="${MAX_JOBS:-16}"
DRY_RUN="" MISSING=0

missing() { echo "slurm/install.sh: $1" >&2; MISSING=1; }
stop_if_missing() { [ "$MISSING" = 0 ] || exit 2; }
run() { echo "+ $*"; [ -n "$DRY_RUN" ] || "$@"; }
pip_install() {
    run "$PYTHON" -m pip install --disable-pip-version-check -c constraints.txt -c slurm/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"
}

case "${1:-}" in
    "") ;;
    --dry-run) DRY_RUN=1 ;;
    *) missing "$1: no such option; use --dry-run or none"; stop_if_missing ;;
esac

# --- what has to be there ---
if [ -z "${CUDA_HOME:-}" ] && nvcc_there="$(command -v nvcc)"; then
    CUDA_HOME="$(dirname "$(dirname "$(readlink -f "$nvcc_there")")")"
fi
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
nvcc_version=""
if [ -x "$CUDA_HOME/bin/nvcc" ]; then
    nvcc_version="$("$CUDA_HOME/bin/nvcc" -V | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')"
else
    missing "no nvcc in $CUDA_HOME/bin: load the CUDA toolkit's module, or set CUDA_HOME"
fi
for tool in git g++; do
    command -v "$tool" >/dev/null || missing "no $tool: install it, apex is cloned and compiled"
done
if [ ! -x "$PYTHON" ]; then
    "${PYTHON3:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        missing "${PYTHON3:-python3} is not there, or older than 3.11: set PYTHON3"
fi
stop_if_missing

# --- torch, and what the others are built with ---
[ -x "$PYTHON" ] || run "${PYTHON3:-python3}" -m venv "$VENV"
pip_install torch==2.13.0 'setuptools>=77' wheel packaging ninja pybind11
if torch_cuda="$("$PYTHON" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null)"; then
    if [ -z "$torch_cuda" ]; then
        missing "torch in $VENV is a CPU build: remove $VENV, or set TORCH_INDEX to torch's builds for CUDA"
    elif [ "$torch_cuda" != "$nvcc_version" ]; then
        missing "torch is built for CUDA $torch_cuda, nvcc is of $nvcc_version: load CUDA $torch_cuda, or set TORCH_INDEX"
    fi
elif [ -z "$DRY_RUN" ]; then
    missing "torch in $VENV does not import: \`$PYTHON -c 'import torch'\` says why"
fi
stop_if_missing

# --- the registry's packages ---
# the headers of cuDNN and NCCL are in the wheels that torch brought; a CUDA toolkit has neither
wheels="$(echo "$VENV"/lib/python3.*/site-packages/nvidia)"
export CPATH="$PWD/$wheels/cudnn/include:$PWD/$wheels/nccl/include${CPATH:+:$CPATH}"
export DS_BUILD_OPS=0 # DeepSpeed compiles its CPU Adam where and when it is used
pip_install --no-build-isolation -e '.[cluster]'

# --- apex: the two extensions of its README, the kernels of FusedAdam among them ---
export APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="$MAX_JOBS"
pip_install --no-build-isolation --no-deps "$APEX"

# --- found by its module, for `apex` alone says nothing ---
for module in torch hydra deepspeed megatron.core transformer_engine_torch wandb amp_C; do
    run "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
        missing "$module is not there after all: see what pip said above"
done
stop_if_missing
[ -n "$DRY_RUN" ] || echo "all seven are there; \`$VENV/bin/expertpipe doctor\` says what a run finds"
