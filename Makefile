# `make train` and `make test` need nothing but Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/train/minimax-tiny.yaml
BIN := $(VENV)/bin
# Installed again whenever what is to be installed changes.
READY := $(VENV)/.ready

.PHONY: train test lint conformance parity benchmarks long-context stream recall clean

train: $(READY)
	$(BIN)/python train.py fit --config $(CONFIG)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/conformance.md, from a run of the whole matrix.
conformance: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/conformance --write-conformance

# docs/families.md and the published sizes in configs/models, from a run of every family beside transformers.
parity: $(READY)
	$(BIN)/python -W ignore -m tests.models.families.document

# Every figure of docs/performance.md on this CPU, and the page. Nothing else should run meanwhile.
benchmarks: $(READY)
	for verb in ops "train --compile" decode length "context --dtype float32" stream report; \
	do $(BIN)/python -m benchmarks $$verb || exit 1; done

# What a long context costs each way to attend: that part of docs/performance.md alone.
long-context: $(READY)
	for verb in "context --dtype float32" report; do $(BIN)/python -m benchmarks $$verb || exit 1; done

# 100,000 tokens one by one: memory stays, logits are finite.
stream: $(READY)
	for verb in stream report; do $(BIN)/python -m benchmarks $$verb || exit 1; done

# docs/blocks/recall.md: trains the models that have no result in benchmarks/results/recall yet.
recall: $(READY)
	$(BIN)/python -m benchmarks.recall

# torch first and alone: with no torch installed, another package's range would pull the CUDA build.
$(READY): pyproject.toml constraints.txt
	@echo "making $(VENV): about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) runs .cache
