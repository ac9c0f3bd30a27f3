# Two commands do everything on a fresh machine:
#   make demo   sets up and runs the main job: train, evaluate and predict (DATA=path for your own images)
#   make test   sets up and passes the tests
# Variables: PYTHON (python3), TORCH (what pip installs where no torch is there yet), DATA, OUT, THREADS,
# TEST_PROCESSES (4): at most so many tests at a time.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
DATA ?=
OUT ?= $(if $(DATA),demo-data,demo)
THREADS ?= 2
TEST_PROCESSES ?= 4

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard _build_backend/*.py csrc/*/*)

.PHONY: demo test lint benchmark kernel-report sanitize gpu clean

demo: $(VENV)/.train
	$(BIN)/bti-fast doctor
	$(BIN)/bti-fast demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)")
	$(BIN)/bti-fast benchmark --level 3 --seconds 1 --threads $(THREADS)
	@echo "Pictures and reports: $(OUT)"

test: $(VENV)/.test
	$(BIN)/python -m pytest tests -n logical --maxprocesses $(TEST_PROCESSES) --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: $(VENV)/.train
	$(BIN)/bti-fast benchmark --threads $(THREADS)

# What the compilers make of the Triton and (with nvcc) CUDA kernels for sm_80, sm_90, sm_100, gfx942; needs no GPU.
kernel-report: $(VENV)/.test
	$(BIN)/python benchmarks/kernel_report.py --markdown benchmarks/results/kernel-report.md

# The operators' tests with AddressSanitizer and UndefinedBehaviorSanitizer in the C++ library.
sanitize: $(VENV)/.test
	PYTHON="$(abspath $(BIN)/python)" csrc/sanitize.sh

# Everything that needs a GPU, in steps (STEPS="contract graphs" for some). Uses the environment's own Python, and
# compiles for the torch that is there; of our dependencies it installs none.
gpu:
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	$(PYTHON) benchmarks/gpu.py $(STEPS)

clean:
	rm -rf $(VENV) build dist *.egg-info bti_fast/lib bti_fast/_native*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: everything else is satisfied by whatever torch is there.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.train: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e ".[train]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e ".[test]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q "triton==3.6.0"
	touch $@ $(VENV)/.train
