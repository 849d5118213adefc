PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test coverage lint bench tables

setup: .venv/current  ## make .venv with the tested versions; nothing to do when it is current

.venv/current: requirements.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

demo: setup  ## few images from a teacher, then both recipes; DEMO="--full", DEMO="--task RTE --data_dir glue/RTE"
	$(BIN)/python scripts/demo.py $(DEMO)

# a test's programs find the packages compiled, also where the environment says to compile in memory alone
test coverage: export PYTHONDONTWRITEBYTECODE =

test: setup  ## all tests, two at a time
	$(BIN)/python -m pytest -n 2

coverage: setup  ## the share of lines that the tests run
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term

lint: setup  ## style of all Python files, types of the method
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict dskd

bench: setup  ## cost of DSKD beside its rivals; writes results/benchmark
	$(BIN)/python scripts/benchmark.py all

TABLE ?= glue_short
tables: setup  ## a table; TABLE="glue_short --smoke --set data=data/glue" for seconds (docs/tables.md)
	$(BIN)/python scripts/reproduce.py $(TABLE)
