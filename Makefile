# Copyright 2026 the traceops authors.
# SPDX-License-Identifier: Apache-2.0
#
# Each target makes the virtual environment it needs. Variables:
#   PYTHON=python3.12   another interpreter (each version has an environment of its own)
#   ARGS='...'          options passed on to the demo, the examples, the benchmark or pytest
#   WORKERS=2           processes that share the tests

PYTHON ?=
WORKERS ?= auto
ARGS ?=

# The interpreter is looked for once, and only by the targets that need it.
INTERPRETER = $(eval INTERPRETER := $$(shell tools/find-python $(PYTHON)))$(or \
	$(INTERPRETER),$(error no Python to work with; name one, as in make PYTHON=python3.12))
VERSION = $(eval VERSION := $$(shell $(INTERPRETER) -c \
	'import sys; print("%d.%d" % sys.version_info[:2])'))$(VERSION)
VENV = .venv-$(VERSION)
BIN = $(VENV)/bin
GPUFREE = .venv-gpufree
SHARED = -n $(WORKERS) --maxprocesses 4 --dist worksteal
PYTEST = $(BIN)/pytest $(SHARED)

.PHONY: help demo examples test test-all test-gpufree test-gpufree-quick gpu-programs \
	gpufree-venv lint bench docs build clean venv

help:
	@echo 'make demo      train a spiking network online on handwritten digits'
	@echo 'make examples  four worked examples: training loops, a connectome, many devices'
	@echo 'make test      the test suite'
	@echo 'make test-all  the same with every net x rule x mode (up to an hour on two cores)'
	@echo 'make test-gpufree  GPU kernels and programs, proved on a machine without a GPU'
	@echo 'make gpu-programs  what training costs as a GPU program, without a GPU'
	@echo 'make lint      ruff and mypy'
	@echo 'make bench     upstream, traceops, BPTT and simulation in one run'
	@echo 'make docs      the documentation, in out/docs/; its tutorial runs'
	@echo 'make build     sdist and wheel, in dist/'
	@echo 'make clean     remove what the others made, environments too'
	@echo "Variables: PYTHON=python3.12  ARGS='-k window'  WORKERS=2"

demo: venv
	$(BIN)/traceops demo $(ARGS)

examples: venv
	$(BIN)/python examples/evidence.py $(ARGS)
	$(BIN)/python examples/copying.py $(ARGS)
	$(BIN)/python examples/fly_brain.py --neurons 2000 $(ARGS)
	$(BIN)/python examples/many_devices.py $(ARGS)

test: venv
	$(PYTEST) $(ARGS)

test-all: venv
	$(PYTEST) -m '' $(ARGS)

# Two runs: one in which Triton is interpreted, one in which it compiles. Both are made, and the
# exit status says whether both passed (5: ARGS selects none of its tests). Quick leaves out what
# is marked slow.
test-gpufree-quick: MARKS = not slow
test-gpufree test-gpufree-quick: gpufree-venv
	@. $(GPUFREE)/env; failed=0; run() { \
		env "$$@" || [ $$? = 5 ] || failed=1; }; \
	pytest="$(GPUFREE)/bin/python -m pytest $(SHARED)"; \
	run JAX_PLATFORMS=cpu TRITON_INTERPRET=1 $$pytest -m '$(MARKS)' \
		tests/gpufree/test_interpreter.py $(ARGS); \
	run JAX_PLATFORMS=cpu,cuda $$pytest -m '$(MARKS)' tests/gpufree/test_training.py \
		tests/gpufree/test_programs.py tests/gpufree/test_resources.py \
		tests/ops/test_traps.py $(ARGS); \
	exit $$failed

gpu-programs: gpufree-venv
	. $(GPUFREE)/env; JAX_PLATFORMS=cpu,cuda $(GPUFREE)/bin/traceops programs $(ARGS)

gpufree-venv:
	@tools/make-gpufree-venv "$(or $(shell tools/find-python $(or $(PYTHON),python3.12)),$(INTERPRETER))" $(GPUFREE)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: venv
	$(BIN)/traceops bench $(ARGS)

# A warning is an error. What Sphinx needs is added to the environment at the first use.
docs: venv
	@$(BIN)/python -c 'import furo, myst_nb' 2> /dev/null || $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --editable '.[docs]'
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs

build: venv
	$(BIN)/python -m build

venv:
	@tools/make-venv "$(INTERPRETER)" "$(VENV)"

clean:
	rm -rf .venv-* build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
