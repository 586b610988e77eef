# Two commands: `make demo` runs the main job, `make test` passes the tests. Both make .venv first, with all extras, and build what they
# run on (tools/build.py): the demo the CPU library and what the visible GPUs need, the tests one CUDA architecture at least.
#
# TORCH       what is installed as torch; any release from 2.11 on works
# TORCH_OLD   the second torch that `make test` takes a quick pass on: the oldest one that is supported, with CUDA, as it brings the
#             triton that the GPU machines of that release have. Empty skips that pass.
# PYTHON_OLD  its Python: 3.12, as those machines have, where it can be found
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
TORCH_OLD ?= torch==2.11.0 torchvision==0.26.0
TORCH_OLD_TRITON37 ?= torch==2.12.0 torchvision==0.27.0
PYENV_ROOT ?= $(HOME)/.pyenv
PYTHON_OLD ?= $(firstword $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null; \
  ls $(PYENV_ROOT)/versions/3.12.*/bin/python3.12 2>/dev/null) $(PYTHON))
OUT ?= build/gpu-out
VENV := .venv
VENV_OLD := .venv-old
VENV_TRITON37 := .venv-triton37
VENV_PINNED := .venv-pinned
# The oldest releases of the frameworks that the integrations support; .venv has the newest.
PINNED := timm==1.0.27 transformers==4.51.3 accelerate==1.3.0 lightning==2.5.0.post0 torchmetrics==1.6.0
BIN := $(VENV)/bin
# Processes of the long test runs, a file each, one thread each. JOBS=0 runs them in one process.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile
# LONG=1: every cell of every grid and what is marked long (docs/tests.md).
SELECTION := $(if $(LONG),--long)
# Says what is fetched, built and installed, without the resolver's warnings.
INSTALL := python tools/install.py

.PHONY: demo test test-all check quick interpret old old-triton37 pinned packaging site wheel bench gpu gpu-bundle format clean doctor FORCE

demo: $(VENV)/.built-demo
	$(BIN)/python -m sib_fast study --quick $(ARGS)

# Everything that CI runs, in the order of what fails soonest.
test: check quick interpret old pinned packaging site

# The same without samples. What it found is stored with commit and machine in benchmarks/results/test_all.json.
test-all: $(VENV)/.editable
	$(BIN)/python tools/test_all.py

check: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/lint-imports

quick: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not packaging" $(SELECTION) $(PARALLEL) $(ARGS)

# The Triton kernels on the CPU, program by program; `quick` compiles them for GPUs that are not here.
interpret: $(VENV)/.built
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops tests/triton -k triton $(SELECTION) $(PARALLEL) $(ARGS)

# The core on the oldest torch, from the libraries that were built against the first one: what one wheel for every torch means; and the
# Triton kernels on that torch's triton, interpreted and compiled. The emulation of CUDA has run above.
old: $(VENV)/.built $(if $(TORCH_OLD),$(VENV_OLD)/.installed)
ifneq ($(TORCH_OLD),)
	$(call pass_on,$(VENV_OLD))
endif

# The same on the release between: `make test-all` runs it.
old-triton37: $(VENV)/.built $(VENV_TRITON37)/.installed
	$(call pass_on,$(VENV_TRITON37))

OF_THE_CORE := tests/ops tests/nn tests/masks tests/estimators $(addprefix tests/test_,loss.py attach.py vjp.py compile.py step.py \
  autocast.py lazy.py layer.py)
define pass_on
TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor$(1) OMP_NUM_THREADS=1 \
  $(1)/bin/python -m pytest $(OF_THE_CORE) -k "not emulated" $(SELECTION) $(PARALLEL)
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest tests/ops tests/triton -k "triton and not opcheck" $(SELECTION) $(PARALLEL)
OMP_NUM_THREADS=1 $(1)/bin/python -m pytest tests/triton $(SELECTION) $(PARALLEL)
endef

pinned: $(VENV)/.built $(VENV_PINNED)/.installed
	$(VENV_PINNED)/bin/python -m pytest tests/integrations

packaging: $(VENV)/.built
	$(BIN)/python -m pytest -m packaging $(SELECTION) $(ARGS)

# dist/*.whl for every default architecture; TORCH_CUDA_ARCH_LIST decides otherwise.
wheel: $(VENV)/.extras
	$(BIN)/python tools/build.py wheel

