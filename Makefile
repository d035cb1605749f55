# Two commands are enough: `make demo` and `make test`. Both make their own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-long lint format clean
.DEFAULT_GOAL := demo

# torch first and alone, so that nothing else decides which build it is. On Linux the build of the package index brings
# gigabytes of GPU libraries; make TORCH_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" does without.
TORCH_FLAGS ?=
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_FLAGS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/refine-control demo

test: .venv/ready
	$(BIN)/python -m pytest -n auto

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# Kills and bad inputs by the thousand. Each test keeps its counts when it ends, so that they may be run one by one: -k.
test-long: .venv/ready
	$(BIN)/python -m pytest -m long
	cat results/reliability.json

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache
