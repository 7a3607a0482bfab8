# make demo   the main job: two looks at a real photo, ours beside the published procedure
# make test   the test suite            make test-full   longer evidence
# make gpu    on a machine with an NVIDIA GPU and a CUDA torch, offline, with its own python
PYTHON ?= python3
TORCH ?= torch==2.13.0
NEW_PILLOW ?= pillow==13.0.0
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=

.PHONY: demo test test-full gpu lint clean

demo: $(VENV)/.ready
	$(BIN)/vpt demo $(DEMO_ARGS)

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -m "not slow and not gpu" $(TEST_ARGS)

# Pixels of the newest Pillow, whose pass order differs, then the slow tests.
test-full: $(VENV)/.ready $(VENV)/newest-pillow/.ready
	PYTHONPATH=$(VENV)/newest-pillow $(BIN)/python -m tests.kernels.pillow_parity --order installed --count 400
	$(BIN)/python -m pytest -m "slow and not gpu" $(TEST_ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .

gpu:
	$(PYTHON) bench/gpu.py

# torch first and pinned: a requirement of another package would fetch the newest build with its CUDA libraries.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.packages: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q setuptools wheel ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,demo]"
	touch $@

# Rebuilt when a source is newer; ninja compiles only what changed.
$(VENV)/.ready: $(VENV)/.packages setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/newest-pillow/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/newest-pillow --upgrade "$(NEW_PILLOW)"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info vpt_kernels/*.so
