# Two commands: `make demo` runs the main job, `make test` passes the tests. Both make .venv first, with all extras.
#
# TORCH       what is installed as torch; any release from 2.11 on works
# TORCH_OLD   the second torch that `make test` takes a quick pass on; a CPU-only build in our CI. Empty skips that pass.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
TORCH_OLD ?= torch==2.13.0
VENV := .venv
VENV_OLD := .venv-old
BIN := $(VENV)/bin
BUILD_INPUTS := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: demo test check quick interpret old packaging bench format clean doctor

demo: $(VENV)/.built
	$(BIN)/python -m sib_fast train $(ARGS)

# Everything that CI runs, in the order of what fails soonest.
test: check quick interpret old packaging

check: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/lint-imports

quick: $(VENV)/.built
	$(BIN)/python -m pytest -m "not packaging" $(ARGS)

# The Triton kernels on the CPU, program by program. `quick` compiles them for six GPUs.
interpret: $(VENV)/.built
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops tests/triton -k triton $(ARGS)

# The core on another torch, from the libraries that were built against the first one: what one wheel for every torch means.
old: $(VENV)/.built $(if $(TORCH_OLD),$(VENV_OLD)/.installed)
ifneq ($(TORCH_OLD),)
	$(VENV_OLD)/bin/python -m pytest -m "not packaging" --ignore tests/lab --ignore tests/test_architecture.py
endif

packaging: $(VENV)/.built
	$(BIN)/python -m pytest -m packaging

bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only -m "not packaging" $(ARGS)

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
	$(VENV_OLD)/bin/python -m pip install --quiet $(TORCH_OLD) numpy pytest pytest-benchmark hypothesis
	echo "$(CURDIR)" > $$($(VENV_OLD)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sib_fast.pth
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OLD) build dist *.egg-info sib_fast/lib sib_fast/_blocks*.so
