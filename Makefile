# make setup      .venv with the console command `expertpipe`, from the versions pinned in constraints.txt
# make demo       prepare text that is on this machine and train experiment=tiny on 4 processes; CORPUS=full for more text
# make test       the CPU test suite
# make test-slow  the tests that take longer or need root; skipped aloud where something is missing
# make test-all   all three suites: also the exhaustive one (every fault, schedule and weakened ordering: an hour or more)
# make checks     ruff, pyright, import-linter, then make test
# make cluster    the packages of a run on GPUs: torch, DeepSpeed, megatron-core, Transformer Engine, wandb, apex
# make clean      remove .venv and caches; runs/ with its data and checkpoints stays
#
# torch's package on the public registry is the CUDA build, several gigabytes. A machine without a GPU needs only the
# CPU build: give its package index, which torch's installation page names, as `make setup TORCH_INDEX=...`, or put
# its wheel in a folder that PIP_FIND_LINKS names. Set once: later calls find torch installed.

PYTHON3 ?= python3
CORPUS ?= stdlib
TEST_JOBS ?= 2
TORCH_INDEX ?=

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP_INSTALL := $(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup demo test test-slow test-exhaustive test-all checks checks-static cluster clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# pip is the last thing that venv installs: an interrupted one is made again
$(VENV)/bin/pip:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON3) is older than 3.11: make setup PYTHON3=python3.11 (or newer)"; exit 1; }
	@$(PYTHON3) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON3) cannot make virtual environments: apt install python3-venv"; exit 1; }
	$(PYTHON3) -m venv $(VENV)

# torch first: everything after it is then resolved against the build that is already there
$(STAMP): setup.py constraints.txt | $(VENV)/bin/pip
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) -e ".[test]"
	@touch $@

demo: setup
	$(VENV)/bin/expertpipe demo --corpus $(CORPUS)

test: setup
	$(PYTHON) -m pytest -n $(TEST_JOBS)

test-slow: setup
	$(PYTHON) -m pytest -n $(TEST_JOBS) --dist loadfile -m "slow and not gpu"

test-exhaustive: setup
	$(PYTHON) -m pytest -m "exhaustive and not gpu"

test-all: test test-slow test-exhaustive

checks: checks-static test

checks-static: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

cluster:
	PYTHON3=$(PYTHON3) VENV=$(VENV) $(if $(TORCH_INDEX),TORCH_INDEX=$(TORCH_INDEX)) slurm/install.sh

clean:
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
