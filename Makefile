# The two commands: `make train` and `make test`. Both set everything up first: .venv, pinned packages, native code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLIENTS := $(VENV)/.clients
OLD_TRITON := build/triton-3.6
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
JOBS ?= 2

.PHONY: train rl test lint unit sanitize aarch64 bench benchrl gpu rehearsal aot cuda clean help
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "nvfp4 needs Python >= 3.10, $(PYTHON) is older; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: with it in place no other package can pull in another build of it
$(READY): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,dev]'
	@touch $@

# the libraries that are tested together with nvfp4 and that it does not need: trl, peft, lightning-fabric
$(CLIENTS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clients]'
	@touch $@

# the Triton that torch 2.10 and 2.11 pin, beside the one in the venv: a folder that comes first on PYTHONPATH
$(OLD_TRITON)/.ready: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD_TRITON) triton==3.6.0
	@touch $@

train: $(READY) ## pretrain a small model on real text in BF16 and in NVFP4, side by side
	$(BIN)/nvfp4 compare $(ARGS)

rl: $(READY) ## reinforcement learning in full precision and in NVFP4, side by side, with a control
	$(BIN)/nvfp4 rl --preset sort $(ARGS)

test: lint unit ## style, types and all tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(CLIENTS) $(OLD_TRITON)/.ready
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 10 $(ARGS)

aarch64: $(READY) ## the CPU kernels cross-compiled for aarch64 and emulated; takes Debian's g++-aarch64-linux-gnu, qemu-user
	$(BIN)/python -m pytest -q -rs tests/test_aarch64.py

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
	$(BIN)/python -m nvfp4.backends.triton.aot --json benchmarks/results/aot.json
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m nvfp4.backends.triton.aot --json benchmarks/results/aot_triton_3.6.json
	NVFP4_TEST_KERNELS=all $(BIN)/python -m pytest -n $(JOBS) tests/test_triton_jit.py

cuda: $(READY) ## build the CUDA kernels for five kinds of GPU, none needed, and say what they take
	NVFP4_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m nvfp4.backends.cuda_build --json benchmarks/results/cuda.json

clean: ## remove everything that make made
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name '__pycache__' -prune -exec rm -rf {} + ; rm -f nvfp4/*.so nvfp4/_cuda_missing.txt

# A copy of the package with instrumented kernels, so that the installed ones stay as they are.
SANITIZED := build/sanitized
sanitize: $(READY) ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r nvfp4 $(SANITIZED)/ && rm -f $(SANITIZED)/nvfp4/*.so
	NVFP4_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-temp build/sanitize-objects --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(BIN)/pytest -q -p no:cacheprovider tests/test_native.py
	NVFP4_SANITIZE=1 UBSAN_OPTIONS=halt_on_error=1 $(BIN)/pytest -q -p no:cacheprovider tests/test_cuda.py
