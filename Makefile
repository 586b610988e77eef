# Two commands: `make demo` runs the main job, `make test` passes the tests. Both make .venv first, with all extras.
#
# TORCH       what is installed as torch; any release from 2.11 on works
# TORCH_OLD   the second torch that `make test` takes a quick pass on; a CPU-only build in our CI. Empty skips that pass.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
TORCH_OLD ?= torch==2.13.0
OUT ?= build/gpu-out
VENV := .venv
VENV_OLD := .venv-old
VENV_PINNED := .venv-pinned
# The oldest releases of the frameworks that the integrations support; .venv has the newest.
PINNED := timm==1.0.27 transformers==4.51.3 accelerate==1.3.0 lightning==2.5.0.post0 torchmetrics==1.6.0
BIN := $(VENV)/bin
# Processes of the long test runs, a file each, one thread each. JOBS=0 runs them in one process.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile
BUILD_INPUTS := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: demo test check quick interpret old pinned packaging bench gpu gpu-bundle format clean doctor

demo: $(VENV)/.built
	$(BIN)/python -m sib_fast study --quick $(ARGS)

# Everything that CI runs, in the order of what fails soonest.
test: check quick interpret old pinned packaging

check: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/lint-imports

quick: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not packaging" $(PARALLEL) $(ARGS)

# The Triton kernels on the CPU, program by program. `quick` compiles them for six GPUs.
interpret: $(VENV)/.built
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops tests/triton -k triton $(PARALLEL) $(ARGS)

# The core on another torch, from the libraries that were built against the first one: what one wheel for every torch means.
# Without the emulation of CUDA, which is slow, no part of a wheel, and has run above.
old: $(VENV)/.built $(if $(TORCH_OLD),$(VENV_OLD)/.installed)
ifneq ($(TORCH_OLD),)
	OMP_NUM_THREADS=1 $(VENV_OLD)/bin/python -m pytest -m "not packaging" -k "not emulated" $(PARALLEL) --ignore tests/lab \
	  --ignore tests/test_architecture.py
endif

pinned: $(VENV)/.built $(VENV_PINNED)/.installed
	$(VENV_PINNED)/bin/python -m pytest tests/integrations

packaging: $(VENV)/.built
	$(BIN)/python -m pytest -m packaging

# Throughput of each op and the head: `make bench ARGS="--device cuda --preset quick"` on a GPU (docs/benchmarks.md).
bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

# Everything that needs a GPU, with the machine's own python and torch: no .venv, no network. `make gpu OUT=folder ARGS="setup parity"`
gpu:
	bash tools/gpu.sh $(OUT) $(ARGS)

# What such a machine is brought beside the tree (docs/benchmarks.md). TARGET_PYTHON: one with its torch and its Triton, if there is one.
gpu-bundle: $(VENV)/.built
	$(BIN)/python tools/gpu.py --bundle $(if $(TARGET_PYTHON),--triton $(TARGET_PYTHON))

doctor: $(VENV)/.built
	$(BIN)/python -m sib_fast doctor

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.extras: pyproject.toml $(VENV)/.torch
	$(BIN)/python tools/install_extras.py all
	touch $@

# --no-build-isolation: builds against the torch that will load it, in place.
$(VENV)/.built: $(BUILD_INPUTS) $(VENV)/.extras
	PATH="$(CURDIR)/$(BIN):$$PATH" SIB_FAST_CPU=1 SIB_FAST_BLOCKS=1 \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	$(BIN)/python -m sib_fast doctor
	touch $@

$(VENV_OLD)/.installed: $(VENV)/.built
	test -x $(VENV_OLD)/bin/python || $(PYTHON) -m venv $(VENV_OLD)
	$(VENV_OLD)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_OLD)/bin/python -m pip install --quiet $(TORCH_OLD) numpy pytest pytest-benchmark pytest-xdist hypothesis
	echo "$(CURDIR)" > $$($(VENV_OLD)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sib_fast.pth
	touch $@

# torch and everything else from .venv, the frameworks of its own.
$(VENV_PINNED)/.installed: $(VENV)/.built Makefile
	test -x $(VENV_PINNED)/bin/python || $(PYTHON) -m venv $(VENV_PINNED)
	echo "$(CURDIR)/$$(ls -d $(VENV)/lib/python*/site-packages)" > $$(ls -d $(VENV_PINNED)/lib/python*/site-packages)/newest.pth
	$(VENV_PINNED)/bin/python -m pip install --quiet $(PINNED)
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OLD) $(VENV_PINNED) build dist *.egg-info sib_fast/lib sib_fast/_blocks*.so
