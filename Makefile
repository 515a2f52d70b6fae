# Needs Python 3.11 and make; everything else comes into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Each file stays in one process, with its fixtures. tests/conftest.py says which files come first.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo up test test-fast check bench protos breaking lock install

help:
	@echo 'make demo      the whole demonstration on this machine'
	@echo 'make up        a cluster on this machine, until Ctrl-C'
	@echo 'make test      every test'
	@echo 'make test-fast unit and contract tests that compile nothing and start no process'
	@echo 'make check     format, types, import contracts, protos'
	@echo 'make bench     the benchmarks in their tiny form'
	@echo 'make protos    generate the stubs in stitch/v1'
	@echo 'make breaking  what changes in protos/ break for programs built from main'
	@echo 'make lock      resolve requirements.lock and requirements.sha256 anew'

install: $(INSTALLED)

# VERIFY=1 takes only files with the hashes in requirements.sha256. Torch has a build of its own for each kind of
# machine and is not among them.
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
ifdef VERIFY
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.sha256
endif
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/stitch demo

up: $(INSTALLED)
	$(BIN)/stitch up

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not full' tests/unit tests/contract

check: $(INSTALLED)
	$(BIN)/buf lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks --tiny

protos: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=. protos/stitch/v1/*.proto

breaking: $(INSTALLED)
	$(BIN)/buf breaking --against '.git#branch=main'

# Local version labels such as torch's `+cpu` are left out: the lock names a version, the index the build.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check '.[dev]'
	.venv-lock/bin/pip freeze --all --exclude pip --exclude stitch-serving | sed 's/+.*//' > requirements.lock
	.venv-lock/bin/pip install --quiet --disable-pip-version-check uv
	grep -v '^torch==' requirements.lock | .venv-lock/bin/uv pip compile - --quiet --universal --python-version 3.11 \
		--generate-hashes --no-deps --no-header --no-annotate --output-file requirements.sha256 > /dev/null
	rm -rf .venv-lock
