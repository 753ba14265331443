# make install   .venv with everything the main job needs
# make demo      write clips, train the tiny model with GRPO, print held-out scores before and after; DEMO_ARGS="--seed 1"
#                MODEL=tiny3: the tiny Qwen3-VL in place of the tiny Qwen2.5-VL
# make demo-full the same with more clips and steps
# make sglang    .venv-sglang with SGLang for machines without a GPU, for the tests of that engine (2.4 GB)
# make test      ruff, pyright and pytest, what .ci/run calls
# make docs      the pages of docs/ as a site in build/site
# make audit     known weaknesses of the packages that are installed; ends with 75 where their list cannot be had
# make clean     remove build products and caches; .venv and runs/ stay

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help install sglang test demo demo-full docs audit clean

VENV ?= .venv
DEMO_ARGS ?=
MODEL ?= tiny
PYTEST_ARGS ?=
# Files are shared out to two processes, the tests of a file run in order in one of them; empty: all in one process
PYTEST_WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
# PyTorch's own index of CPU builds, asked only where pip's configured places do not have the pinned torch
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# the first interpreter that is new enough; PYTHON=/path/to/python chooses another
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo "$$p" && break; done)

BIN := $(VENV)/bin
PEERS := tests/kernels/integrations/peers.txt
ORACLE := tests/video/oracle.txt
SOURCES := pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*)

help:
	@grep '^# \(make\|  \)' Makefile | cut -c3-

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	@if [ -z "$(PYTHON)" ]; then
	  echo "make install: found no Python 3.11, 3.12 or 3.13; install one, or name it: make install PYTHON=..." >&2
	  exit 1
	fi
	# a GPU machine usually comes with a torch that fits its driver: that one is kept
	keep_torch=""
	if nvidia-smi >/dev/null 2>&1; then
	  keep_torch=$$("$(PYTHON)" -c 'import torch; v = torch.__version__; print(v if (2, 11) <= tuple(map(int, v.split(".")[:2])) < (2, 15) else "")' 2>/dev/null || true)
	fi
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $${keep_torch:+--system-site-packages} $(VENV)
	constraints=$(VENV)/constraints.txt
	if [ -n "$$keep_torch" ]; then
	  echo "make install: a GPU and torch $$keep_torch are here; keeping that torch"
	  echo "torch==$$keep_torch" > $$constraints
	elif nvidia-smi >/dev/null 2>&1; then
	  # the torch of SGLang's environment: weights are broadcast between two processes with one NCCL
	  sed -n 's/^torch==\([0-9.]*\).*/torch==\1/p' tests/rollout/sglang/constraints.txt > $$constraints
	  echo "make install: a GPU is here; taking $$(cat $$constraints), as SGLang does"
	else
	  echo "make install: no NVIDIA GPU here; taking the CPU build of torch"
	  cp constraints-cpu.txt $$constraints
	  $(BIN)/python -m pip install -qq -c $$constraints torch 2>/dev/null \
	    || $(BIN)/python -m pip install -qq -c $$constraints --index-url $(TORCH_INDEX) torch
	fi
	$(BIN)/python -m pip install -qq -c $$constraints -e .
	rm -f $(VENV)/.installed-dev
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(PEERS) $(ORACLE)
	@$(BIN)/python -m pip install -qq -c $(VENV)/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -qq --no-deps -r $(PEERS)
	# the wheels of verl and openrlhf bring top-level packages `tests` and `scripts`, which would hide our tests/
	rm -rf "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/{tests,scripts}
	# not among the packages: a torchvision that does not fit torch breaks transformers; one test starts a process with it
	$(BIN)/python -m pip install -qq --no-deps --upgrade --target $(VENV)/oracle -r $(ORACLE)
	touch $@

sglang:
	@tests/rollout/sglang/install.sh .venv-sglang

test: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# beside the tests: half a minute of one core, and a core that waits while pytest collects
	$(BIN)/pyright --pythonpath $(BIN)/python & types=$$!
	trap 'kill $$types 2>/dev/null || true' EXIT
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_WORKERS) $(PYTEST_ARGS)
	wait $$types || { echo "make test: the tests passed, pyright did not: see its lines above" >&2; exit 1; }

demo: $(VENV)/.installed
	@$(BIN)/python -m vcr1_fast.commands.demo --model $(MODEL) $(DEMO_ARGS)

demo-full: $(VENV)/.installed
	@$(BIN)/python -m vcr1_fast.commands.demo --model $(MODEL) --full $(DEMO_ARGS)

docs: $(VENV)/.installed
	@$(BIN)/python -m pip install -qq -c $(VENV)/constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -f docs/site/mkdocs.yml
	echo "build/site/index.html, to be opened with a browser"

audit: $(VENV)/.installed
	@$(BIN)/python -m pip install -qq -c $(VENV)/constraints.txt -e '.[audit]'
	tests/audit.sh $(BIN)/python

clean:
	rm -rf {.,kernels}/{build,dist,*.egg-info} .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venv-sglang/*' -prune -exec rm -rf {} +
