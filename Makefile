# `make setup` once, then the others. CI runs the same commands (.ci/run).
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup run test test-slow lint format types docs image

setup: $(BIN)/prunecli

$(BIN)/prunecli: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@

run: setup
	$(BIN)/prunecli compress --recipe quickstart

test: setup
	$(BIN)/pytest -n logical --dist worksteal

test-slow: setup
	$(BIN)/pytest -n logical --dist worksteal -m slow

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m typer prunecli.cli.app utils docs --name prunecli --output docs/cli.md

image:
	docker build -t prunecli .
