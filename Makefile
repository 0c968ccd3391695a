# Every target builds .venv on first use, with the exact versions of constraints.txt.
.DEFAULT_GOAL := help
.PHONY: run run-hhar test test-fast lint bench bench-cifar bench-overhead bench-full bench-cohort \
	bench-data clean help

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# More for the command, for example: make run ARGS="--set hierarchy.global_rounds=3"
ARGS ?=
# The folder of HHAR's CSV files.
DATA ?= data/hhar

# Each worker takes whole files, which share runs and data.
SIDE_BY_SIDE := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Of the hundreds of lines that pip writes: how many packages it has looked at, and what is last. On a
# terminal that is one line; elsewhere every tenth. What goes wrong is on standard error, in full.
define PROGRESS
{ \
	n=0; failed=0; \
	show() { if [ -t 1 ]; then printf '\r\033[K%s' "$$1"; else printf '%s\n' "$$1"; fi; }; \
	while read -r what name _; do \
		case "$$what $$name" in \
			"pip failed") failed=1 ;; \
			"Collecting "* | "Processing "*) n=$$((n + 1)); \
				if [ -t 1 ] || [ $$((n % 10)) = 0 ]; then show "$$n packages found: $${name##*/}"; fi ;; \
			"Installing collected") show "$$n packages found; installing them" ;; \
			"Successfully installed") show "$$n packages installed"; [ ! -t 1 ] || echo ;; \
		esac; \
	done; \
	exit $$failed; \
}
endef

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

run: $(READY)  ## run the main job on the embedded dataset
	$(BIN)/python -m fedge_sim.orchestrator $(ARGS)

run-hhar: $(READY)  ## the same on HHAR: make run-hhar DATA=folder or .zip (phones only if it has no watches)
	$(BIN)/python -m fedge_sim.orchestrator --set app.config.dataset=hhar \
		--set 'app.config.data-root="$(DATA)"' --set app.config.standardise=client \
		$$(has() { find "$(DATA)" -maxdepth 3 -name "$$1" 2>/dev/null | grep -q .; }; \
			has '*Watch_*.csv' || { has '*.zip' && ! has '*Phones_*.csv'; } || \
			echo --set app.config.use-watches=false) $(ARGS)

test: lint  ## lint, type-check and run all tests, side by side
	$(SIDE_BY_SIDE) $(ARGS)

test-fast: lint  ## the same without the slow tests: for the hand
	$(SIDE_BY_SIDE) -m "not slow" $(ARGS)

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## measure against plain Flower and a bare loop, side by side
	$(BIN)/python scripts/bench.py --workload w1 $(ARGS)

bench-cifar: $(READY)  ## the same with 100 devices of 350 training images
	$(BIN)/python scripts/bench.py --workload cifar $(ARGS)

bench-overhead: $(READY)  ## the same with clients that do nothing: the cost of a round, by clients
	$(BIN)/python scripts/bench.py --workload overhead $(ARGS)

bench-full: $(READY)  ## ours on as many windows as HHAR has: a round, and 100 projected
	$(BIN)/python scripts/bench.py --workload w1-full $(ARGS)

bench-cohort: $(READY)  ## clients a second by how many train together, and a picture of it
	$(BIN)/python scripts/bench.py --workload cohort $(ARGS)

bench-data: $(READY)  ## measure reading HHAR's files, and opening a store
	$(BIN)/python scripts/bench_data.py $(ARGS)

clean:  ## remove the environment and all caches; results are kept
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	@echo "installing about $$(grep -c == constraints.txt) packages into .venv: minutes, and 2.3 GB"
	@{ $(BIN)/pip install --progress-bar off --editable '.[dev]' || echo "pip failed"; } | $(PROGRESS)
	touch $(READY)
