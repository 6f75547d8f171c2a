# Every target sets up what it needs: on a fresh machine, `make quickstart` is enough.
VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
# Bytecode is written when a module is first imported: most of these never are.
INSTALL = $(PIP) install -q --no-compile
# For ArviZ 1.x: an environment of its own, and its parts to put before another's.
ARVIZ1 = .venv-arviz1
ARVIZ1_PYTHON =
ARVIZ1_FIRST = $(abspath $(ARVIZ1)/first)
ARVIZ1_STORED = $(abspath $(ARVIZ1)/posteriors)
# A stamp is the time of the last installation; a changed input makes it stale.
TUTORIALS = $(VENV)/.stamp-tutorials
DEV = $(VENV)/.stamp-dev
DOCS = $(VENV)/.stamp-docs
RELEASE = $(VENV)/.stamp-release
# Of the lowest and the newest versions, in environments of their own.
FLOORS = .venv-floors
NEWEST = .venv-newest
# Another torch than the lowest or newest, where it has no CPU build: torch==2.13.0
TORCH ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart setup test slow-test test-arviz1 tutorials benchmark docs lint \
	format pre-commit test-floors test-newest wheel dist lock clean

help:  ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) WORKERS=$(WORKERS)"
	@echo "for test-floors and test-newest: TESTS=tests/nn TORCH=torch==2.13.0"

quickstart: $(TUTORIALS)  ## Train, fit and compare on handwritten digits (two minutes)
	$(BIN)/python tutorials/quickstart.py

setup: $(DEV)  ## Make the virtual environment that tests and checks need

# One thread a worker: the tests' networks are small, and two tests at once are faster.
test: $(DEV)  ## Run the tests, the docstrings' examples among them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

slow-test: $(DEV)  ## Run the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

# Old versions of libraries use what others deprecated since: of that no test can tell.
OLD = -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning

test-floors: $(FLOORS)/.stamp  ## Run the tests on the lowest versions of pyproject.toml
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(OLD) $(TESTS)

test-newest: $(NEWEST)/.stamp  ## Run the tests on the newest versions that can be had
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(TESTS)

# What takes long and asks nothing of ArviZ is left to `make test`.
# Twice: with torch, on the usual Python; and on one that ArviZ 1.x says it is for, without
# torch, whose CPU build is not to be had everywhere, on posteriors that are stored here.
test-arviz1: export PYRO_SUBNET_ARVIZ = 1
test-arviz1: $(DEV) $(ARVIZ1)/.stamp  ## Test the export, its page and its tutorial with ArviZ 1.x
	PYTHONPATH=$(ARVIZ1_FIRST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) \
		--dist loadfile -k "not (no_tensor or predictive_draws or hierarchical_prior)" \
		tests/export tests/docs/test_docs.py::test_arviz
	PYTHONPATH=$(ARVIZ1_FIRST) OMP_NUM_THREADS=1 $(BIN)/python tutorials/run.py --smoke \
		5-arviz-workflow
	rm -rf $(ARVIZ1_STORED) && mkdir $(ARVIZ1_STORED)
	$(BIN)/python -W ignore -m tests.export.posteriors $(ARVIZ1_STORED)
	PYRO_SUBNET_POSTERIORS=$(ARVIZ1_STORED) $(ARVIZ1)/bin/python -m pytest -q --noconftest \
		-o addopts=--import-mode=importlib -o filterwarnings=error \
		tests/export/test_arviz_workflows.py

tutorials: $(DEV)  ## Run the notebooks with fewer steps and draws, their claims checked
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/run.py --smoke --workers $(WORKERS)

benchmark: $(DEV)  ## Measure the curvature engine beside laplace-torch (an hour or two)
	$(BIN)/python -m benchmarks.engine

# From an empty folder, so that no page of an older build stands in for one that is gone.
docs: $(DOCS)  ## Write the documentation site to build/docs; a warning is an error
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "open build/docs/index.html"

lint: $(DEV)  ## Check style, formatting, types and imports (`make test`: our own conventions)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-cache

format: $(DEV)  ## Rewrite the files in the project's format
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

pre-commit: $(RELEASE)  ## Check style, formatting and types before each commit, from now on
	$(BIN)/python -m pre_commit install

wheel: $(BIN)/python  ## Install the wheel alone, in an environment of its own, and import it
	.ci/wheel "$(BIN)/python"

# From the sdist, as an index builds it, so that a wheel has nothing that is not in there.
dist: $(RELEASE) $(DEV)  ## Write sdist and wheel to dist, and check what an index shows of them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/sdist.py dist/*.tar.gz

# Pins that stand in constraints.txt stay where they can: UPGRADE=--upgrade moves them.
lock: $(RELEASE)  ## Write constraints.txt anew from pyproject.toml
	$(BIN)/uv pip compile --quiet $(UPGRADE) --universal --python-version 3.10 \
		--all-extras --no-annotate --no-emit-package torchvision \
		--output-file constraints.txt pyproject.toml tests/requirements-peers.txt

$(FLOORS)/.stamp: pyproject.toml .ci/floors.py tests/requirements-peers.txt
	$(PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install -q packaging tomli
	$(FLOORS)/bin/python .ci/floors.py "$(TORCH)" > $(FLOORS)/pins.txt
	$(FLOORS)/bin/python -m pip install -q --no-compile -r $(FLOORS)/pins.txt -e ".[dev,tutorials]"
	$(FLOORS)/bin/python -m pip install -q --no-deps -r tests/requirements-peers.txt
	@touch $@

$(NEWEST)/.stamp: pyproject.toml tests/requirements-peers.txt
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --no-compile "$(or $(TORCH),torch)" -e ".[dev,tutorials]"
	$(NEWEST)/bin/python -m pip install -q --no-deps -r tests/requirements-peers.txt
	@touch $@

clean:  ## Remove what building and testing left behind (the environment stays)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyro_subnet tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv "$(VENV)"

# The one target that newcomers call: pip says what it fetches, and how far it is.
$(TUTORIALS): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV), once: torch, Pyro, matplotlib, scikit-learn and this package"
	$(PIP) install --no-compile -c constraints.txt -e ".[tutorials]"
	@touch $@

# The reference imports every module, so what they import is needed, too.
$(DOCS): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e ".[docs,arviz,botorch,tutorials]"
	@touch $@

# The constraints but for ArviZ, of which they name the older one.
$(ARVIZ1)/.stamp: constraints.txt tests/requirements-arviz1.txt | $(BIN)/python
	@python="$(ARVIZ1_PYTHON)"; test -n "$$python" || python=$$(.ci/find-python 3.12 3.13) \
		&& "$$python" -m venv --clear $(ARVIZ1)
	grep -v '^arviz==' constraints.txt >$(ARVIZ1)/constraints.txt
	$(ARVIZ1)/bin/python -m pip install -q --no-compile -c $(ARVIZ1)/constraints.txt \
		-r tests/requirements-arviz1.txt h5netcdf h5py matplotlib pytest
	$(BIN)/python -m pip install -q --no-compile --no-deps --ignore-requires-python \
		--target $(ARVIZ1_FIRST) -r tests/requirements-arviz1.txt
	@touch $@

$(DEV): pyproject.toml constraints.txt tests/requirements-peers.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e ".[dev,notebooks,tutorials]"
	$(INSTALL) --no-deps -r tests/requirements-peers.txt
	@touch $(TUTORIALS) $@

$(RELEASE): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e ".[release]"
	@touch $@
