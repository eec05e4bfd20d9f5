# Everything a person types. `make` alone lists it.

RECIPE ?= recipes/fashion-resnet18.toml
OUT    ?= dist
TARGET ?=

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made-from-pyproject
PEERS  ?= .venv-peers
PEERS_STAMP := $(PEERS)/.made-from-lock
ARGS   ?=
RECIPES ?= $(wildcard recipes/fashion-*.toml)

.DEFAULT_GOAL := help
.PHONY: help deploy test fuzz check format static docs bench bench-loader nightly clean

help: ## list these targets
	@echo "make deploy TARGET=openvino|onnxruntime|a,b|all  [RECIPE=$(RECIPE)] [OUT=$(OUT)]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

deploy: $(STAMP) ## build, verify and bundle RECIPE for TARGET into OUT
	@$(BIN)/bitferry deploy "$(RECIPE)" $(if $(TARGET),--target "$(TARGET)") --out "$(OUT)"

test: $(STAMP) ## run every test
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

fuzz: $(STAMP) ## try bytes nobody thought of on every reader, FUZZ_SECONDS each (300)
	@FUZZ_SECONDS=$(or $(FUZZ_SECONDS),300) $(BIN)/python -m pytest tests/test_fuzz.py

static: $(STAMP) ## the part of check that runs nothing: formatting, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(STAMP) ## build the site of docs/ into build/site, strictly
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: static test ## what CI runs: formatting, lint, types, tests

format: $(STAMP) ## format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(STAMP) $(PEERS_STAMP) ## compare RECIPE in int8 with other tools; ARGS, as "--jobs --readme", to benchmarks/peers.py
	@$(BIN)/python benchmarks/peers.py "$(RECIPE)" --nncf "$(PEERS)/bin/python" $(ARGS)

bench-loader: $(STAMP) ## time the loader beside torchvision's on FOLDER's photographs; ARGS, as "--docs"
	@$(BIN)/python benchmarks/loader.py $(FOLDER) $(ARGS)

nightly: $(STAMP) ## the nightly matrix of RECIPES; ARGS, as "--target openvino --quick", to bitferry matrix
	@$(BIN)/bitferry matrix $(RECIPES) $(ARGS)

clean: ## remove the environments, the builds and the bundles
	rm -rf $(VENV) $(PEERS) build dist .mypy_cache .ruff_cache .pytest_cache

# Bytecode is compiled at once: without it importing PyTorch takes twice as long wherever Python may not write.
# Made once, and again when pyproject.toml or the lock changes.
$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 is needed, and no python3 was found"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; $(PYTHON) is older. Name one with PYTHON=/path/to/python3.11"; exit 2; }
	@echo "making $(VENV) (PyTorch and the runtimes, 6 GB; once)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: python's venv module is missing; on Debian and Ubuntu: apt install python3.11-venv"; rm -rf $(VENV); exit 2; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	@VIRTUAL_ENV="$(abspath $(VENV))" $(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode requirements.lock
	@VIRTUAL_ENV="$(abspath $(VENV))" $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# NNCF has an environment of its own, which only `bench` needs; most of it are hard links to what uv has already.
$(PEERS_STAMP): benchmarks/peers.lock | $(STAMP)
	@echo "making $(PEERS) (NNCF and what it needs; once)" >&2
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv --without-pip $(PEERS)
	@VIRTUAL_ENV="$(abspath $(PEERS))" $(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode benchmarks/peers.lock
	@touch $@
