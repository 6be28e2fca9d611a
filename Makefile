# make quickstart   trains a teacher and three born-again generations on embedded digits, prints and plots the result
# make test         runs the linter, the type checker and the tests
# make soak         runs the long forms of some tests, which take about half an hour
# make lint         runs the linter and the type checker alone
# make bench        measures steps, epochs, starts and memory, for an hour or two: make bench ARGS=--rows=wrn_16_1 is less
# make clean        removes the virtual environment (runs and results stay)

PYTHON ?= python3
# How many tests run side by side, file by file; 1 is the way to follow one of them.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test soak lint bench clean

quickstart: $(INSTALLED)
	$(BIN)/python -m experiments.quickstart $(ARGS)

test: $(INSTALLED) lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python experiments/bench.py $(ARGS)

$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
