PYTHON ?= python3
VENV ?= .venv
# What is installed into it: all wings by default; one wing with EXTRAS=test-pt, test-tf or test-flax.
EXTRAS ?= dev
CONSTRAINTS ?= --constraint constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRAS)
# Files in the order of tests/conftest.py: the longest first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-pt test-tf test-flax fuzz bench peer lint docs dist dist-check clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Without the tests marked nightly, which repeat checks on further configs and frameworks.
test: lint
	$(PYTEST) -m "not nightly"

test-all: lint
	$(PYTEST)

# One wing and the neutral modules: no test that needs another framework.
test-pt: $(INSTALLED)
	$(PYTEST) -m "not tf and not flax and not nightly"

test-tf: $(INSTALLED)
	$(PYTEST) -m "not pt and not flax and not nightly"

test-flax: $(INSTALLED)
	$(PYTEST) -m "not pt and not tf and not nightly"

# Malformed files of every kind, other ones at each run: make fuzz EXAMPLES=100000 runs for as long as that takes.
EXAMPLES ?= 2000
fuzz: $(INSTALLED)
	FUZZ_EXAMPLES=$(EXAMPLES) $(PYTEST) --dist load tests/test_fuzz.py

# Measure speed and memory on this machine, and write benchmarks/RESULTS.md: make bench FULL=--full measures more, and
# make bench PARTS=training one part alone. PEER_PYTHON names an interpreter with Transformers 4, such as `make peer`
# installs; without it those columns are left out.
PARTS ?= decoding growth quantization training loading
export PEER_PYTHON
bench: $(INSTALLED)
	for part in $(PARTS); do $(BIN)/python benchmarks/$$part.py --write $(FULL) || exit 1; done

# Libraries of those classes, the newest that they run on.
PEERS := transformers==4.57.6 tensorflow-cpu==2.21.0 tf-keras==2.21.0 jax==0.10.2 flax==0.12.8 optax==0.2.8
peer:
	$(PYTHON) -m venv $(VENV)-peer
	$(VENV)-peer/bin/python -m pip install --quiet $(PEERS)
	@echo "make bench PEER_PYTHON=$(VENV)-peer/bin/python"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

dist: $(VENV)/.installed-dist
	rm -rf dist
	$(BIN)/python -m build

# Install the wheel into an empty environment with one extra, and run that wing: make dist-check WING=tf
WING ?= pt
dist-check: dist
	rm -rf build/dist-check
	$(PYTHON) -m venv build/dist-check
	build/dist-check/bin/python -m pip install --quiet $(CONSTRAINTS) "$$(echo dist/*.whl)[$(WING)]"
	build/dist-check/bin/python -P tests/smoke.py $(WING)

$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist site demo-output
