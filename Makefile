# make demo        the main job: two looks at a real photo, ours beside the published procedure
# make test        the test suite
# make interpret   the Triton kernels in Triton's interpreter (part of make test)
# make test-full   longer evidence: thousands of geometries, on the newest Pillow too
# make mutate      one-line faults in the kernels, each of which the tests must catch
# make bench       operators and engine against their alternatives on this machine, quick set (3 minutes)
# make bench-full  all workloads
# make gpu         on a machine with an NVIDIA GPU and a CUDA torch, offline, with its own python
PYTHON ?= python3
TORCH ?= torch==2.13.0
NEW_PILLOW ?= pillow==13.0.0
# The tests read one file of it, Qwen's byte-pair vocabulary; its code and its dependencies are not wanted.
QWEN_VOCABULARY ?= dashscope==2.0.2
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo test interpret test-full mutate bench bench-full gpu lint clean

help:
	@sed -n "s/^# \(make .*\)/\1/p" Makefile

demo: $(VENV)/.ready
	$(BIN)/vpt demo $(DEMO_ARGS)

test: $(VENV)/.ready lint interpret
	$(BIN)/python -m pytest -m "not gpu and not slow" --ignore=tests/triton $(TEST_ARGS)

# In a process of its own: the interpreter is chosen when triton is imported, and then nothing compiles.
interpret: $(VENV)/.ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not gpu and not slow" tests/triton

# Many more geometries, on the pinned Pillow and on the newest, whose pass order differs.
test-full: $(VENV)/.ready $(VENV)/newest-pillow/.ready
	PYTHONPATH=$(VENV)/newest-pillow $(BIN)/python -m tests.kernels.pillow_parity --order installed --count 1000
	$(BIN)/python -m tests.kernels.pillow_parity --order hv --count 1000
	$(BIN)/python -m pytest -m "slow and not gpu" tests/cuda tests/model
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "slow and not gpu" tests/triton

lint: $(VENV)/.ready
	$(BIN)/ruff check .

mutate: $(VENV)/.ready
	$(BIN)/python -m tests.mutate

# Large freed blocks stay with the process: otherwise every alternative pays for fresh pages on every call.
bench bench-full: export MALLOC_MMAP_THRESHOLD_ = 268435456
bench bench-full: export MALLOC_TRIM_THRESHOLD_ = 268435456
bench: $(VENV)/.ready
	$(BIN)/python -m bench run $(BENCH_ARGS)

bench-full: $(VENV)/.ready
	$(BIN)/python -m bench run --full $(BENCH_ARGS)

gpu:
	$(PYTHON) bench/gpu.py

# torch first and pinned: a requirement of another package would fetch the newest build with its CUDA libraries.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.packages: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q setuptools wheel ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,demo]"
	$(BIN)/python -m pip install -q --no-deps "$(QWEN_VOCABULARY)"
	touch $@

# The installation has just built the extension; later only what changed is compiled.
$(VENV)/.ready: $(VENV)/.packages setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	if [ ! -e vpt_kernels/_C.so ] || [ -n "$$(find csrc setup.py -newer vpt_kernels/_C.so)" ]; then \
		PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace; fi
	touch $@

$(VENV)/newest-pillow/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/newest-pillow --upgrade "$(NEW_PILLOW)"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info vpt_kernels/*.so
