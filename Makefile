# Each target does its own set-up in a virtual environment; PYTHON and VENV may be given, and ARGS for the program it runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 10

.PHONY: demo test test-all test-oldest coverage surface figures lint audit docs clean

demo: $(VENV)/imagenet.installed  ## attack two models on 20 images each, print the tables and write the reports to DEMO
	$(BIN)/orthattack eval --model efficientnet-lite0 --data imagenet-samples --eps 0.25/255 4/255 \
	  --attacks PGD OrthoPGD --steps 3 --no-checks --out $(DEMO)/imagenet $(ARGS)
	$(BIN)/orthattack eval --model cifar10-robust --out $(DEMO)/cifar10 $(ARGS)

test: $(VENV)/test.installed  ## the fast lane: every promise at least once, in at most five minutes on two cores
	$(PYTEST) $(ARGS)

test-all: $(VENV)/all.installed  ## all tests, those of the extras too
	$(PYTEST) --runslow $(ARGS)

test-oldest:  ## the fast lane with the oldest releases that pyproject.toml allows, on PYTHON=python3.10, say
	mkdir -p build
	sed -n 's/^    "\([a-z0-9-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml >build/oldest.txt
	echo 'pyparsing<3.3' >>build/oldest.txt  # newer ones warn of how the oldest matplotlib calls them
	PIP_CONSTRAINT=$(CURDIR)/build/oldest.txt $(MAKE) test VENV=$(VENV)-oldest

coverage: $(VENV)/dev.installed  ## which lines the fast lane runs
	$(PYTEST) --cov --cov-report term:skip-covered $(ARGS)

surface: $(VENV)/test.installed  ## write down the public names and signatures that a test compares
	$(BIN)/python -m tests.test_surface

figures: $(VENV)/dev.installed  ## draw who imports whom, for docs/architecture.md
	$(BIN)/python -m scripts.draw_imports

lint: $(VENV)/dev.installed  ## formatting, lint, types, imports and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

audit: $(VENV)/imagenet.installed  ## compare what is installed with the advisories of PyPI, which must be reachable
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[^ ;]*//' > $(VENV)/installed.txt
	$(BIN)/python -m pip_audit --strict --no-deps --disable-pip -r $(VENV)/installed.txt $(ARGS)

docs: $(VENV)/docs.installed  ## the documentation as a site, build/site/index.html
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/site $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-oldest build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "orthattack needs Python 3.10 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/%.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

# torchattacks by itself, as it asks for a release of requests that Sphinx refuses; not robustbench, which asks for timm 1.0.9.
$(VENV)/all.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs,ray,timm,study,imagenet,hf,tensorboard]"
	$(BIN)/python -m pip install --quiet --no-deps "torchattacks>=3.5"
	@touch $@
