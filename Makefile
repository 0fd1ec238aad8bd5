# The two commands: `make train` and `make test`. Both set everything up first: .venv, pinned packages, native code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
JOBS ?= 2

.PHONY: train test lint unit clean help
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "nvfp4 needs Python >= 3.10, $(PYTHON) is older; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: with it in place no other package can pull in another build of it
$(READY): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,dev]'
	@touch $@

train: $(READY) ## pretrain a small model on real text in BF16 and in NVFP4, side by side
	$(BIN)/nvfp4 compare $(ARGS)

test: lint unit ## style, types and all tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 10 $(ARGS)

clean: ## remove everything that make made
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name '__pycache__' -prune -exec rm -rf {} + ; rm -f nvfp4/*.so
