# The project's commands. `make demo` and `make test` do everything that they need on a fresh Debian 12 (as root).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(HOME)/.cache/edgemesh/target
# A second kubectl for the API's tests; scripts/setup.sh fetches it.
export KUBECTL_OLD ?= $(HOME)/.cache/edgemesh/kubectl-old/usr/bin/kubectl
export PATH := $(HOME)/.cargo/bin:$(PATH)
BIN := $(CARGO_TARGET_DIR)/debug

.PHONY: help setup build demo test check bench order soak fresh

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## install what is needed (Debian packages, bpf-linker); a second when all is there
	@scripts/setup.sh

build: setup ## build every program
	cargo build --locked --workspace --bins

demo: build ## bring the lab up and show every scene, narrated
	$(BIN)/demo

test: build ## all tests: unit, whole daemons, the scenes in the lab
	cargo test --locked --workspace

check: setup ## formatting, lints, docs, and licences where cargo-deny is installed
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet
	@if command -v cargo-deny >/dev/null; then cargo deny --workspace check; else echo "check: cargo-deny is not installed, licences not checked"; fi

bench: ## measure against direct paths and peers; one JSON file a row in bench-results/
	scripts/setup.sh --bench
	cargo build --locked --release --workspace --bins
	EDGEMESH_BIN=$(CARGO_TARGET_DIR)/release $(CARGO_TARGET_DIR)/release/bench

order: ## record which functions idle daemons run, for the linker, where compiler, libraries or the checkout's folder are others
	cargo build --locked --release --workspace --bins
	scripts/order-functions.sh $(CARGO_TARGET_DIR)/release

soak: build ## ten minutes of endpoints that come and go under load; SOAK_SECONDS for another time
	$(BIN)/soak

fresh: ## try `make demo` and `make test` in a new Debian 12
	scripts/fresh.sh
