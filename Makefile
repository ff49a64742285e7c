# Two commands do everything on a fresh machine with Python and make:
#   make demo    the main job on a real model
#   make test    the tests
# `make test-031` runs those that meet mlx-lm's caches with mlx-lm 0.31.
CHECK := import ensurepip, sys; assert (3, 11) <= sys.version_info < (3, 14)
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
	$$python -c '$(CHECK)' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VENV_031 := .venv-031
STAMP_031 := $(VENV_031)/.installed
TESTS_031 := $(addprefix tests/,$(addsuffix .py,turboquant/test_kv_cache \
	$(addprefix kvstore/test_,store layers generate restoring model import cli \
	chat turns interrupts server serving families bundles import_bundle bundle_verbs \
	tenants pages recognise spans replay)))
MODEL := .cache/smollm2
comma := ,
# On Linux, mlx needs a back end; on a Mac it brings Metal with it.
EXTRAS := dev$(if $(filter Linux,$(shell uname -s)),$(comma)$(or $(BACKEND),cpu))
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-numpy test-031 test-all campaign bench serve-bench quality check format docs \
	site mac clean

demo: $(STAMP) $(MODEL)/config.json
	$(BIN)/kvstore demo --model $(MODEL)

test: $(STAMP) $(MODEL)/config.json
	$(BIN)/pytest -n auto --dist loadfile -m "not slow"

# The same without the compiled kernels, or some of it: `make test-numpy TESTS=...`.
test-numpy: $(STAMP) $(MODEL)/config.json
	TURBOQUANT_KERNELS=numpy $(BIN)/pytest -n auto --dist loadfile -m "not slow" $(TESTS)

test-031: $(STAMP_031)
	$(VENV_031)/bin/pytest -n auto --dist loadfile -m "not slow and not model" $(TESTS_031)

test-all: $(STAMP) $(MODEL)/config.json
	$(BIN)/pytest -n auto --dist loadfile

# Power cuts take a disk that root has mounted.
CUTS := $(if $(filter 0,$(shell id -u)),--power-cuts 180 --requests 400)
CAMPAIGN := --kills 1000 $(CUTS) --errors 2000 --damage 20000 --fuzz 3000000 \
	--together 120 --connections 200 --replies 1000 --poison 1000 --mutants

campaign: $(STAMP)
	$(BIN)/python -m tools.campaign $(CAMPAIGN)

bench: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m pip install --quiet "matplotlib>=3.8"
	$(BIN)/python tools/bench.py $(MODEL) --growth --json docs/bench.json --plot docs/bench.png

serve-bench: $(STAMP) $(MODEL)/config.json
	$(BIN)/python tools/serve_bench.py $(MODEL) --json docs/serve_bench.json

quality: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m pip install --quiet "matplotlib>=3.8"
	$(BIN)/python tools/quality.py $(MODEL) --csv docs/quality.csv --plot docs/quality.png

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python tools/cli_docs.py

# A page is the same file here and on a forge: only its links are moved.
SITE := .cache/docs
site: $(STAMP)
	$(BIN)/python -m pip install --quiet "mkdocs-material>=9.5"
	mkdir -p $(SITE)
	cp docs/* CHANGELOG.md CONTRIBUTING.md SECURITY.md $(SITE)
	cp README.md $(SITE)/index.md
	sed -i.old -E 's#\]\((docs/|\.\./)#](#g; s#\]\(README\.md#](index.md#g' $(SITE)/*.md
	rm $(SITE)/*.old
	$(BIN)/mkdocs build --quiet

# Ten minutes on a Mac, and a report to paste into an issue.
MAC_TESTS := tests/turboquant tests/kvstore/codecs $(addprefix tests/kvstore/test_,$(addsuffix \
	.py,layers restoring generate chat real_model windows reanchor))
mac: $(STAMP) $(MODEL)/config.json
	@{ sw_vers; sysctl -n machdep.cpu.brand_string hw.memsize; \
	$(BIN)/kvstore doctor --model $(MODEL); $(BIN)/kvstore bench --model $(MODEL); \
	$(BIN)/pytest -q -n auto --dist loadfile -m "not slow" $(MAC_TESTS) | tail -40; \
	} 2>&1 | tee mac-report.md

clean:
	rm -rf $(VENV) $(VENV_031) .cache .mypy_cache .pytest_cache .ruff_cache \
		turboquant/kernels/_native.so

KERNELS := hatch_build.py $(wildcard turboquant/kernels/*.cpp turboquant/kernels/*.h)

$(STAMP): pyproject.toml $(KERNELS)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with pip and venv"; \
	echo "hint: install one, or set PYTHON=/path/to/python3"; exit 1; }
	@echo "installing MLX, mlx-lm and the tools into $(VENV): some 400 MB, about a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

$(STAMP_031): pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VENV_031)
	$(VENV_031)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_031)/bin/python -m pip install --quiet --editable ".[$(EXTRAS)]" "mlx-lm==0.31.*"
	touch $@

$(MODEL)/config.json: tools/demo_model.py | $(STAMP)
	$(BIN)/python tools/demo_model.py $(MODEL)
	touch $@
