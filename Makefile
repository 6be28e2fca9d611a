# make quickstart   trains a teacher and three born-again generations on embedded digits, prints and plots the result
# make test         runs the linter, the type checker and the tests
# make quick        runs the tests that take seconds
# make matrix       runs the tests on each Python that is supported, and on the oldest versions of packages
# make docs         builds the documentation as a site, and fails for a broken link or an undocumented name
# make soak         runs the long forms of some tests, which take about half an hour
# make compile      compiles large programs for TPUs, and for GPUs where their compiler is, without either: minutes each
# make lint         runs the linter and the type checker alone
# make bench        measures steps, epochs, starts and memory, for an hour or two: make bench ARGS=--rows=wrn_16_1 is less
# make clean        removes the virtual environment (runs and results stay)

PYTHON ?= python3
# How many tests run side by side, file by file: one more than two cores, since some wait for processes that they start.
# 1 is the way to follow one of them.
WORKERS ?= 3
# Each Python has an environment of its own: .venv, and with PYTHON=python3.13 .venv-python3.13.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(subst /,_,$(PYTHON)))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test quick matrix oldest soak compile lint docs bench clean

quickstart: $(INSTALLED)
	$(BIN)/python -m experiments.quickstart $(ARGS)

test: $(INSTALLED) lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak $(ARGS)

compile: $(INSTALLED)
	$(BIN)/python -m pytest -m compiler $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

# The Pythons of .github/workflows/test.yml, one after the other, and the oldest versions that setup.py allows.
matrix:
	$(MAKE) test PYTHON=python3.11
	$(MAKE) test PYTHON=python3.12
	$(MAKE) test PYTHON=python3.13
	$(MAKE) oldest

oldest:
	$(MAKE) quick PYTHON=python3.11 VENV=.venv-oldest CONSTRAINTS=constraints/oldest.txt

quick: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow and not soak and not compiler' $(ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict
	@echo 'open site/index.html'

bench: $(INSTALLED)
	$(BIN)/python experiments/bench.py $(ARGS)

$(INSTALLED): setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-* site
