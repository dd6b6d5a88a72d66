#!/usr/bin/env bash
# Runs the README's two commands in a new Debian 12 made by debootstrap, from a clone of this checkout's last commit.
# usage: scripts/fresh.sh [FOLDER]     FOLDER holds the system and stays, for a quicker second run; without it all is removed at the end
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "fresh: run as root" >&2; exit 1; }
command -v debootstrap >/dev/null || { apt-get update -q; apt-get install -y -q --no-install-recommends debootstrap; }

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    root=$(cd "$1" && pwd)
else
    root=$(mktemp -d /var/tmp/edgemesh-fresh.XXXXXX)
    # Nothing is mounted there outside of namespaces that are gone with their processes.
    trap 'rm -rf "$root"' EXIT
fi

if [ ! -x "$root/usr/bin/env" ]; then
    mirror=$(find /etc/apt \( -name sources.list -o -name debian.sources \) \
        -exec sed -n 's/^URIs: *//p; s/^deb \([^ ]*\) bookworm .*/\1/p' {} + | head -n1)
    debootstrap --variant=minbase --include=ca-certificates,git,make bookworm "$root" "${mirror:-http://deb.debian.org/debian}"
    cp /etc/apt/sources.list.d/*.sources "$root/etc/apt/sources.list.d/" 2>/dev/null && rm -f "$root"/etc/apt/sources.list.d/nodesource.sources "$root/etc/apt/sources.list"
    # The machine's way to the package registries: name servers, proxies and certificate authorities.
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    if compgen -G '/etc/apt/apt.conf.d/*proxy*' >/dev/null; then cp /etc/apt/apt.conf.d/*proxy* "$root/etc/apt/apt.conf.d/"; fi
    if [ -f "$HOME/.cargo/config.toml" ]; then mkdir -p "$root/root/.cargo" && cp "$HOME/.cargo/config.toml" "$root/root/.cargo/"; fi
fi
rm -rf "$root/root/edgemesh"
git clone -q "$here" "$root/root/edgemesh"

# Runs a command line in the new system: its folder is the root of a mount namespace and not only a changed root, because who
# enters another namespace, as the lab does, comes out at that namespace's root. Everything in it ends with the command.
inside() {
    # shellcheck disable=SC2016
    unshare --mount --propagation private --pid --fork --kill-child bash -euc '
        root=$1 line=$2
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        for mount in sys dev; do mount --rbind "/$mount" "$root/$mount"; done
        cd "$root"
        mkdir -p .outside
        pivot_root . .outside
        cd /
        umount -l /.outside
        rmdir /.outside
        exec env -i HOME=/root TERM="${TERM:-dumb}" LANG=C.UTF-8 EDGEMESH_LAB=fresh \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            ${http_proxy:+http_proxy=$http_proxy} ${https_proxy:+https_proxy=$https_proxy} ${no_proxy:+no_proxy=$no_proxy} \
            SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt sh -c "cd /root/edgemesh && $line"
    ' inside "$root" "$1"
}
start=$SECONDS
inside "make demo"
echo "fresh: make demo took $((SECONDS - start)) s"
start=$SECONDS
inside "make test"
echo "fresh: make test took $((SECONDS - start)) s"
