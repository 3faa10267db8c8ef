# Set-up, demo and tests. Each target makes .venv on first use and costs nothing the second time.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP) out/digits/model.safetensors
	$(BIN)/equipoise tune module:examples.digits.model:build \
	  --weights out/digits/model.safetensors --data digits --target cpu --metric accuracy \
	  --max-drop 0.01 --threads 1 --prune 2 --prune-epochs 6 --prune-rate 0.001 --trials 14 \
	  -o out/digits

out/digits/model.safetensors: examples/digits/model.py examples/digits/train.py | $(STAMP)
	$(BIN)/python -m examples.digits.train --output $@

test: $(STAMP)
	scripts/test

test-all: $(STAMP)
	scripts/test --all

check: $(STAMP)
	scripts/check

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
