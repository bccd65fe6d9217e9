# make setup | make train ARGS="..." | make test | make test-full | make test-faults | make gpu-test | make format
.PHONY: setup train test test-full test-faults gpu-test format
SHELL := /bin/bash
ifndef PYTHON
PYTHON := $(shell command -v python3.11 || command -v python3)
endif
BIN := $(CURDIR)/.venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
STAMP := .venv/.setup-stamp
# --method mlora unless ARGS names another: torchx refuses an option that is given twice
METHOD := $(if $(filter --method --method=%,$(ARGS)),,--method mlora)

# a test file goes to one process as a whole: many share what their first test makes
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

export PATH := $(BIN):$(PATH)

setup: $(STAMP)

$(STAMP): requirements-cpu.txt pyproject.toml $(wildcard torchrec_mdr/ops/csrc/*)
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@# a Python without ensurepip (Debian's without python3-venv) lends the environment its own pip
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv .venv 2>/dev/null \
	  || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@echo "Setting up .venv (PyTorch, TorchRec, TorchX); the first time takes some minutes ..."
	@# these two by themselves: among many others pip looks for hours for the boto3 that both take
	@$(PIP) 's3fs>=2025.2' 'moto[server]'
ifeq ($(shell command -v nvidia-smi),)
	@$(PIP) -r requirements-cpu.txt
	@$(PIP) --no-deps torchrec==1.8.0
	@$(PIP) -e '.[dev]'
else
	@$(PIP) -e '.[cuda,dev]'
endif
	@touch $@

train: $(STAMP)
	torchx run torchx_components/mdr.py:train -- $(METHOD) $(ARGS)

test: $(STAMP)
	ruff check .
	ruff format --check .
	mypy
	pytest $(PARALLEL)

# the tests marked full, which make test leaves out: whole products and slow checks
test-full: $(STAMP)
	pytest $(PARALLEL) -m full tests

# runs that are killed, damaged, preempted and started again, by torchrun, TorchX and Slurm; about two hours
test-faults: $(STAMP)
	pytest -m faults tests/faults

# what needs a GPU; without one each test says so, and nothing is measured
gpu-test: $(STAMP)
	pytest tests/gpu tests/ops/kernels
	python -m benchmarks.gpu

format: $(STAMP)
	ruff check --fix .
	ruff format .

.PHONY: docs
# the site in docs/_build/html; a warning is an error, a broken link too
docs: $(STAMP)
	python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"
