# Each target sets up what it needs first, in the active environment or in .venv.
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint

help:
	@echo "make setup        install what is missing (dev/setup.sh)"
	@echo "make quickstart   teach a small detector on the built-in data; ARGS=... are passed on"
	@echo "make test         run the tests; ARGS='-k name' runs some of them"
	@echo "make lint         check imports, format and code; dev/lint.sh --fix mends"

setup:
	@dev/setup.sh

quickstart: setup
	dev/python tools/quickstart.py $(ARGS)

# A process per core; the tests of a file share what they build, so they stay in one process.
test: setup
	dev/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

lint: setup
	dev/lint.sh
