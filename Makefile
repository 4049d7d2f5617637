# make demo | test | long | bench | clean: each does everything it needs from a fresh clone, in .venv, and nothing twice.
# A Python of your own that already has the requirements: make test PY=/path/to/python (no .venv is made).
# PYTHON=... chooses what .venv is made with; OUT=... where the demo writes; ARGS=... goes to pytest. TORCH=... is what
# pip is told to install as torch: by default its CPU build, since the registry's own brings several GB of CUDA.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

# An empty environment has a search path inside the shell, but exports none, and Python then cannot find itself.
export PATH := $(or $(PATH),/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH
unexport PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MAX_JOBS ?= 2

VENV := .venv
OUT ?= out/demo
ARGS ?=
BUILD_INPUTS := setup.py CMakeLists.txt flmoe_fast/__init__.py $(wildcard csrc/* csrc/cpu/* csrc/fused/*)

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
RUNS := $(VENV)/.runs
INSTALLED := $(VENV)/.installed
FLMOE := $(VENV)/bin/flmoe-fast
else
RUNS :=
INSTALLED :=
FLMOE := $(PY) -m flmoe_fast.cli
endif
EXTENSION := build/.extension
CPU_EXTENSION := build/.cpu-extension
BUILD_LOG := build/extension.log

TORCH ?= $(if $(filter Linux,$(shell uname -s)),torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu,torch)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test long bench findings wheels hub env extension lint types host-test portable-check nvcc-check budgets pytest
.PHONY: soak clean

# The demonstration needs neither CUDA kernels nor what only tests need, and takes what is already built.
demo: $(RUNS) $(if $(wildcard $(EXTENSION)),$(EXTENSION),$(CPU_EXTENSION))
	@$(FLMOE) demo --out $(OUT)

# What compiles and what reads, side by side; then the tests, which have the machine to themselves.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory --output-sync=target -j $(MAX_JOBS) lint types host-test nvcc-check
	@$(MAKE) --no-print-directory pytest

bench: extension
	$(PY) -m pytest bench $(ARGS)

# What is said of FL-I2MoE, asked of models trained here, and the pages' tables; goes on where it stopped.
findings: $(RUNS) $(if $(wildcard $(EXTENSION)),$(EXTENSION),$(CPU_EXTENSION))
	$(PY) -m bench.findings $(ARGS)
	$(PY) -m bench.tables

# The source distribution, the pure wheel and a manylinux wheel for every Python found, tried where there is no compiler.
wheels: $(INSTALLED)
	$(PY) .ci/wheels.py $(ARGS)

# The Triton kernels as the kernels hub takes them, in dist/hub.
hub: $(RUNS)
	$(PY) .ci/hub.py dist/hub

env: $(INSTALLED)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Whether what annotations promise fits together.
types: $(INSTALLED)
	$(PY) -m mypy

# The shared C++ core under AddressSanitizer and UBSan.
host-test: $(INSTALLED)
	$(PY) csrc/check.py host

# The CPU engine's host test on emulated processors, Arm and older x86-64: minutes, so not part of `test`.
portable-check: $(INSTALLED)
	$(PY) csrc/check.py portable

# Every CUDA source for every shipped architecture: no warnings, no spills. Says so and passes where there is no nvcc.
nvcc-check: extension
	$(PY) csrc/check.py nvcc $(BUILD_LOG)

# What every Triton kernel needs, compiled for every shipped GPU architecture: the table, and the file tests compare with.
budgets: $(INSTALLED)
	$(PY) tests/test_triton_compile.py

# A file stays with one process, so that what its tests share is made once.
pytest: extension
	$(PY) -m pytest -n $(MAX_JOBS) --dist loadfile -m "not long" $(ARGS)

# What takes tens of seconds a test: kernels for every shipped GPU architecture, sanitized and sparse launches.
long: extension
	$(PY) -m pytest -n $(MAX_JOBS) --dist load -m long $(ARGS)

# Thousands of random cases, mutated files, killed runs and sanitizers; goes on where it stopped. MINUTES=... says how long.
MINUTES ?= 40
soak: extension
	$(PY) -m tests.soak --minutes $(MINUTES) $(ARGS)

# The requirements, then the package itself, editable. The build requirements go into the same environment, so that the
# build needs no environment of its own (and can never fetch torch for one). The extension is a target of its own.
# torch comes by itself, before what needs it: pip finds its CPU build among its own sources or on its index, or this stops.
$(RUNS): pyproject.toml constraints.txt
	@python=$$(for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	      && { echo "$$candidate"; break; } || true; done); \
	if [ -z "$$python" ]; then \
	  echo "make: no Python >= 3.11 with venv found (tried $(PYTHON) python3 python3.13 python3.12 python3.11);" \
	       "name one with make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "making $(VENV) with $$python: $(TORCH) and what the package needs"; "$$python" -m venv $(VENV)
	@$(PY) -m pip install -qq -c constraints.txt setuptools wheel pybind11 cmake ninja
	@$(PY) -m pip install -qq --no-deps '$(TORCH)' 2>/dev/null \
	  || $(PY) -m pip install -qq --no-deps --index-url $(TORCH_INDEX) '$(TORCH)' \
	  || { echo "make: no $(TORCH) here; make TORCH=torch takes the registry's own, several GB with CUDA" >&2; exit 1; }
	@FLMOE_NATIVE=off $(PY) -m pip install -qq -c constraints.txt --no-build-isolation -e .
	@touch $@

$(INSTALLED): $(RUNS)
	@echo "adding what the tests need"
	@FLMOE_NATIVE=off $(PY) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

extension: $(EXTENSION)

# Built beside the sources, which is where an editable install, or a Python of one's own, finds the package. Where
# it cannot be built there is no stamp, so that a compiler installed later is noticed.
$(EXTENSION): $(BUILD_INPUTS) $(INSTALLED)
	@echo "building the extension: minutes, with an nvcc (FLMOE_CUDA=off leaves the kernels for GPUs out)"
	@mkdir -p $(dir $@); $(PY) setup.py -q build_ext --inplace >$(BUILD_LOG) 2>&1 || { cat $(BUILD_LOG); exit 1; }
	@if ls flmoe_fast/_C*.so >/dev/null 2>&1; then touch $@; else tail -n 1 $(BUILD_LOG); fi

$(CPU_EXTENSION): $(BUILD_INPUTS) $(RUNS)
	@echo "building the engine for CPUs"
	@mkdir -p $(dir $@); FLMOE_CUDA=off $(PY) setup.py -q build_ext --inplace >build/cpu-extension.log 2>&1 \
	  || { cat build/cpu-extension.log; exit 1; }
	@if ls flmoe_fast/_C*.so >/dev/null 2>&1; then touch $@; else tail -n 1 build/cpu-extension.log; fi

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .benchmarks flmoe_fast/_C*.so
	find flmoe_fast tests bench csrc -name __pycache__ -type d -prune -exec rm -rf {} +
