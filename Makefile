# make demo | test | test-fast | lint | docs | clean: each does all of the set-up itself, in .venv, the first time.
# Another interpreter: make demo PYTHON=python3.12. Arguments: make demo ARGS='--seed 1', make test ARGS='-k losses'

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Nothing here needs the Hub or a GPU, and one thread is the fastest for models this small.
HF_HUB_OFFLINE ?= 1
OMP_NUM_THREADS ?= 1
TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE OMP_NUM_THREADS TOKENIZERS_PARALLELISM
export PIP_DISABLE_PIP_VERSION_CHECK := 1
test test-fast: export DS_ACCELERATOR ?= cpu

.PHONY: demo test test-fast lint docs clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed-plots,synthetic
	$(BIN)/trl-spo demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -n 2 --dist loadfile $(ARGS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -n 2 --dist loadfile -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo_output *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "trl-spo needs Python >= 3.11, but $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || (rm -rf $(VENV); exit 1)

# Installed with these extras since pyproject.toml or constraints.txt last changed. PyTorch comes first, by itself, so that
# the build that the machine's index prefers (CPU or CUDA) is settled before anything else asks for one.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch and trl-spo[$*] into $(VENV) (once, a few minutes)"
	@$(BIN)/python -m pip install --quiet --no-compile $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[$*]'
	@touch $@

# dev has these too: do not install them again after it.
ifneq ($(wildcard $(VENV)/.installed-dev),)
$(VENV)/.installed-plots,synthetic: $(VENV)/.installed-dev
	@touch $@
endif
