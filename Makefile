# make demo    the nano model on real image files, from a fresh clone; PyTorch is not needed
# make test    every check and test        make lint   the checks alone
# make bench   the figures of the README's results table
# make plugin  the TensorRT plugin; needs nvcc, CMake and TensorRT's headers (TENSORRT_ROOT=...)
# make clean   removes what the above made, .venv included

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench plugin clean

# Paths are relative throughout, so the folder's own path may hold spaces. The venv's programs are called through its Python for the same reason.
PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
export PIP_ROOT_USER_ACTION := ignore
WORKERS ?= 2

help:
	@sed -n 's/^# //p' Makefile | head -5

# The first Python of at least 3.11 among the usual names; PYTHON=... overrides.
.venv/made:
	@found="$${PYTHON:-}"; \
	for name in $$found python3 python3.13 python3.12 python3.11; do \
	  if command -v "$$name" >/dev/null && "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then found="$$name"; break; else found=""; fi; \
	done; \
	if [ -z "$$found" ]; then echo "make: needs Python 3.11 or later with venv; none found. PYTHON=/path/to/python make ... names one." >&2; exit 1; fi; \
	if [ ! -x $(PY) ]; then echo "setting up .venv with $$("$$found" --version)"; "$$found" -m venv .venv; fi
	@touch $@

.venv/installed: .venv/made pyproject.toml
	@echo "installing flamingo-export and what it needs (a few minutes the first time)"
	@$(PIP) -e '.[report]'
	@touch $@

# torch by its exact version and first, so that nothing else chooses another. timm without its dependencies: it would bring torchvision,
# which none of what is used here needs.
.venv/installed-dev: .venv/made pyproject.toml
	@echo "installing flamingo-export, PyTorch and what the tests compare with (a few minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev,torch,oracle]'
	@$(PIP) --no-deps 'timm>=1.0.20'
	@touch $@ .venv/installed

demo: .venv/installed
	@$(PY) scripts/demo.py --out demo-report

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

plugin:
	cmake -S . -B build -DBUILD_TESTING=OFF
	@targets="$$(cmake --build build --target help)"; \
	case "$$targets" in *flamingo_plugins*) cmake --build build --parallel --target flamingo_plugins ;; \
	*) echo "make: the plugin cannot be built here, see the messages above and docs/plugin.md" >&2; exit 1 ;; esac

bench: .venv/installed-dev
	$(PY) benchmarks/decoder_cpu.py
	$(PY) benchmarks/idefics_cpu.py
	$(PY) benchmarks/precision_accuracy.py
	$(PY) benchmarks/quantized_cpu.py
	$(PY) benchmarks/build_memory.py --size 3b
	$(PY) benchmarks/build_memory.py --size 9b

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-report
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
