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

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart setup test slow-test test-arviz1 tutorials benchmark docs lint format \
	clean

help:  ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) WORKERS=$(WORKERS)"

quickstart: $(TUTORIALS)  ## Train, fit and compare on handwritten digits (two minutes)
	$(BIN)/python tutorials/quickstart.py

setup: $(DEV)  ## Make the virtual environment that tests and checks need

# One thread a worker: the tests' networks are small, and two tests at once are faster.
test: $(DEV)  ## Run the tests, the docstrings' examples among them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

slow-test: $(DEV)  ## Run the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

# What takes long and asks nothing of ArviZ is left to `make test`.
# Twice: with torch, on the usual Python; and on one that ArviZ 1.x says it is for, without
# torch, whose CPU build is not to be had everywhere, on posteriors that are stored here.
test-arviz1: export PYRO_SUBNET_ARVIZ = 1
test-arviz1: $(DEV) $(ARVIZ1)/.stamp  ## Test the export, its page and its tutorial with ArviZ 1.x
	PYTHONPATH=$(ARVIZ1_FIRST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) \
		--dist loadfile -k "not (no_tensor or predictive_draws or hierarchical_prior)" \
		tests/export tests/plotting tests/docs/test_docs.py::test_arviz
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

lint: $(DEV)  ## Check style, formatting and types (`make test`: our own conventions)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(DEV)  ## Rewrite the files in the project's format
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

clean:  ## Remove what building and testing left behind (the environment stays)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyro_subnet tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv "$(VENV)"

$(TUTORIALS): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e ".[tutorials]"
	@touch $@

# The reference imports every module, so what they import is needed, too.
$(DOCS): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e ".[docs,arviz,tutorials]"
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
