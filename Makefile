# `make generate` writes text with the embedded model. `make test` runs every check. Both set up .venv on their first run.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.PHONY: generate docs gpu test test-all test-style test-package test-kernels test-compiled sanitize sanitize-native format clean

generate: $(VENV)/.runtime
	$(BIN)/fastgpt2 generate $(ARGS)

# Two parts run at a time, with one thread each. The tensors are small, and two processes that both use all cores would
# only wait for each other.
TESTS := test-kernels test-style test-package test-compiled
MARKS := -m "not slow"
test: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 2 --output-sync $(TESTS)

# Like `make test`, with the slow tests, and with every launch row compiled instead of one for each kernel and dtype.
test-all: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 2 --output-sync $(TESTS) ROWS=--all-rows MARKS=

test-style: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-package: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/kernels $(MARKS) $(ARGS)

test-kernels: $(VENV)/.dev
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels --ignore tests/kernels/test_compile.py $(MARKS)

test-compiled: $(VENV)/.dev
	$(BIN)/python -m pytest tests/kernels/test_compile.py $(ROWS)

# The kernels' tests as on a GPU: Triton's front end compiles the kernels, and the sanitizer executes the result on the
# CPU and checks every access. Optional, because the sanitizer is young software. Tests of devices, threads or PyTorch
# are skipped.
SANITIZED := not compile and not opcheck and not refused and not checkpointing and not autocast and not synchronisation \
  and not interpreted
sanitize: $(VENV)/.dev
	@$(BIN)/python -c 'import ttsem' 2>/dev/null || { echo "make sanitize: needs ttsem: $(BIN)/pip install --ignore-requires-python ttsem"; exit 1; }
	$(BIN)/python -m ttsem.sanitize pytest tests/kernels -m "not unsanitized" -k "$(SANITIZED)"

# The native operators' tests on C++ compiled with AddressSanitizer and UndefinedBehaviorSanitizer, for every
# instruction set of this processor.
sanitize-native: $(VENV)/.dev
	PYTHONPATH=.:kernels $(BIN)/python -m tests.native.sanitized

# Checks and measurements for a GPU, the most important ones within ten minutes, all within half an hour. out/gpu has
# the results. `make gpu ARGS=attention` runs one part.
gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# Builds the documentation in build/site. Every link is checked, and a warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each stamp file is made again when what it installs has changed. The environment of `make test` also works for
# `make generate`.
NATIVE := setup.py $(wildcard kernels/native/*)
$(VENV)/.runtime: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/.made
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/.made
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(VENV)/.runtime $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fastgpt2 needs Python 3.10 or newer, and $(PYTHON) is %s; name another: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
