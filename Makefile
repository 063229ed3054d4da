# Needs Python >= 3.10, pip and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
# Where the tests look for the object store, unless BEIT_SWIFT_PYTHON names a Python (tests/support/object_store.py).
SWIFT_VENV := .venv-swift
PIP_ARGS ?=
PYTEST_ARGS ?=
# Test processes; tests that start ranks of their own do so one after another (tests/conftest.py).
TEST_PROCESSES ?= 2
DEMO ?= demo
DEMO_ARGS ?=

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test servers soak lint format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) DEMO=$(DEMO) PYTEST_ARGS='-k masks' DEMO_ARGS=--fast"

demo: $(VENV)/.installed ## from generated images to pictures of what the model learnt (2 to 5 minutes, 2 cores)
	$(BIN)/python tools/demo.py --out $(DEMO) $(DEMO_ARGS)

test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed-test ## all tests; those that need a server skip with the reason
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

servers: $(SWIFT_VENV)/.installed ## an object store (OpenStack Swift) for the tests, in .venv-swift; names what else they want
	@for wanted in memcached promtool:prometheus srun:slurm-wlm munge; do \
	  command -v $${wanted%:*} >/dev/null || echo "still missing, from Debian: apt-get install $${wanted#*:}" >&2; \
	done

soak: export BEIT_KILLS ?= 100
soak: export BEIT_STREAM_EXAMPLES ?= 100
soak: export OMP_NUM_THREADS ?= 1
soak: $(VENV)/.installed-test ## a run killed BEIT_KILLS=100 times with -9 must end as if it never was (an hour or so)
	$(BIN)/python -m pytest tests/data/test_stream_properties.py tests/engine/test_kills.py $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environments, the demo and the caches
	rm -rf $(VENV) $(SWIFT_VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of dependencies: nothing is installed again until what it depends on changes.
# timm and DALL-E, peers in the tests, come without their torchvision: one built for CUDA does not load beside torch for
# the CPU, and keeps transformers from loading too.
$(VENV)/.installed: EXTRAS =
$(VENV)/.installed-test: EXTRAS = [test]
$(VENV)/.installed-dev: EXTRAS = [dev]
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.$(EXTRAS)'
	$(if $(EXTRAS),$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --no-deps timm DALL-E)
	@touch $@

$(SWIFT_VENV)/.installed: tests/support/swift.txt | $(SWIFT_VENV)/bin/pip
	$(SWIFT_VENV)/bin/python -m pip install $(PIP_ARGS) -r $<
	@touch $@

# Debian and Ubuntu leave ensurepip to a package of its own; virtualenv, or the pip outside, does as well.
%/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is missing or older than 3.10; give another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "creating $* with venv"; $(PYTHON) -m venv $*; \
	elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then \
	  echo "creating $* with virtualenv"; $(PYTHON) -m virtualenv --quiet $*; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -m venv --without-pip $* \
	  && $(PYTHON) -m pip --quiet --python $*/bin/python install pip setuptools; then \
	  echo "created $* with venv and the pip of $(PYTHON)"; \
	else \
	  echo "error: $(PYTHON) can make no virtual environment; install ensurepip, e.g. apt-get install python3-venv" >&2; \
	  exit 1; \
	fi
