# Everything happens in .venv; `make run` and `make test` install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt

.PHONY: run test check bench clean

run: $(VENV)/.run
	$(BIN)/workbench run

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(VENV)/.test
	$(BIN)/python benchmarks/attribution.py

$(VENV)/.run: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable . --constraint $(CONSTRAINTS)
	touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint $(CONSTRAINTS)
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
