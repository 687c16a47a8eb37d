# Every target makes and uses .venv; `make install` alone sets it up.
PYTHON ?= python3
BIN := .venv/bin
# With BIN=... another Python's folder is taken as it is: make test-gpu BIN=/usr/local/bin

# The files with tests marked gpu; a test keeps this list whole.
GPU_TESTS := \
	tests/unit/test_blur.py \
	tests/unit/test_gsplat_alpha.py \
	tests/unit/test_kernels.py \
	tests/unit/test_tile_step.py \
	tests/unit/test_triton.py

# One process more than there are cores, since tests with Ray wait much (tests/groups.py).
PROCESSES := --numprocesses $(shell $(PYTHON) -c 'import os; print(1 + os.cpu_count())')

.DEFAULT_GOAL := help
.PHONY: help install fmt check test test-unit test-integration test-slow test-gpu bench demo docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

install: $(if $(filter .venv/bin,$(BIN)),.venv/installed)  ## set up .venv with the pinned versions

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# The Triton of torch 2.11, beside the pinned one: the kernels' machine code is checked with both.
.venv/triton-3.6.0: .venv/installed
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ 'triton==3.6.0; platform_system == "Linux"'
	mkdir -p $@ && touch $@

fmt: install  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: install  ## lint, format and types, without changing anything
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: install .venv/triton-3.6.0  ## all tests that need neither a GPU nor many minutes
	$(BIN)/pytest -m "not slow and not gpu" $(PROCESSES)

test-unit: install .venv/triton-3.6.0  ## the fast tests only
	$(BIN)/pytest -m "not integration and not slow and not gpu" $(PROCESSES)

test-integration: install  ## the tests that start other processes, servers and Ray
	$(BIN)/pytest -m "integration and not slow and not gpu" $(PROCESSES) tests/integration

test-slow: install .venv/triton-3.6.0  ## everything, also what takes minutes
	$(BIN)/pytest -m "not gpu"

test-gpu: install  ## the tests that need a CUDA device; fails where there is none
	@$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("no CUDA device: no test of a GPU can run here")'
	$(BIN)/python -m pytest -m gpu $(GPU_TESTS)

bench: install  ## the three main benchmarks; results under benchmarks/results (about 30 minutes)
	$(BIN)/python -m benchmarks.cpu_kernel
	$(BIN)/python -m benchmarks.fit_quality
	$(BIN)/python -m benchmarks.convert_job

demo: install  ## convert real photographs end to end and write a report
	$(BIN)/python -m jobs.demo demo

docs: install  ## write docs/options.md anew, from the options and configurations; run the notebook
	$(BIN)/python docs/make_options.py
	$(BIN)/python docs/run_notebook.py docs/notebooks/first_look.ipynb

clean:  ## remove what demo and tests leave (not .venv)
	rm -rf demo .pytest_cache .ruff_cache .hypothesis build *.egg-info
