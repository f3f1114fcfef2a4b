# The two commands of the README. Each sets up what it needs in .venv, pinned by constraints.txt, and then does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A checkout is installed in place; the stamps record which set of dependencies the environment holds.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format bench bench-formats gpu-test sanitize clean

demo: $(VENV)/.demo
	$(BIN)/alignvec demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Measures on the device at hand, on an idle machine; never part of the tests.
bench: $(VENV)/.dev
	$(BIN)/python -m bench.kernels

bench-formats: $(VENV)/.dev
	$(BIN)/python -m bench.formats

# The gates that need a GPU, and the kernels' own tests, compiled.
gpu-test: $(VENV)/.dev
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu-test: no GPU is at hand"; exit 1; }
	$(BIN)/python -m pytest tests/gpu tests/kernels

# One small pass through every kernel under compute-sanitizer; without caching, so that strays leave their allocation.
sanitize: $(VENV)/.dev
	@if command -v compute-sanitizer > /dev/null; then \
	  for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	      $(BIN)/python -m pytest -q tests/gpu/test_one_pass.py || exit 1; \
	  done; \
	else \
	  echo "sanitize: compute-sanitizer (of the CUDA toolkit) is not on PATH, nothing was checked"; \
	fi

$(BIN)/python:
	@echo "Creating the virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml setup.py constraints.txt
	@echo "Installing what the demo needs (torch is the large part)"
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml setup.py constraints.txt
	@echo "Installing alignvec with everything that tests and recipes need"
	$(INSTALL) -e ".[all]"
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-out
