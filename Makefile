# Everything a developer or a newcomer runs. Each target first sets up what it needs in $(VENV).

PYTHON ?= python3
VENV ?= .venv
DEVICE ?=
DEMO_STEPS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
TEST_PROCESSES ?= 2

PY := $(VENV)/bin/python
# torch comes first and is a constraint of everything else, so that no other requirement brings in another build of it.
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements/torch.txt
# What each process runs is decided in tests/conftest.py. Tests start hundreds of processes, each of which would compile
# all modules where the environment tells Python to write no bytecode.
PYTEST := PYTHONDONTWRITEBYTECODE= $(PY) -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadscope --no-loadscope-reorder
DOC := doc/_build/html

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all faults test-gpu check bench-profile docs clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: $(VENV)/.installed-runtime ## Train a small model on this machine: DEMO_STEPS=200 DEVICE=cpu
	$(PY) tools/demo_corpus.py --out data/demo
	$(PY) tools/demo.py $(if $(DEMO_STEPS),--steps $(DEMO_STEPS)) $(if $(DEVICE),--device $(DEVICE))

test: $(VENV)/.installed-test ## Run the tests: PYTEST_ARGS="-k pool -x"
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test ## Run the tests and their widest sweeps
	$(PYTEST) --wide $(PYTEST_ARGS)
	@echo "commit $$(git rev-parse --short HEAD): note it and the line above in doc/testing.md"

faults: $(VENV)/.installed-test ## Inject every fault of doc/testing.md, and print how many were survived
	$(PYTEST) -m fault --wide $(PYTEST_ARGS)
	@echo "commit $$(git rev-parse --short HEAD): note it and the lines above in doc/testing.md"

test-gpu: $(VENV)/.installed-test ## Test on a CUDA device, in 10 minutes, and print a table
	$(PY) -m pytest -m gpu tests/gpu --session-timeout=600 $(PYTEST_ARGS)

check: $(VENV)/.installed-test ## Lint, formatting, types, layers, spelling
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

bench-profile: $(VENV)/.installed-runtime ## Show where a step's time goes: BENCH_ARGS="--dtype bfloat16 --threads 1"
	$(PY) -m bench.profile $(BENCH_ARGS)

docs: $(VENV)/.installed-docs ## Build the documentation into doc/_build/html
	$(PY) -m sphinx -W --keep-going -q doc $(DOC)
	@echo "$(DOC)/index.html"

clean: ## Remove what was built, but not $(VENV), data and runs
	rm -rf build dist *.egg-info doc/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find internlm tests tools -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-torch: requirements/torch.txt pyproject.toml | $(PY)
	$(INSTALL) -r requirements/torch.txt "$$(sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml)"
	@touch $@

$(VENV)/.installed-runtime: $(VENV)/.installed-torch requirements/runtime.txt setup.py
	$(INSTALL) -r requirements/runtime.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-test $(VENV)/.installed-docs: $(VENV)/.installed-%: requirements/%.txt $(VENV)/.installed-runtime
	$(INSTALL) -r $<
	@touch $@
