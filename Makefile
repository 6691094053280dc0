# The habits of this repository; `make` lists them.
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml Makefile ztunnel/Cargo.toml $(wildcard ztunnel/Cargo.lock ztunnel/build.rs) \
	$(shell find ztunnel/src proto build_backend wheel_data -type f -not -name '*.pyc')
TOOLS := nft ip unshare nsenter

help: ## list the habits
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed tools ## make .venv, build and install Meshlight into it

$(VENV)/.installed: $(SOURCES)
	@echo "building and installing Meshlight into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || python3 -m venv $(VENV)
	@$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

tools:
	@missing=; for t in $(TOOLS); do command -v $$t >/dev/null || missing="$$missing $$t"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$missing from Debian's packages"; \
	    apt-get update -qq && apt-get install -y -qq nftables iproute2 util-linux >/dev/null; \
	  else echo "missing:$$missing (Debian packages nftables iproute2 util-linux)"; fi; fi
	@command -v kubectl >/dev/null || echo "kubectl is not on PATH: install yours (1.31 or later) to look inside and to run the tests"

up: setup ## boot the embedded cluster-101
	@$(BIN)/meshlight up

down: ## stop it; leaves nothing behind
	@test -x $(BIN)/meshlight && $(BIN)/meshlight down || echo "nothing installed, nothing running"

test: setup ## every test: unit, real cluster, Rust
	cd ztunnel && cargo test -q --release
	$(BIN)/pytest -n 2 --dist loadfile

check: setup ## formatters, linters, type checkers
	$(BIN)/ruff format --check src tests bench build_backend
	$(BIN)/ruff check src tests bench build_backend
	$(BIN)/mypy
	cd ztunnel && cargo fmt --check && cargo clippy --release -q -- -D warnings

bench: setup ## boot, memory, the L4 path as ratios against the direct path, the API server, istiod and pods' start
	$(BIN)/python bench/l4.py
	$(BIN)/python bench/l7.py
	$(BIN)/python bench/tracing.py
	$(BIN)/python bench/api.py
	$(BIN)/python bench/controlplane.py
	$(BIN)/python bench/pods.py

docs: ## where the documentation is
	@ls README.md CONTRIBUTING.md docs/*.md docs/adr/*.md

.PHONY: help setup tools up down test check bench docs
