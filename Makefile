# make setup | demo | test | test-long | lint | docs
#
# VENV=DIR reuses an environment that has the pinned SGLang; otherwise .venv is made here.
# VERICACHE_CACHE=DIR holds the demo's model (default .cache).
# WORKERS=1 runs one test at a time: half the memory, twice the time.

PINNED := $(shell sed -n 's/.*"sglang==\([^"]*\)".*/\1/p' pyproject.toml)

# The oracle of the compressors' tests. Its pins exclude SGLang's, so it comes without its
# dependencies; beside SGLang's own, importing it needs only these two.
KVPRESS := kvpress==0.5.5
KVPRESS_IMPORTS := cachetools fire

# Version of a distribution in an environment, empty where either is missing.
version_in = $(shell $(1)/bin/python -I -c 'from importlib.metadata import version; print(version("$(2)"))' 2>/dev/null)

ENV := .venv
ifneq ($(VENV),)
ifeq ($(call version_in,$(VENV),sglang),$(PINNED))
ENV := $(VENV)
else
$(info VENV=$(VENV) has no sglang==$(PINNED): using .venv instead)
endif
endif

PY := $(ENV)/bin/python
STAMP := $(ENV)/.sglang-vericache-setup
DOCS_STAMP := $(ENV)/.sglang-vericache-docs

# The same kernel tests once more, through Triton's interpreter instead of the torch references.
INTERPRETED_KERNELS = TRITON_INTERPRET=1 $(PY) -m pytest $(IN_PARALLEL) -m 'not gpu' tests/kernels

.PHONY: setup demo test test-long lint docs FORCE

setup: $(STAMP)

# An environment may be shared: it must hold this checkout, not another one.
# -I, because the build leaves metadata in the current directory that would be found first.
HERE := $(shell $(PY) -I -c 'from importlib.metadata import distribution as d; print("file://$(CURDIR)" in d("sglang-vericache").read_text("direct_url.json"))' 2>/dev/null)
ifneq ($(HERE),True)
$(STAMP): FORCE
endif

# A command may exist and yet not run (version managers leave such), so each candidate is tried.
$(STAMP): pyproject.toml Makefile
	@if ! $(PY) -c '' 2>/dev/null; then \
	  for python in python3.12 python3.11 none; do \
	    $$python -c 'import ensurepip, venv' 2>/dev/null && break; \
	  done; \
	  if [ $$python = none ]; then \
	    echo 'error: python3.12 or python3.11 with its venv module is needed' >&2; exit 1; \
	  fi; \
	  echo "creating $(ENV) with $$python"; \
	  $$python -m venv --clear $(ENV); \
	fi
	$(PY) -m pip install --editable '.[test]' $(KVPRESS_IMPORTS)
	$(PY) -m pip install --no-deps $(KVPRESS)
	@touch $@

# With this set, tests that lack the oracle fail instead of being skipped.
PYTEST := VERICACHE_REQUIRE_KVPRESS=1 $(PY) -m pytest

# Starting a server keeps one core busy for half a minute. The tests of a file share servers, and
# those that start any come first by name, so that the short ones fill up the end.
WORKERS ?= 2
IN_PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

demo: setup
	$(PY) -m sglang_vericache demo

# mypy follows folders, not the mapping of package-dir: this is the package as it is installed.
TYPED := build/typed

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m benchmarks render --check
	rm -rf $(TYPED) && mkdir -p $(TYPED)/sglang_vericache
	ln -s $(CURDIR)/sglang_vericache/* $(CURDIR)/kernels $(TYPED)/sglang_vericache
	ln -s $(CURDIR)/benchmarks $(TYPED)
	cd $(TYPED) && $(abspath $(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/.mypy_cache

test: lint
	$(PY) -m sglang_vericache.demo.model
	$(PYTEST) $(IN_PARALLEL) -m 'not gpu and not long'
	$(INTERPRETED_KERNELS)

test-long: lint
	$(PY) -m sglang_vericache.demo.model
	$(PYTEST) $(IN_PARALLEL) -m 'not gpu'
	$(INTERPRETED_KERNELS)

# Some pages are read from the code, so they are built where it can be imported.
$(DOCS_STAMP): $(STAMP)
	$(PY) -m pip install --editable '.[docs]'
	@touch $@

docs: $(DOCS_STAMP)
	$(PY) -m mkdocs build --strict --clean
