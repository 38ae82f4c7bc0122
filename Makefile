# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
# the system's Python first: one below a home folder cannot be run by the users that snippets run as
PYTHON ?= $(shell for p in /usr/bin/python3.11 python3.11 python3; do \
	$$p -c "import ensurepip" 2>/dev/null && command -v $$p && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
HAVE_CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

.PHONY: quickstart install test test-slow test-gpu lint format mcore-next tiny-base clean

quickstart: install
	$(BIN)/torl train conf/quickstart$(if $(HAVE_CUDA),_gpu).yaml

install: $(STAMP)

# pip >= 25.1 reads the dependency groups of pyproject.toml, where all pins stand
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(if $(HAVE_CUDA),--system-site-packages) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77" wheel
ifeq ($(HAVE_CUDA),yes)
	$(BIN)/python -m pip install --quiet --group gpu --group dev
	$(BIN)/python -m venv $(VENV)/sglang && $(VENV)/sglang/bin/python -m pip install --quiet --upgrade "pip>=25.1" \
	  && $(VENV)/sglang/bin/python -m pip install --quiet --group sglang-gpu \
	  && $(VENV)/sglang/bin/python -m pip install --quiet --no-deps --editable .
else
	$(BIN)/python -m pip install --quiet --group cpu --group dev
	$(BIN)/python -m pip install --quiet --no-deps --group sglang-cpu
endif
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

test: install
	$(BIN)/python -m pytest

test-slow: install mcore-next
	$(BIN)/python -m pytest -m slow

test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the other megatron-core version, unpacked where the parallel tests look for it
mcore-next: build/mcore-next/megatron
build/mcore-next/megatron: pyproject.toml | install
	rm -rf build/mcore-next build/wheels && mkdir -p build/mcore-next
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest build/wheels --group mcore-next
	cd build/mcore-next && $(CURDIR)/$(BIN)/python -m zipfile -e ../wheels/megatron_core-*.whl .

tiny-base: install
	$(BIN)/python tools/make_tiny_base.py

clean:
	rm -rf build .pytest_cache .ruff_cache
