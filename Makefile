# `make quickstart` trains and serves; `make test` proves it. Both make .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test check bench bench-training bench-serving chaos clean constraints k8s-golden

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Tandem needs Python 3.11: install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/tandem quickstart

test: install
	$(BIN)/pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pip check

bench: bench-training bench-serving

bench-training: install
	$(BIN)/python -m tests.bench.training

bench-serving: install
	$(BIN)/python -m tests.bench.serving
	$(BIN)/python -m tests.bench.batching
	$(BIN)/python -m tests.bench.rollout
	$(BIN)/python -m tests.bench.replicas
	$(BIN)/python -m tests.bench.scaling

chaos: install
	$(BIN)/pytest tests/chaos tests/integration/test_training.py --timeout 3600 -m chaos

# Writes what is rendered in k8s/base and k8s/components anew, and the goldens of every overlay.
k8s-golden: install
	$(BIN)/python -m tests.golden_k8s

# Pins what is installed now, after a deliberate upgrade in pyproject.toml.
constraints: install
	$(BIN)/python -m pip freeze --exclude-editable --exclude tandem-ray | sed "s,+cpu$$,," > constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
