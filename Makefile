# Every target is complete alone: it creates .venv and installs what it needs, once, then runs.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
PYTHON_FLOOR := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
BIN := .venv/bin

# Tests on real data skip with a reason where this is unset.
ifeq ($(origin HF_EHR_TEST_DATA),undefined)
ifneq ($(wildcard ../shared/data),)
export HF_EHR_TEST_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: help quickstart test test-slow check coverage benchmarks docs

help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

quickstart: .venv/.installed-quickstart ## Synthetic patients to a fine-tuned Med-BERT with figures, in quickstart-output/
	$(BIN)/hf-ehr quickstart --output quickstart-output

# One thread a worker: two test processes with two threads each would fight over two cores.
# A file stays with one worker, so that what its tests share is built once.
test: .venv/.installed-dev ## Run the tests that are fast enough for every change
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/.installed-dev ## Run the tests that take longer than ten seconds
	$(BIN)/python -m pytest -m slow

check: .venv/.installed-dev ## Lint, format, types and spelling; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

coverage: .venv/.installed-dev ## Run the tests and list the lines that none of them reaches
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov

benchmarks: .venv/.installed-dev ## Print the paired speed and memory ratios of benchmarks/README.md
	set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# The theme prints news of its makers unless told not to.
docs: .venv/.installed-docs ## Build the documentation into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/.created:
	@command -v $(PYTHON) >/dev/null || { echo "Python $(PYTHON_FLOOR) or newer is needed, and '$(PYTHON)' is not on the PATH. Name one: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c "import sys; floor = tuple(map(int, '$(PYTHON_FLOOR)'.split('.'))); sys.exit(0 if sys.version_info[:2] >= floor else 'Python $(PYTHON_FLOOR) or newer is needed, $(PYTHON) is ' + sys.version.split()[0] + '. Name a newer one: make PYTHON=/path/to/python3 ...')"
	$(PYTHON) -m venv .venv
	@touch $@

# `make quickstart`, `make test` and `make docs` want different extras of the same package: .installed-dev, ….
.venv/.installed-%: pyproject.toml constraints.txt .venv/.created
	$(BIN)/python -m pip install --no-input --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@
