# Each target sets up what it needs first, in the active environment or in .venv.
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast lint

help:
	@echo "make setup        install what is missing (dev/setup.sh)"
	@echo "make quickstart   teach a small detector on the built-in data; ARGS=... are passed on"
	@echo "make test         run the tests; ARGS='-k name' runs some of them"
	@echo "make test-fast    those of heads and what they are made of; the same ARGS"
	@echo "make lint         check imports, format and code; dev/lint.sh --fix mends"

setup:
	@dev/setup.sh

quickstart: setup
	dev/python tools/quickstart.py $(ARGS)

# A process per core; the tests of a file share what they build, so they stay in one process. In
# the order of their names: by their number of tests, a file with a single long one would come last.
PYTEST = dev/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) $(ARGS)

# What a loss is made of, and its config.
FAST = config heads layers pairing views test_schedule.py
test-fast: setup
	$(PYTEST) $(FAST:%=tests/%) -m "not process and not fuzz" $(ARGS)

lint: setup
	dev/lint.sh
