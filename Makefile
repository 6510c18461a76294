# Two commands do all the set-up on a fresh machine: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

# Waiting threads that sleep are kinder to shared cores and cost the engine nothing, but they double what the loops take that
# it is measured against; ACTIVE, where they never sleep, takes the engine's cores. So these run with the policy not set.
MEASURED := env -u OMP_WAIT_POLICY $(BIN)/python

.PHONY: help install demo test test-slow lint wheel docs notebook faults fuzz lock audit bench bench-engine bench-select bench-store clean

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

docs: $(STAMP) ## Build the documentation site into build/site, warnings are errors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebook: $(STAMP) ## Run the example notebook again and keep its outputs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev,docs]'
	$(BIN)/python docs/run_notebook.py

faults: $(STAMP) ## Strike stores in every way, 500 times, and print the tally (about a quarter of an hour; TRIALS=n SEED=n)
	PYTHONPATH=tests $(BIN)/python -m campaign --trials $(or $(TRIALS),500) --seed $(or $(SEED),0)

fuzz: $(STAMP) ## Give everything that is read from outside to a coverage-guided fuzzer (SECONDS=n for each of 14 targets, 60)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev,fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzzing --seconds $(or $(SECONDS),60)

# Versions are those of constraints.txt, hashes those that the index has: of every file of every platform, torch as PyPI has
# it. The index is the one uv is set up with, and is not written down.
lock: $(STAMP) ## Write requirements.lock again: every dependency with the hashes of its files
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev,audit]'
	mkdir -p build
	$(BIN)/uv pip compile pyproject.toml --all-extras --constraints constraints.txt --universal --python-version 3.11.5 \
	  --generate-hashes --no-annotate --no-header --no-emit-index-url --quiet --output-file build/requirements.lock
	{ sed -n '/^#/p' requirements.lock; cat build/requirements.lock; } > build/requirements.new && mv build/requirements.new requirements.lock

audit: $(STAMP) ## Ask PyPI's advisories about every dependency of requirements.lock (needs the network; fails where one cannot be asked about)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,dev,audit]'
	@$(BIN)/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r requirements.lock || { printf '%s\n' \
	  "audit: not passed. Either an advisory is listed above, or PyPI's advisories could not be asked: a connection error," \
	  "or a package 'not found on PyPI' that is there, says that this machine reaches no index, or a mirror without them." \
	  "Then nothing was audited: run it where PyPI itself can be reached." >&2; exit 1; }

bench: $(STAMP) ## Run the measurements (slow; see benchmarks/README.md)
	$(MEASURED) benchmarks/bench_main_job.py

# The peers want other dependencies than we do, so they get an environment of their own. torchaudio and torchvision are
# not used by either, and a build of them that does not fit torch keeps transformers from loading.
ENGINE_PEERS := build/peers
$(ENGINE_PEERS)/.installed:
	$(PYTHON) -m venv $(ENGINE_PEERS)
	$(ENGINE_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch transformers peft traker==0.3.2 bergson==2.5.1
	$(ENGINE_PEERS)/bin/python -m pip uninstall --quiet --yes torchaudio torchvision
	@touch $@

bench-engine: $(STAMP) $(ENGINE_PEERS)/.installed ## Measure the factor engine beside loops, TRAK and Bergson (slow; see benchmarks/README.md)
	$(MEASURED) benchmarks/bench_engine.py --peers $(ENGINE_PEERS)/bin/python

SELECT_PEERS := build/select-peers
bench-select: $(STAMP) ## Measure selection against apricot-select and submodlib-py, in an environment of their own (about two hours and 20 GB of memory)
	test -x $(SELECT_PEERS)/bin/python || $(PYTHON) -m venv $(SELECT_PEERS)
	$(SELECT_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check apricot-select==0.6.1 scikit-learn submodlib-py==0.0.3
	$(BIN)/python benchmarks/bench_select.py --peers $(SELECT_PEERS)/bin/python $(SELECT_SIZES)
	$(BIN)/python benchmarks/bench_select.py --codes $(SELECT_CODES) --save build/select_codes.jsonl

bench-store: $(STAMP) ## Measure the store at a million instances (about ten minutes and 8 GB of disk; PEERS=python with faiss)
	$(BIN)/python benchmarks/bench_store.py $(if $(PEERS),--peers $(PEERS))

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis repmatch-demo
