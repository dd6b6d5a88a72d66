#!/usr/bin/env bash
# Runs the README's two commands in a new Debian 12 made by debootstrap, from a clone of this checkout's last commit.
# usage: scripts/fresh.sh [FOLDER]     FOLDER (default: a temporary one) holds the system and is removed at the end
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "fresh: run as root" >&2; exit 1; }
command -v debootstrap >/dev/null || { apt-get update -q; apt-get install -y -q --no-install-recommends debootstrap; }

root=${1:-$(mktemp -d /var/tmp/edgemesh-fresh.XXXXXX)}
cleanup() {
    # What ran inside may need a moment to end.
    for _ in 1 2 3 4 5; do
        if ! mountpoint -q "$root" || umount -R "$root"; then break; fi
        sleep 1
    done
    # Nothing of the machine may still be mounted below what is about to be deleted.
    if grep -q " $root[/ ]" /proc/self/mounts; then echo "fresh: $root is still in use, left in place" >&2; return; fi
    rm -rf "$root"
}
trap cleanup EXIT

mirror=$(find /etc/apt \( -name sources.list -o -name debian.sources \) \
    -exec sed -n 's/^URIs: *//p; s/^deb \([^ ]*\) bookworm .*/\1/p' {} + | head -n1)
debootstrap --variant=minbase --include=ca-certificates,git,make bookworm "$root" "${mirror:-http://deb.debian.org/debian}"
cp /etc/apt/sources.list.d/*.sources "$root/etc/apt/sources.list.d/" 2>/dev/null && rm -f "$root"/etc/apt/sources.list.d/nodesource.sources "$root/etc/apt/sources.list"
# The machine's way to the package registries: name servers, proxies and certificate authorities.
cp /etc/resolv.conf "$root/etc/resolv.conf"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
if compgen -G '/etc/apt/apt.conf.d/*proxy*' >/dev/null; then cp /etc/apt/apt.conf.d/*proxy* "$root/etc/apt/apt.conf.d/"; fi
if [ -f "$HOME/.cargo/config.toml" ]; then mkdir -p "$root/root/.cargo" && cp "$HOME/.cargo/config.toml" "$root/root/.cargo/"; fi
# The root must be a mount point of its own: the lab's hosts change how its mounts propagate.
mount --bind "$root" "$root"
mount --make-private "$root"
for mount in proc sys dev; do mount --rbind --make-rslave "/$mount" "$root/$mount"; done
git clone -q "$here" "$root/root/edgemesh"

inside() {
    chroot "$root" env -i HOME=/root TERM="${TERM:-dumb}" LANG=C.UTF-8 EDGEMESH_LAB=fresh \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        ${http_proxy:+http_proxy=$http_proxy} ${https_proxy:+https_proxy=$https_proxy} ${no_proxy:+no_proxy=$no_proxy} \
        SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt sh -c "cd /root/edgemesh && $1"
}
start=$SECONDS
inside "make demo"
echo "fresh: make demo took $((SECONDS - start)) s"
start=$SECONDS
inside "make test"
echo "fresh: make test took $((SECONDS - start)) s"
