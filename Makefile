# `make` alone explains. Every target sets itself up in .venv; nothing global is touched.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test check lint compile experiments bench ui clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RECIPE ?= phantom
# A CPU-only build of torch saves gigabytes: make TORCH="torch==2.13.0+cpu" PIP_ARGS="--extra-index-url ..." (docs/running.md)
TORCH ?= torch==2.13.0
PIP_ARGS ?=
PYTEST_ARGS ?=
# `make bench` scores these Open-i reports too, where the folder is there.
OPENI ?= ../shared/data/openi

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
INPUTS := pyproject.toml constraints.txt

help: ## Say what the targets do
	@echo "VALOR: a chest X-ray report generator, trained, judged and released as one pipeline."
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Results go to .valor (VALOR_HOME). Another recipe: make demo RECIPE=path/or/name"

demo: $(VENV)/.train ## Run the whole recipe on X-rays that it draws itself; again: reuse what is unchanged
	@$(BIN)/valor run $(RECIPE)

test: $(VENV)/.dev ## Run all tests (about 10 minutes on two slow cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not gpu" $(PYTEST_ARGS)

check: lint ## Before each commit: style, types, import rules and the fast tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m "not slow and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.dev ## Style, types and import rules only
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

experiments: $(VENV)/.train ## Compare the recipe with baselines and ablations over five seeds (hours; continues)
	@$(BIN)/valor experiments

compile: $(VENV)/.base ## Compile the recipe for Kubeflow and Vertex AI into build/ (needs no torch)
	@$(BIN)/valor compile $(RECIPE) --target kfp -o build/$(notdir $(basename $(RECIPE)))-kfp.yaml
	@$(BIN)/valor compile $(RECIPE) --target vertex -o build/$(notdir $(basename $(RECIPE)))-vertex.yaml

bench: $(VENV)/.dev ## Measure speed and memory against stock TRL into docs/benchmarks.md (about 25 minutes; resumes)
	@$(BIN)/python tests/benchmarks/rewards.py $(if $(wildcard $(OPENI)),--openi $(OPENI))
	@$(BIN)/python tests/benchmarks/step.py
	@$(BIN)/python tests/benchmarks/memory.py
	@$(BIN)/python tests/benchmarks/document.py

ui: $(VENV)/.train ## Open MLflow on the runs and models in .valor
	@$(BIN)/valor ui

clean: ## Remove the virtual environment and build output; results in .valor stay
	@rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is missing or older than Python 3.11; give another: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(INPUTS) | $(VENV)/bin/python
	@echo "installing valor into $(VENV) ..."
	@$(PIP) --editable . && touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "installing $(TORCH) into $(VENV) ..."
	@$(PIP) "$(TORCH)" && touch $@

$(VENV)/.train: $(INPUTS) $(VENV)/.torch
	@echo "installing the training libraries into $(VENV) (a few minutes, once) ..."
	@$(PIP) --editable ".[train]" && touch $@

$(VENV)/.dev: $(INPUTS) $(VENV)/.torch
	@echo "installing the training and test libraries into $(VENV) (a few minutes, once) ..."
	@$(PIP) --editable ".[dev]" && touch $@ $(VENV)/.train $(VENV)/.base
