# The two commands of the README. Each sets up what it needs in .venv, pinned by constraints.txt, and then does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A checkout is installed in place; the stamps record which set of dependencies the environment holds.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format bench clean

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

bench: $(VENV)/.dev
	$(BIN)/python -m bench.kernels

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
