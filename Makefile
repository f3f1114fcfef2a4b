# The two commands of the README. Each sets up what it needs in .venv, pinned by constraints.txt, and then does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A checkout is installed in place; the stamps record which set of dependencies the environment holds.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test lint format bench bench-formats paper-small fuzz gpu-test sanitize sanitize-cpu clean

demo: $(VENV)/.demo
	$(BIN)/alignvec demo

# A process for each of two cores; JOBS=0 runs the tests in one, as a debugger wants it.
JOBS ?= 2
test: $(VENV)/.csrc
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

# Measures on the device at hand, on an idle machine; never part of the tests.
bench: $(VENV)/.csrc
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.plot

bench-formats: $(VENV)/.dev
	$(BIN)/python -m bench.formats

# The paper's experiments on the shipped models, from nothing: data in bench/paper/results, the report in docs/paper.
paper-small: $(VENV)/.csrc
	$(BIN)/python -m bench.paper

# Mutated vectors, adapters and checkpoints, in search of anything but a right result or a refusal in one sentence.
MINUTES ?= 20
fuzz: $(VENV)/.csrc
	$(BIN)/python -W ignore -m tests.fuzz --minutes $(MINUTES)

# The gates that need a GPU, and the kernels' own tests, compiled.
gpu-test: $(VENV)/.csrc
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu-test: no GPU is at hand"; exit 1; }
	$(BIN)/python -m pytest tests/gpu tests/kernels

# One small pass through every kernel under compute-sanitizer; without caching, so that strays leave their allocation.
sanitize: $(VENV)/.csrc
	@if command -v compute-sanitizer > /dev/null; then \
	  for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	      $(BIN)/python -m pytest -q tests/gpu/test_one_pass.py || exit 1; \
	  done; \
	else \
	  echo "sanitize: compute-sanitizer (of the CUDA toolkit) is not on PATH, nothing was checked"; \
	fi

# csrc/cpu's operators with the address and undefined-behaviour sanitizers; GCC's, since python has to load them first.
# Their reports go to the process's stderr, which pytest must not hold back: it dies with them.
SANITIZED = $(CURDIR)/build/sanitize
sanitize-cpu: $(VENV)/.dev
	CXX=$(CXX) ALIGNVEC_BUILD=cpu ALIGNVEC_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 ALIGNVEC_BACKEND=cpp \
	  ALIGNVEC_LIBRARY_CPU=$(SANITIZED)/alignvec/compiled/_cpu.abi3.so \
	  $(BIN)/python -m pytest -q --capture=sys -k "cpp or test_cpu or test_levels" tests/csrc tests/kernels tests/attach/test_backends.py

$(BIN)/python:
	@echo "Creating the virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch before alignvec: csrc is built against the one that it finds.
$(VENV)/.demo: $(BIN)/python pyproject.toml setup.py constraints.txt
	@echo "Installing what the demo needs (torch is the large part)"
	$(INSTALL) torch
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml setup.py constraints.txt
	@echo "Installing alignvec with everything that tests and recipes need"
	ALIGNVEC_BUILD=0 $(INSTALL) -e ".[all]"
	@touch $@ $(VENV)/.demo

# Apart from the installation: sources change more often than what is installed, and pip hides what was left out.
$(VENV)/.csrc: $(VENV)/.dev $(CSRC)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info alignvec/compiled/*.so .pytest_cache .mypy_cache .ruff_cache demo-out
