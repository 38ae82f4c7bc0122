# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
# the system's Python first: one below a home folder cannot be run by the users that snippets run as
PYTHON ?= $(shell for p in /usr/bin/python3.11 python3.11 python3; do \
	$$p -c "import ensurepip" 2>/dev/null && command -v $$p && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
HAVE_CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

.PHONY: quickstart install test test-slow test-gpu gpu-evidence lint format docs mcore-next te gpu-sources trl tiny-base moe-base paper-base reproduce reproduce-fast clean

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
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	-$(BIN)/python -m torl_mega.launch.environments $(BIN)/python $(VENV)/sglang/bin/python
else
	$(BIN)/python -m pip install --quiet --group cpu --group dev
	$(BIN)/python -m pip install --quiet --no-deps --group sglang-cpu --group axe
endif
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

test: install
	@$(MAKE) --no-print-directory gpu-sources || echo "make: the GPU's Python layers cannot be fetched; tests/gpu_proofs will skip" >&2
	$(BIN)/python -m pytest

test-slow: install gpu-sources
	$(BIN)/python -m pytest -m slow

test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu

gpu-evidence: install
	$(BIN)/python tools/gpu_evidence.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pyright --pythonversion 3.12
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/ as a site in build/site; nothing is fetched, and a broken link fails
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "docs: build/site/index.html"

# what the GPU image has and a CPU cannot install: wheels of plain Python, unpacked where tests look for them (dependency
# groups of the same names; 3 MB)
gpu-sources: mcore-next te
mcore-next te: %: build/%/.unpacked
build/%/.unpacked: pyproject.toml | install
	rm -rf build/$* build/wheels/$*
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest build/wheels/$* --group $*
	mkdir -p build/$* && cd build/$* && $(CURDIR)/$(BIN)/python -m zipfile -e ../wheels/$*/*.whl .
	touch $@

# what tools/bench_step.py times beside us
trl: build/trl/.installed
build/trl/.installed: pyproject.toml
	$(PYTHON) -m venv build/trl
	build/trl/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	build/trl/bin/python -m pip install --quiet --group trl
	touch $@

tiny-base: install
	$(BIN)/python tools/make_tiny_base.py --out conf/quickstart

# the quickstart's base with experts; about six minutes of one core
moe-base: install
	$(BIN)/python tools/make_tiny_base.py --out conf/quickstart_moe --experts 8

# the base of the paper in small, about half an hour of one core; to use it: model.path=build/paper_small/model
paper-base: install
	$(BIN)/python tools/make_paper_base.py start build/paper_small/start
	PYTHONPATH=tools $(BIN)/torl pretrain conf/paper_small/base.yaml
	$(BIN)/python tools/make_paper_base.py ship runs/paper_small_base/hf build/paper_small/model

# the paper in small: the runs that runs/reproduction lacks, then docs/reproduction.md, which says how long they take; resumable
reproduce: install
	$(BIN)/python tools/reproduce.py

reproduce-fast: install
	$(BIN)/python tools/reproduce.py --fast

clean:
	rm -rf build .pytest_cache .ruff_cache
