# Each target does its own set-up in a virtual environment; PYTHON and VENV may be given.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint docs clean

demo: $(VENV)/demo.installed  ## attack the bundled models on 20 photographs and print the table
	$(BIN)/orthattack eval $(ARGS)

test: $(VENV)/test.installed  ## run all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev.installed  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/docs.installed  ## the documentation as a site, build/site/index.html
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/site $(ARGS)

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "orthattack needs Python 3.10 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/demo.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/%.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
