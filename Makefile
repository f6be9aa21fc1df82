# Every target builds what it needs: an environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
COMPAT := .venv-compat
BIN := $(VENV)/bin
PIP := -m pip install --disable-pip-version-check --quiet

# The models of the tests are tiny, too small for threads to help: two processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
BENCHMARKS = $(patsubst %.py,%,$(notdir $(shell grep -ls '__name__ == "__main__"' benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-compat lint docs bench clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo ## Train a tiny model, grow it, verify it, train on (about three minutes)
	$(BIN)/python -m examples.demo

test: $(VENV)/.installed-test ## Run the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-test test-compat ## Run every test, more examples, and the oldest transformers
	GROWKIT_NO_SKIP=1 HYPOTHESIS_PROFILE=nightly $(PYTEST)

test-compat: $(COMPAT)/.installed-test ## Run the adapters' tests with the oldest supported transformers
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m pytest -n 2 --dist worksteal tests/adapters --ignore tests/adapters/onnx -m "not real and not slow"

lint: $(VENV)/.installed-lint ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs ## Build the documentation into docs/_build; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

bench: $(VENV)/.installed-demo ## Run every benchmark in its quick form
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; done
	@echo "One benchmark, whole: $(BIN)/python -m benchmarks.NAME [--json FILE], NAME one of: $(or $(BENCHMARKS),(none yet))"

clean: ## Remove the environments and everything that was built
	rm -rf $(VENV) $(COMPAT) build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned: an open range would take the newest one with its several GB of CUDA packages.
$(VENV)/.torch: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.installed-%: $(VENV)/.torch
	$(BIN)/python $(PIP) -c constraints.txt -e '.[all,$*]'
	$(BIN)/python $(PIP) --no-deps "$$(grep '^timm==' constraints.txt)"  # without torchvision: the tests say why
	@touch $@

# constraints-compat.txt holds only what differs: the oldest transformers and what it needs.
$(COMPAT)/.installed-test: pyproject.toml constraints.txt constraints-compat.txt
	$(PYTHON) -m venv $(COMPAT)
	awk -F '==' '/^[A-Za-z]/ && !seen[tolower($$1)]++' constraints-compat.txt constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python $(PIP) -c $(COMPAT)/constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(COMPAT)/bin/python $(PIP) -c $(COMPAT)/constraints.txt -e '.[torch,test]'
	@touch $@

# Stamps are kept although make sees them as intermediate files.
.SECONDARY: $(VENV)/.torch
