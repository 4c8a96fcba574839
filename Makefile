# quern: everything one does daily. Needs Linux with Python 3.10 or later; `make demo` is the place to start.
PYTHON ?= python3
VENV ?= .venv
# MODEL is a checkpoint folder; empty: the small model that comes with quern
MODEL ?=
TARGET ?= native
BUNDLE ?= build/demo-$(TARGET)
PROMPT ?= Once upon a time
# Tests run in a process a core, a file at a time: fixtures that build bundles are made once a file
WORKERS ?= --numprocesses auto --maxprocesses 8 --dist loadfile
# SHAPE is a published model shape, for `make bench`
SHAPE ?= tinyllama-1.1b

MODEL_ARG = $(if $(MODEL),--model $(MODEL))
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast lint bench clean

help:
	@echo "make demo       build a small model for this machine and let it tell a story"
	@echo "make venv       Python environment in $(VENV), with everything for development"
	@echo "make test       all tests            make test-fast  the quick ones"
	@echo "make lint       ruff and mypy        make bench      speed of the kernels"
	@echo "make clean      remove build results and $(VENV)"

# Two stages, two stamps: the demo need not wait for torch. A stamp is newer than pyproject.toml once its stage is in.
$(VENV)/.product: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but quern needs Python 3.10 or later: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -qy "$$package"; \
	  else echo "$(PYTHON) cannot make environments. Run: sudo apt-get install $$package" >&2; exit 2; fi; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.everything: $(VENV)/.product
	$(PIP) install --quiet -e '.[tune,test]'
	@touch $@

venv: $(VENV)/.everything

demo: $(VENV)/.product
	@mkdir -p $(dir $(BUNDLE))
	$(PY) -m compiler build $(MODEL_ARG) --target $(TARGET) --out $(BUNDLE)
	@printf '\n%s' "$(PROMPT)"
	@$(PY) -m runtime generate $(BUNDLE) --prompt "$(PROMPT)"

test: $(VENV)/.everything
	$(PY) -m pytest $(WORKERS) $(PYTEST_ARGS)

test-fast: $(VENV)/.everything
	$(PY) -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.everything
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(VENV)/.product
	$(PY) -m compiler bench --shape $(SHAPE) --target $(TARGET)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis quern.egg-info
	find compiler runtime schedules targets tests -name __pycache__ -type d -prune -exec rm -rf {} +