# ---- Elsewhere than here: other processors, published files. No part of `make test`; docs/environment.md says what has run.
.PHONY: aarch64 sdist wheels check-dist release docs
PUBLISHER := build/publisher

# The CPU kernels compiled for aarch64 and run under emulation: needs g++-aarch64-linux-gnu and qemu-user.
aarch64: $(VENV)/.extras
	$(BIN)/python tools/self_test.py

sdist: $(PUBLISHER)/.installed
	$(PUBLISHER)/bin/python -m build --sdist --no-isolation --skip-dependency-check --outdir dist

# The CPU library's wheel of this machine's processor, in a manylinux container: needs docker. pyproject.toml has the settings.
wheels: $(PUBLISHER)/.installed
	$(PUBLISHER)/bin/python -m cibuildwheel --platform linux --output-dir dist

# RELEASE=v1.2.3: whether dist/ is the whole of that release
check-dist:
	$(PYTHON) tools/check_dist.py $(RELEASE)

release: check-dist
	gh release create $(RELEASE) --verify-tag --generate-notes dist/*

# build/site, for a browser; and what README and docs show runs, the files that they name exist, the reference is whole.
docs: site
	$(BIN)/python -m pytest tests/test_docs.py tests/test_readme.py tests/test_input_gradients.py tests/integrations/test_pages.py

# Warnings are errors. Nothing is fetched.
site: $(VENV)/.built
	$(BIN)/python tools/docs.py

$(PUBLISHER)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PUBLISHER)
	$(PUBLISHER)/bin/$(INSTALL) 'build>=1.2' 'setuptools>=77' 'cibuildwheel>=4,<5'
	touch $@

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
	$(BIN)/$(INSTALL) --upgrade pip
	$(BIN)/$(INSTALL) $(TORCH)
	touch $@

$(VENV)/.extras: pyproject.toml $(VENV)/.torch
	$(BIN)/$(INSTALL) --extra all
	touch $@

# The package by reference, nothing compiled: that is .built's part, which shows how far it is.
$(VENV)/.editable: setup.py pyproject.toml $(VENV)/.extras
	SIB_FAST_CPU=0 SIB_FAST_CUDA=0 $(BIN)/$(INSTALL) --no-build-isolation --no-deps -e .
	touch $@

# Asked every time: CMake knows what was built, for which architectures and from which sources. The file keeps its date, as what is
# installed beside it does not depend on the libraries.
$(VENV)/.built: $(VENV)/.editable FORCE
	$(BIN)/python tools/build.py test
	test -e $@ || touch $@

$(VENV)/.built-demo: $(VENV)/.editable FORCE
	$(BIN)/python tools/build.py demo

$(VENV)/.built-all: $(VENV)/.editable FORCE
	$(BIN)/python tools/build.py all

# numpy: the interpreters of triton 3.6 and 3.7 take scalars from arrays in a way that 2.4 refuses.
$(VENV_OLD)/.installed: RELEASES = $(TORCH_OLD)
$(VENV_TRITON37)/.installed: RELEASES = $(TORCH_OLD_TRITON37)
$(VENV_OLD)/.installed $(VENV_TRITON37)/.installed: $(VENV)/.built
	test -x $(@D)/bin/python || $(PYTHON_OLD) -m venv $(@D)
	$(@D)/bin/$(INSTALL) --upgrade pip
	$(@D)/bin/$(INSTALL) $(RELEASES) 'numpy<2.4' pytest pytest-benchmark pytest-xdist hypothesis
	echo "$(CURDIR)" > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sib_fast.pth
	touch $@

# torch and everything else from .venv, the frameworks of its own.
$(VENV_PINNED)/.installed: $(VENV)/.built Makefile
	test -x $(VENV_PINNED)/bin/python || $(PYTHON) -m venv $(VENV_PINNED)
	echo "$(CURDIR)/$$(ls -d $(VENV)/lib/python*/site-packages)" > $$(ls -d $(VENV_PINNED)/lib/python*/site-packages)/newest.pth
	$(VENV_PINNED)/bin/$(INSTALL) $(PINNED)
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OLD) $(VENV_TRITON37) $(VENV_PINNED) build dist *.egg-info sib_fast/lib sib_fast/_blocks*.so
