# make demo         the nano model on real image files, from a fresh clone; PyTorch is not needed
# make test         every check and test        make lint       only the checks
# make coverage     as make test, and how much of each module the tests run (COVERAGE_ARGS=--strict: under 85 % fails)
# make test-fast    the tests that take seconds, in three minutes: the inner loop
# make lock         the lock files in requirements/, anew with the newest versions (docs/development.md)
# make test-oldest  nano's build, generate, parity and the command line on the lowest versions admitted; make test-newest: all on the newest
# make test-deploy  Ray Serve and Triton for real, manifests by KServe's SDK, what images install; each in an environment of its own (docs/scaling.md)
# make wheel-check  builds the wheel, installs it into an empty environment and runs the demo's first steps from there
# make bench        the figures of the README's results table
# make docs         the documentation as a site, docs/_build/html/index.html; a broken link fails
# make plugin       the TensorRT plugin; needs nvcc, CMake and TensorRT's headers (TENSORRT_ROOT=...)
# make gpu-wheels   the package's smaller dependencies for a GPU machine without network, into build/gpu-wheels (docs/gpu.md)
# make release      everything that a release needs, checked and built into dist/; publishes nothing
# make clean        removes what the above made, .venv included

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test coverage test-fast lint lock test-deploy test-deploy-ray test-deploy-triton test-deploy-kserve test-deploy-image deploy-nano test-oldest test-newest wheel-check bench docs plugin gpu-wheels release clean

# Paths are relative throughout, so the folder's own path may hold spaces. The venv's programs are called through its Python for the same reason.
PY := .venv/bin/python
INSTALL := -m pip install -qq --disable-pip-version-check
LOCKED := --require-hashes --no-deps
THIS := --no-deps --no-build-isolation -e .
TORCH := torch==2.13.0
UV := uv==0.13.9
export PIP_ROOT_USER_ACTION := ignore
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

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

# Every version comes from a lock file and every file is checked against its hash. The package itself goes in without a build environment of its
# own, which pip would fill with whatever is newest: its build tool is in the locks.
.venv/installed: .venv/made pyproject.toml requirements/base.txt
	@echo "installing flamingo-export and what it needs (a few minutes the first time)"
	@$(PY) $(INSTALL) $(LOCKED) -r requirements/base.txt
	@$(PY) $(INSTALL) $(THIS)
	@touch $@

# torch is not locked, since its builds differ from machine to machine (CPU, CUDA): by its exact version and first, with what only it brings.
.venv/installed-dev: .venv/made pyproject.toml requirements/dev.txt
	@echo "installing flamingo-export, PyTorch and what the tests compare with (a few minutes the first time)"
	@$(PY) $(INSTALL) $(TORCH)
	@$(PY) $(INSTALL) $(LOCKED) -r requirements/dev.txt
	@$(PY) $(INSTALL) $(THIS)
	@touch $@ .venv/installed

demo: .venv/installed
	@$(PY) scripts/demo.py --out demo-report

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

test: lint
	$(PYTEST) --durations=40 $(PYTEST_ARGS)

coverage:
	@$(MAKE) --no-print-directory test PYTEST_ARGS="--cov --cov-report= --cov-report=json:build/coverage.json $(PYTEST_ARGS)"
	$(PY) scripts/coverage_floor.py build/coverage.json $(COVERAGE_ARGS)

# A quarter of these tests' time is waiting, so one more worker than cores.
test-fast: WORKERS := 3
test-fast: .venv/installed-dev
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

.venv-uv/made: .venv/made Makefile
	@if [ ! -x .venv-uv/bin/python ]; then $(PY) -m venv .venv-uv; fi
	@.venv-uv/bin/python $(INSTALL) "$(UV)"
	@touch $@

COMPILE := .venv-uv/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	--excludes requirements/excludes.txt --custom-compile-command "make lock" pyproject.toml

lock: .venv-uv/made
	$(COMPILE) --extra cpu --group build -o requirements/base.txt
	$(COMPILE) --extra cpu --extra trace --extra train --extra serve --extra video --extra eval --extra debug --extra faiss \
		--extra constraints --group dev \
		-c requirements/base.txt -o requirements/dev.txt
	$(COMPILE) --extra cpu --extra serve --extra ray --extra otel --group ray -o requirements/ray.txt
	.venv-uv/bin/uv pip compile -q --upgrade --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" requirements/kserve.in -o requirements/kserve.txt
	$(subst --universal,--python-platform x86_64-manylinux_2_35,$(COMPILE)) --extra cpu --group triton -o requirements/triton.txt

