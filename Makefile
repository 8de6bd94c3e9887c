# make demo: from nothing to a trained and evaluated classifier.   make test: set up and run the fast tests.
# make test-all: all tests that need no GPU.   make test-nightly: those that are too long for CI.
# make check: ruff, mypy --strict, import-linter, rules of layout, make docs.   make docs: the documentation site in site/.   make clean: remove what these made.
# make gpu-check: check training on an NVIDIA card in under ten minutes.   make gpu-bundle: a folder with all that it needs elsewhere.
# make bench: install other loaders into environments of their own, and measure them and ours.   BENCH='--real DIR' gives options.

VENV ?= .venv
BIN := $(VENV)/bin
# The first Python of 3.11 or later on this machine; or say: make PYTHON=/path/to/python3 ...
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# Python compiles what it imports when it imports it; pip would compile all of what it installs, which takes a minute.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt

DEMO_GALAXIES ?= 3000
DEMO_SEED ?= 0
# A data root of the demo's own: what it finds there of an older version it replaces, and nobody else's data is near.
DEMO_DATA ?= $(CURDIR)/data
DEMO_ENV := GALAXYDIST_DATA="$(DEMO_DATA)"

TEST_WORKERS ?= 2
# Each worker keeps to one core: two that take both each are slower than one. Neighbouring tests share fixtures, so they stay together.
PYTEST := OMP_NUM_THREADS=1 MPLBACKEND=Agg WANDB_SILENT=true MAKEFLAGS= $(BIN)/python -m pytest
WORKERS := -n $(TEST_WORKERS) --dist worksteal

.PHONY: help install install-dev demo test test-all test-others test-slurm test-nightly gpu-check gpu-bundle peers dali bench check docs format clean

help:
	@sed -n '1,5s/^# //p' Makefile

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

# A new pip: that of Python 3.11 takes half a minute to list what it has installed.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "galaxydist needs Python 3.11 or later and found none; install it, or say: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; say: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --quiet --upgrade pip

# Installed once for each change of what is required; the code itself is used where it stands.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time takes a few minutes, most of them for torch"
	$(PIP_INSTALL) -e .
	@touch $@

# Quiet where only a few packages are missing: pip would list all those that are there.
$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) with what the tests need"
	$(PIP_INSTALL) $(if $(wildcard $(VENV)/installed),--quiet) -e '.[dev]'
	@touch $(VENV)/installed $@

demo: $(VENV)/installed
	$(DEMO_ENV) $(BIN)/galaxydist data simulate --num-galaxies $(DEMO_GALAXIES) --seed $(DEMO_SEED) --overwrite
	$(DEMO_ENV) $(BIN)/galaxydist data export --dataset simulated
	$(DEMO_ENV) $(BIN)/galaxydist data shard --dataset simulated --overwrite
	$(DEMO_ENV) $(BIN)/accelerate launch launch.py recipe=demo
	@echo "to go on: source $(VENV)/bin/activate; export GALAXYDIST_DATA=\"$(DEMO_DATA)\"; galaxydist --help"

test: $(VENV)/installed-dev
	$(PYTEST) $(WORKERS) -m "not slow and not slurm and not browser and not gpu and not nightly"

# Tests on SLURM wait most of the time, so they run beside the others; one after the other, since they share one SLURM.
test-all: $(VENV)/installed-dev
	@$(MAKE) --no-print-directory --keep-going --jobs 2 test-others test-slurm

test-others: $(VENV)/installed-dev
	$(PYTEST) $(WORKERS) --durations=15 -m "not slurm and not gpu and not nightly"

# Shown once it is over, so that the lines of the two do not mix.
test-slurm: $(VENV)/installed-dev
	@output=$$(mktemp) && { $(PYTEST) --durations=10 -m "slurm and not gpu and not nightly" >"$$output" 2>&1; code=$$?; \
		echo; echo "tests on SLURM:"; cat "$$output"; rm -f "$$output"; exit $$code; }

test-nightly: $(VENV)/installed-dev peers
	$(PYTEST) -m "nightly and not gpu"
	$(PYTEST) -m "hypothesis and not nightly and not gpu" --hypothesis-profile=thorough

# GPU_CHECK='--device cpu' rehearses the checks; --only CHECK ... chooses some. Results: gpu-check/summary.md and summary.json.
gpu-check: $(VENV)/installed-dev
	$(BIN)/python -m tests.gpu.check $(GPU_CHECK)

# For a machine without a network: wheels of what it may lack, for its Python. GPU_BUNDLE='--python 3.13' names another one.
gpu-bundle: $(VENV)/installed-dev
	$(BIN)/python -m tests.gpu.bundle build/gpu-bundle $(GPU_BUNDLE)

# What other loaders need goes into environments of their own. torch is there once: a .pth shows them what $(VENV) has, after theirs.
PEERS := galaxydist/bench/peers
.venv-%/installed: $(PEERS)/%.txt $(VENV)/installed
	@echo "installing other loaders into $(@D)"
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import sysconfig, pathlib, galaxydist; print(sysconfig.get_path("purelib"), pathlib.Path(galaxydist.__file__).parents[1], sep="\n")' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/galaxydist.pth"
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	@touch $@

peers: .venv-bench/installed .venv-mosaic/installed .venv-spdl/installed

# Apart, since it takes 700 MB.
dali: .venv-dali/installed

bench: peers
	$(BIN)/galaxydist bench loader $(BENCH)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q tests/test_layout.py
	@$(MAKE) --no-print-directory docs

# Warnings, such as a broken link, fail.
docs: $(VENV)/installed-dev
	$(BIN)/zensical build --clean --strict

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-bench .venv-mosaic .venv-spdl .venv-dali build dist site data/hdf5/simulated.h5 data/shards/simulated data/images/simulated .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
