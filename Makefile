# Two commands do all the set-up on a fresh machine: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-slow lint wheel bench bench-store clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## Make the virtual environment .venv with pinned dependencies and the package

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "repmatch needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=python3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev]'
	@touch $(STAMP)

demo: $(STAMP) ## Run the main job on the standard library's docstrings (about three minutes on two cores)
	$(BIN)/repmatch demo

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## Run every test, the slow ones too
	$(BIN)/python -m pytest -m 'not gpu'

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(STAMP) ## Build the wheel and try it in an empty environment
	rm -rf dist
	$(BIN)/python -m build --wheel
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && wheel-venv/bin/repmatch --version && wheel-venv/bin/repmatch --help >/dev/null && wheel-venv/bin/repmatch info

bench: $(STAMP) ## Run the measurements (slow; see benchmarks/README.md)
	$(BIN)/python benchmarks/bench_main_job.py

bench-store: $(STAMP) ## Measure the store at a million instances (about ten minutes and 8 GB of disk; PEERS=python with faiss)
	$(BIN)/python benchmarks/bench_store.py $(if $(PEERS),--peers $(PEERS))

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis repmatch-demo
