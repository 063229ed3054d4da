# Needs Python >= 3.10, pip and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
# Where the tests look for the object store, unless BEIT_SWIFT_PYTHON names a Python (tests/support/object_store.py).
SWIFT_VENV := .venv-swift
PIP_ARGS ?=
PYTEST_ARGS ?=
# Test processes; each has a process of its own from which ranks are forked (tests/support/forked.py).
TEST_PROCESSES ?= 2
DEMO ?= demo
DEMO_ARGS ?=
# Where the study's images lie, where its trials go, and what else tools/evidence.py is told, such as --part 1.
DATA ?= data
EVIDENCE ?= evidence
EVIDENCE_ARGS ?=

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo demo-finetune evidence test cluster-test servers soak lint format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) DEMO=$(DEMO) PYTEST_ARGS='-k masks' DEMO_ARGS=--fast"

demo: $(VENV)/demo.txt ## from generated images to pictures of what the model learnt (3 to 6 minutes, 2 cores)
	$(BIN)/python tools/demo.py --out $(DEMO) $(DEMO_ARGS)

demo-finetune: $(VENV)/demo.txt ## the demo, then classes from 100 labels with and without pre-training (3 minutes more)
	$(BIN)/python tools/demo.py --out $(DEMO) --finetune $(DEMO_ARGS)

evidence: $(VENV)/demo.txt ## the study of docs/results.md on the images in DATA, or the part that EVIDENCE_ARGS names
	$(BIN)/python tools/evidence.py --data $(DATA) --out $(EVIDENCE) $(EVIDENCE_ARGS)

test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/test.txt ## all tests but those of cluster-test; those that need a server skip with the reason
	$(BIN)/python -m pytest -m 'not cluster' -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

cluster-test: export OMP_NUM_THREADS ?= 1
cluster-test: $(VENV)/test.txt ## the long tests with real servers: SLURM with hosts that fail, Prometheus (up to 8 minutes)
	$(BIN)/python -m pytest tests/cluster -m cluster -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

servers: $(SWIFT_VENV)/servers.txt ## an object store (OpenStack Swift) for the tests, in .venv-swift; names what else they want
	@for wanted in memcached promtool:prometheus srun:slurm-wlm munge ip:iproute2 chromium; do \
	  command -v $${wanted%:*} >/dev/null || echo "still missing, from Debian: apt-get install $${wanted#*:}" >&2; \
	done

soak: export BEIT_KILLS ?= 100
soak: export BEIT_STREAM_EXAMPLES ?= 100
soak: export OMP_NUM_THREADS ?= 1
soak: $(VENV)/test.txt ## a run killed BEIT_KILLS=100 times with -9 must end as if it never was (an hour or so)
	$(BIN)/python -m pytest tests/stream/test_stream_properties.py tests/engine/test_kills.py $(PYTEST_ARGS)

lint: $(VENV)/dev.txt ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.txt ## let ruff sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environments, the demo and the caches
	rm -rf $(VENV) $(SWIFT_VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A list of what is installed, written once all that a target needs is there, and again when its prerequisites change.
INSTALL = $(@D)/bin/python -m pip install $(PIP_ARGS)
LIST = $(@D)/bin/python -m pip list >$@
.DELETE_ON_ERROR:

$(VENV)/demo.txt: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -c constraints.txt -e .
	@$(LIST)

# timm and DALL-E, peers in the tests, come without their torchvision: one built for CUDA does not load beside torch for
# the CPU, and keeps transformers from loading too.
$(VENV)/test.txt: $(VENV)/demo.txt
	$(INSTALL) -c constraints.txt -e '.[test]'
	$(INSTALL) -c constraints.txt --no-deps timm DALL-E
	@$(LIST)

$(VENV)/dev.txt: $(VENV)/test.txt
	$(INSTALL) -c constraints.txt -e '.[dev]'
	@$(LIST)

$(SWIFT_VENV)/servers.txt: tests/support/swift.txt | $(SWIFT_VENV)/bin/pip
	$(INSTALL) -r $<
	@$(LIST)

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