test-oldest: .venv-uv/made
	scripts/test_versions lowest "$(TORCH)" $(PYTEST_ARGS)

test-newest: .venv-uv/made
	scripts/test_versions newest "$(TORCH)" $(PYTEST_ARGS)

# Hosts for real, each in an environment of its own: the server's and engine's own tests are in `make test`.
.venv-ray/installed .venv-triton/installed .venv-kserve/installed: .venv-%/installed: requirements/%.txt pyproject.toml .venv/made
	@echo "installing what $* needs (a few minutes the first time)"
	@test -x .venv-$*/bin/python || $(PY) -m venv .venv-$*
	@.venv-$*/bin/python $(INSTALL) $(LOCKED) -r requirements/$*.txt
	@[ $* = kserve ] || .venv-$*/bin/python $(INSTALL) $(THIS)
	@touch $@

# Each part is a command of its own (docs/development.md).
test-deploy: test-deploy-ray test-deploy-triton test-deploy-kserve test-deploy-image

DEPLOY_TEST := -m pytest -m deploy --durations=10 $(PYTEST_ARGS)
ON_NANO := FLAMINGO_NANO=build/deploy/nano.bundle OMP_NUM_THREADS=1

deploy-nano: .venv-ray/installed
	rm -rf build/deploy && mkdir -p build/deploy
	.venv-ray/bin/python -m flamingo_export build --size nano --out build/deploy/nano.bundle --parity skip

test-deploy-ray: deploy-nano
	$(ON_NANO) .venv-ray/bin/python $(DEPLOY_TEST) tests/deploy/real/test_ray_real.py tests/deploy/real/test_traces.py tests/deploy/real/test_foreign_clients.py

test-deploy-triton: deploy-nano .venv-triton/installed
	$(ON_NANO) .venv-triton/bin/python $(DEPLOY_TEST) tests/deploy/real/test_triton_real.py

# KServe's SDK cannot share an environment with the package, so the folder that it reads is written by another.
test-deploy-kserve: deploy-nano .venv-kserve/installed
	.venv-ray/bin/python -m flamingo_export package build/deploy/nano.bundle --for kserve --out build/deploy/kserve
	FLAMINGO_KSERVE=build/deploy/kserve .venv-kserve/bin/python $(DEPLOY_TEST) tests/deploy/sdk

test-deploy-image: deploy-nano
	$(ON_NANO) .venv-ray/bin/python $(DEPLOY_TEST) tests/deploy/real/test_image_steps.py

wheel-check: .venv/installed
	scripts/wheel_check

docs: .venv/installed-dev
	$(PY) -m typer flamingo_export.cli.app utils docs --name flamingo-export --title "Command line" --output docs/reference/cli.md
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

plugin:
	cmake -S . -B build -DBUILD_TESTING=OFF
	@targets="$$(cmake --build build --target help)"; \
	case "$$targets" in *flamingo_plugins*) cmake --build build --parallel --target flamingo_plugins ;; \
	*) echo "make: the plugin cannot be built here, see the messages above and docs/plugin.md" >&2; exit 1 ;; esac

gpu-wheels: .venv/made
	$(PY) scripts/gpu/wheels.py $(GPU_WHEELS_ARGS)

release: .venv/installed-dev
	@version=$$($(PY) -c "import tomllib; print(tomllib.load(open('pyproject.toml', 'rb'))['project']['version'])"); \
	[ -z "$$(git status --porcelain)" ] || { echo "make: the work tree is not clean" >&2; exit 1; }; \
	grep -Fq "## [$$version] - " CHANGELOG.md || { echo "make: CHANGELOG.md has no section for $$version" >&2; exit 1; }; \
	$(MAKE) --no-print-directory test docs wheel-check && rm -rf dist && \
	$(PY) -m hatchling build -d dist && ls -l dist && echo "git tag -a v$$version -m 'flamingo-export $$version'"

bench: .venv/installed-dev
	$(PY) benchmarks/decoder_cpu.py
	$(PY) benchmarks/idefics_cpu.py
	$(PY) benchmarks/precision_accuracy.py
	$(PY) benchmarks/quantized_cpu.py
	$(PY) benchmarks/build_memory.py --size 3b
	$(PY) benchmarks/build_memory.py --size 9b

clean:
	rm -rf .coverage* .venv .venv-uv .venv-ray .venv-triton .venv-kserve .venv-lowest .venv-newest .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .test-cache demo-report dist docs/_build docs/reference/cli.md
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
