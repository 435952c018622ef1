# One virtual environment, two layers: .venv/.serving (no torch: worker, reports, demo)
# and .venv/.everything (training, tests, checks) on top of it. See docs/adr/0009.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PACKAGES := rlv3 shadow worker
SOURCES := $(PACKAGES) tests bench
ARGS ?=
JOBS ?= 3

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-store test test-system test-acl check lint type format bench bench-report recorder chaos trims fuzz calibrate policy clean

help:    ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.everything  ## install everything into .venv (the targets below do it when needed)

demo: .venv/.serving      ## run the whole product for a minute on a private Redis, then report
	@$(BIN)/rlv3-worker demo $(ARGS)

demo-store: .venv/.serving ## thirty simulated days of five symbols into out/demo-store, and their report
	@$(BIN)/python -m shadow.demo_store $(ARGS)

test: .venv/.everything   ## run the test suite, JOBS=3 tests at a time
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-system: .venv/.system ## the tests that need systemd, Sentinel, Prometheus and Chromium
	@tests/system/tools.sh
	@$(BIN)/python -m pytest tests/system $(ARGS)

test-acl: .venv/.everything ## the worker's tests again, as the users of deploy/redis/users.acl
	@RLV3_TEST_ACL=1 $(BIN)/python -m pytest -n $(JOBS) tests/worker $(ARGS)

check: lint type          ## lint, formatting and types

lint: .venv/.everything   ## ruff: rules and formatting
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

type: .venv/.everything   ## mypy, strict on the three packages
	@$(BIN)/mypy

format: .venv/.everything ## let ruff decide the layout and fix what it can
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: .venv/.serving     ## measure the worker: events per second, latency, what the bus notices, recovery
	@$(BIN)/python bench/bench_worker.py $(ARGS)

bench-report: .venv/.serving ## measure the report on a million and on ten million paired decisions
	@$(BIN)/python bench/bench_report.py $(ARGS)

recorder: .venv/.everything ## measure recorder and audit: rate, memory, disk
	@$(BIN)/python -m bench.bench_record $(ARGS)

SEEDS ?= 20
chaos: .venv/.everything  ## play every fault against the worker: SEEDS=200, goes on where it was stopped
	@$(BIN)/python -m tests.chaos.run --seeds $(SEEDS) $(ARGS)

calibrate: .venv/.everything ## measure how often verdicts are wrong, and how often an edge is found
	@$(BIN)/python -m tests.calibration.run $(ARGS)
	@$(BIN)/python -m tests.calibration.lookahead
	@$(BIN)/python -m tests.calibration.pairing

trims: .venv/.everything  ## 100 trimming scenarios on Redis >= 7: is the reported loss the true one?
	@$(BIN)/python -m tests.chaos.trims $(ARGS)

INPUTS ?= 100000
fuzz: .venv/.everything   ## decode INPUTS drawn entries; none may raise
	@$(BIN)/python -m tests.shadow.fuzz_codec $(INPUTS)

policy: .venv/.everything ## train the shipped policy and RL v2's reference tables again
	@$(BIN)/python -m rlv3.build_policy
	@$(BIN)/python -m shadow.rl_v2_train

clean:   ## remove the environment, caches and output
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist out *.egg-info

.venv/.serving: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); name another: make PYTHON=..."; exit 2; }
	@echo "installing into .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[embedded,api]'
	@touch $@

.venv/.system: .venv/.everything
	@$(PIP) --no-build-isolation -e '.[system]'
	@touch $@

.venv/.everything: .venv/.serving
	@echo "installing torch and the test tools into .venv (once)"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
