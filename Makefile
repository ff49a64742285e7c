# Two commands do everything on a fresh machine with Python and make:
#   make demo    the main job on a real model
#   make test    the tests
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := .cache/smollm2
# On Linux, mlx needs a back end; on a Mac it brings Metal with it.
EXTRAS := dev$(if $(filter Linux,$(shell uname -s)),$(comma)$(or $(BACKEND),cpu))
comma := ,
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all check format docs clean

demo: $(STAMP) $(MODEL)/config.json
	$(BIN)/kvstore --store .cache/demo-store demo --model $(MODEL)

test: $(STAMP) $(MODEL)/config.json
	$(BIN)/pytest -m "not slow"

test-all: $(STAMP) $(MODEL)/config.json
	$(BIN)/pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python tools/cli_docs.py

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

$(MODEL)/config.json: tools/demo_model.py | $(STAMP)
	$(BIN)/python tools/demo_model.py $(MODEL)
	touch $@
