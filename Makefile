# Creates .venv, installs the package into it, runs. The plain pip lines stand in README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src -type f ! -name '*.so' ! -name '*.pyc' 2>/dev/null)

.PHONY: demo test test-all lint clean

demo: $(VENV)/.installed
	$(BIN)/kinesplat demo --out demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.created:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Kinesplat needs Python 3.11 or newer; call make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml CMakeLists.txt $(SOURCES)
	$(BIN)/pip install .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml CMakeLists.txt $(SOURCES)
	$(BIN)/pip install ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build demo
