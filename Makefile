# Everything a contributor runs. PYTHON is the interpreter that makes the virtual environments.
PYTHON ?= python3

.PHONY: install lint lint-style test test-min bench gpu clean

install:  ## into the current environment, with all development tools
	pip install -e '.[test,dev]' -c constraints.txt

lint: lint-style  ## the same as CI and pre-commit
	mypy

lint-style:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

test:
	pytest -n auto

test-min:  ## the tests on the oldest supported torch, in a virtual environment of its own
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/pip install -q -e '.[test]' -c constraints-min.txt
	.venv-min/bin/python -m pytest -n auto

bench:
	fastres bench resnet50

gpu:  ## the run-book, docs/gpu.md; make gpu ARGS=--dry-run needs no GPU
	python -m bench.gpu $(ARGS)

clean:
	rm -rf build dist *.egg-info .venv-min fastres/_C*.so fastres/_build_info.json
