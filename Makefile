# The two commands: `make train` and `make test`. Both set everything up first: .venv, pinned packages, native code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLIENTS := $(VENV)/.clients
OLD_TRITON := build/triton-3.6
TESTED := $(VENV)/.tested
TOOLS := $(VENV)/.tools
NATIVE := $(VENV)/.native
PACKAGES := pyproject.toml constraints.txt
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
SOURCES := setup.py $(wildcard csrc/*.py) $(CPP)
# of the tests, on two cores: a core that would wait while a test waits for another process has a third to run
JOBS ?= 3
# no bytecode of all that torch and transformers hold: Python makes it for what is imported, once, also where the
# environment forbids it: hundreds of processes would else compile torch and transformers anew, 4 to 12 s of a core each
unexport PYTHONDONTWRITEBYTECODE
ANY := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --prefer-binary
PIP := $(ANY) -c constraints.txt
OR_SAY := || { echo "The set-up stopped; the first lines above say whether network, index or room on the disk was missing."; \
  echo "What is done is kept: the same command goes on from there."; exit 1; } >&2

.PHONY: train rl test test-all lint style types unit docs package mutants coverage sanitize aarch64 bench benchrl gpu rehearsal aot roofline cuda clean help
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# An environment whose making was stopped has a Python and no pip: it is completed, or made anew where that fails.
HAS_PIP := $(BIN)/python -m pip --version >/dev/null 2>&1
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "nvfp4 needs Python >= 3.10, $(PYTHON) is older or missing; set PYTHON=python3.x"; exit 1; }
	@$(HAS_PIP) || $(PYTHON) -m venv $(VENV)
	@$(HAS_PIP) || $(PYTHON) -m venv --clear $(VENV)
	@touch $@

# what builds the package: two small wheels
$(TOOLS): $(VENV)/.made $(PACKAGES)
	@echo "pip install setuptools pybind11, into $(VENV)"
	@$(PIP) 'setuptools>=77' pybind11 $(OR_SAY)
	@touch $@

# Only files that changed are compiled. A failure leaves a warning, a package that runs on its other backends, and no
# stamp: the next call tries again. Compilers take what pip leaves: it has one core's work to do and is waited for, while
# two compilers beside it took a third of its time.
$(NATIVE): $(TOOLS) $(SOURCES)
	@rm -f $@
	nice $(BIN)/python setup.py --quiet build_ext --inplace
	@test -e nvfp4/_cpu_missing.txt || touch $@

# One resolver for all packages, and no second environment for the build: its tools are there already.
ONLY_PYTHON := NVFP4_CPU=0 NVFP4_CUDA=0 $(PIP) --no-build-isolation
$(VENV)/.packages: $(TOOLS) $(PACKAGES)
	$(ONLY_PYTHON) -e '.[train,rl,data,dev]'
	@touch $@

# the same and the libraries that nvfp4 is tested together with and does not need: trl, peft, lightning-fabric
$(CLIENTS): $(TOOLS) $(PACKAGES)
	$(ONLY_PYTHON) -e '.[train,rl,data,dev,clients]'
	@touch $(VENV)/.packages $@

# Pip and the compilers side by side: one waits for the network where the others need the cores. However many jobs the
# caller allows, two pips never share $(VENV): what both need comes first, and where a call needs TESTED and READY, the
# former, which holds the latter.
SIDE_BY_SIDE := $(MAKE) --no-print-directory --jobs=2
NEEDS_TESTED := test test-all unit mutants coverage
$(READY): $(PACKAGES) $(SOURCES) | $(TOOLS) $(if $(filter $(NEEDS_TESTED),$(MAKECMDGOALS)),$(TESTED))
	@$(SIDE_BY_SIDE) $(VENV)/.packages $(NATIVE) $(OR_SAY)
	@test ! -e $(NATIVE) || touch $@

$(TESTED): $(PACKAGES) $(SOURCES) | $(TOOLS)
	@$(SIDE_BY_SIDE) $(CLIENTS) $(NATIVE) $(OLD_TRITON)/.ready $(OR_SAY)
	@test ! -e $(NATIVE) || touch $@

# the Triton that torch 2.10 and 2.11 pin, beside the one in the venv: a folder that comes first on PYTHONPATH
$(OLD_TRITON)/.ready: $(TOOLS)
	@rm -rf $(OLD_TRITON)  # pip replaces nothing in a folder that it was stopped in
	$(ANY) --no-deps --target $(OLD_TRITON) triton==3.6.0
	@touch $@

train: $(READY) ## pretrain a small model on real text in BF16 and in NVFP4, side by side
	$(BIN)/nvfp4 compare $(ARGS)

rl: $(READY) ## reinforcement learning in full precision and in NVFP4, side by side, with a control
	$(BIN)/nvfp4 rl --preset sort $(ARGS)

# types beside tests: mypy takes a minute of one core
test: $(TESTED) style ## style, types and all tests but the slow ones
	@$(SIDE_BY_SIDE) types unit MARKS="$(MARKS)"

test-all: MARKS := -m 'slow or not slow'
test-all: test ## with the slow tests, which take the same roads once more

lint: style types

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(wildcard tests/support/*.cpp)

types: $(READY)
	$(BIN)/mypy

unit: $(TESTED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 10 $(MARKS) $(ARGS)

mutants: $(TESTED) ## faults put into a copy one at a time: do the tests find them
	$(BIN)/python tools/mutants.py --json benchmarks/results/mutants.json $(ARGS)

coverage: $(TESTED) ## lines and branches that the tests reach, also from child processes
	$(PIP) 'coverage>=7.10'
	$(BIN)/python tools/covered.py --json benchmarks/results/coverage.json -n $(JOBS) --dist worksteal $(ARGS)

aarch64: $(READY) ## the CPU kernels cross-compiled for aarch64 and emulated; takes Debian's g++-aarch64-linux-gnu, qemu-user
	$(BIN)/python -m pytest -q -rs -m slow tests/backends/test_aarch64.py

bench: $(READY) ## time the quantisers and the linear layer, and keep the figures
	$(BIN)/python -m benchmarks.bench_quantize --keep quantize
	$(BIN)/python -m benchmarks.bench_linear --isa best,avx2 --keep linear
	$(BIN)/python -m benchmarks.bench_memory --keep memory

benchrl: $(READY) ## the comparison of make rl, kept as data
	$(BIN)/python -m benchmarks.bench_rl --keep rl

gpu: ## on a machine with a GPU, torch and triton: check everything, time it, judge it, in two calls of 5 and 6 minutes
	@for call in 1 2; do $(PYTHON) -m benchmarks.on_gpu --call $$call --out build/on_gpu $(ARGS) || bad=1; done; exit $$bad

rehearsal: $(READY) ## both calls of make gpu on the CPU, at a tenth of the sizes, with faults injected
	$(BIN)/python -m benchmarks.gpu.rehearsal $(ARGS)

aot: $(READY) $(OLD_TRITON)/.ready ## compile every Triton kernel for eight kinds of GPU with two Tritons, no GPU needed
	$(BIN)/python -m tools.aot --json benchmarks/results/aot.json
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m tools.aot --json benchmarks/results/aot_triton_3.6.json
	NVFP4_TEST_KERNELS=all $(BIN)/python -m pytest -n $(JOBS) tests/backends/test_triton_jit.py

# every card of the table: what the pages show of it comes from here
ROOFLINE_DEVICES := H100 H200 B200 B300 GB200 GB300 rtx5090
roofline: $(READY) ## count the instructions of the Triton kernels for each card, no GPU needed, and keep what follows
	$(BIN)/python -m tools.instructions --json nvfp4/bench/instructions.json
	$(BIN)/nvfp4 bench roofline --devices $(ROOFLINE_DEVICES) --models 800M 3B 22B 7B \
		--json benchmarks/results/roofline.json --plot benchmarks/results/roofline.png
	$(BIN)/python docs/figures.py --write

cuda: $(READY) ## build the CUDA kernels for five kinds of GPU, none needed, and say what they take
	NVFP4_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m tools.cuda_build --json benchmarks/results/cuda.json
	$(BIN)/python -m tools.cuda_counts --json nvfp4/bench/cuda_instructions.json \
		--shares benchmarks/results/cuda_shares.json
	$(BIN)/python docs/figures.py --write

# what the book shows is read from sources and kept results: no compiler is needed
$(VENV)/.docs: $(VENV)/.packages
	$(ONLY_PYTHON) -e '.[train,rl,data,dev,docs]'
	@touch $@

docs: $(VENV)/.docs ## the book as a site in build/site: strict, a broken link fails; needs no network once it is installed
	$(BIN)/python docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean --quiet

# As an index would have it: the wheel from the sdist, in an environment of its own; tried with the core dependencies alone.
BUILT := build/package
package: $(TOOLS) ## sdist and wheel in build/package/dist: built, checked, installed in a clean venv, and tried
	$(PIP) 'build>=1.2' 'twine>=6'
	rm -rf $(BUILT) && $(BIN)/python -m build --outdir $(BUILT)/dist .
	$(BIN)/python -m twine check --strict $(BUILT)/dist/*
	$(BIN)/python tests/support/shipped.py $(BUILT)/dist
	$(PYTHON) -m venv $(BUILT)/venv
	$(BUILT)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(BUILT)/dist/*.whl
	cd $(BUILT) && venv/bin/python $(CURDIR)/tests/support/smoke.py

clean: ## remove everything that make made
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name '__pycache__' -prune -exec rm -rf {} + ; rm -f nvfp4/*.so nvfp4/_*_missing.txt

# A copy of the package with instrumented kernels, so that the installed ones stay as they are.
SANITIZED := build/sanitized
sanitize: $(READY) ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r nvfp4 $(SANITIZED)/ && rm -f $(SANITIZED)/nvfp4/*.so
	NVFP4_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-temp build/sanitize-objects --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(BIN)/pytest -q -p no:cacheprovider tests/backends/test_native.py
	NVFP4_SANITIZE=1 UBSAN_OPTIONS=halt_on_error=1 $(BIN)/pytest -q -p no:cacheprovider tests/backends/test_cuda.py
