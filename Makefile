# Two commands are enough: `make demo` and `make test`. Both make their own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint format clean
.DEFAULT_GOAL := demo

# torch first and alone: asked for together with others, it would bring gigabytes of GPU libraries on Linux.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/refine-control demo

test: .venv/ready
	$(BIN)/python -m pytest -n auto

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache
