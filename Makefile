# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set up .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.autotp-installed
SHARED_OUT := -n auto --dist loadfile# one worker per core; a file's tests share what they prepare
SHORT  := step_time two_hosts accuracy compile_time grid_choice python_cost published memory scaling# each with --all for its full size; the others answer questions of their own
CODE   := autotp passes cost_model tests benchmarks
TYPES  := build/types# the three folders as mypy must see them, under one import name

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  ?= 1

.PHONY: setup demo test test-all models bench lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "autotp needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test,lint]'
	@touch $@

demo: setup
	$(BIN)/autotp demo

test: setup
	$(BIN)/python -m pytest $(SHARED_OUT) -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

models: setup
	$(BIN)/python -m tests.zoo.table

bench: setup
	@set -e; for script in $(SHORT); do \
	  echo "== benchmarks/$$script.py"; $(BIN)/python "benchmarks/$$script.py"; done

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/autotp
	@ln -s "$(CURDIR)"/autotp/*.py "$(CURDIR)"/passes "$(CURDIR)"/cost_model $(TYPES)/autotp
	cd $(TYPES) && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" \
	  --cache-dir "$(CURDIR)/.mypy_cache"

format: setup
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
