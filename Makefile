# `make train` and `make test` each work alone on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that the tests run in, with one thread each.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: train test check lint clean

# Where Linux has no NVIDIA GPU, a CPU build of PyTorch spares gigabytes of CUDA. pip takes it if one of its indexes has it
# (PIP_EXTRA_INDEX_URL adds one), else uv, which knows PyTorch's own index by name. Without either, pip takes its default build.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
define install-torch
if [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
	if $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch==$(TORCH)+cpu 2>/dev/null || { $(BIN)/pip install -q --disable-pip-version-check uv && \
		UV_HTTP_RETRIES=0 $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu -c constraints.txt torch 2>/dev/null; }; \
	then echo "No NVIDIA GPU: PyTorch's CPU build is installed."; \
	else echo "No NVIDIA GPU, but PyTorch's CPU index was not reached: pip takes its default build, which may bring CUDA."; fi; \
fi
endef

# The stamp is written last, so an interrupted installation is done again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@$(install-torch)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[train,test]"
	touch $@

train: $(VENV)/installed
	$(BIN)/fastvae fit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

# For the quick loop: without the tests that take seconds and without those in Triton's interpreter.
check: lint
	FAST_TESTS_ONLY=1 $(PYTEST) -m "not slow and not interpreter"

# The site, in build/docs.
.PHONY: docs
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
