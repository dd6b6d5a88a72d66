#!/usr/bin/env bash
# Builds the lab's container images as archives that `ctr images import` takes: there is no registry at hand.
# usage: scripts/build-images.sh FOLDER     writes FOLDER/{pause,demo}.tar, and the lab's client FOLDER/call for use on hosts;
#                                           does nothing when they are up to date
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: build-images.sh FOLDER}
sources=$here/tests/lab/images
mkdir -p "$out"

stamp=$(cat "$0" "$sources"/*.rs /bin/busybox | sha256sum | cut -d' ' -f1)
if [ -f "$out/stamp" ] && [ "$(cat "$out/stamp")" = "$stamp" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A static program with nothing but the standard library, so that it runs in an empty image.
compile() { rustc --edition 2024 -O -C target-feature=+crt-static -C strip=symbols -o "$2" "$sources/$1"; }

# image NAME:TAG ROOT ARCHIVE CMD: one layer with the files of ROOT (docker-archive layout).
image() {
    local reference=$1 root=$2 archive=$3 command=$4 dir=$work/archive-$RANDOM
    mkdir -p "$dir"
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$root" -cf "$dir/layer.tar" .
    local layer config
    layer=$(sha256sum "$dir/layer.tar" | cut -d' ' -f1)
    printf '{"architecture":"amd64","os":"linux","config":{"Cmd":["%s"],"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
        "$command" "$layer" >"$dir/config.json"
    config=$(sha256sum "$dir/config.json" | cut -d' ' -f1)
    mv "$dir/config.json" "$dir/$config.json"
    printf '[{"Config":"%s.json","RepoTags":["%s"],"Layers":["layer.tar"]}]' "$config" "$reference" >"$dir/manifest.json"
    tar -C "$dir" -cf "$archive.partial" manifest.json "$config.json" layer.tar
    mv "$archive.partial" "$archive"
}

mkdir -p "$work/pause/bin" "$work/demo/bin" "$work/demo/tmp" "$work/demo/etc" "$work/demo/proc" "$work/demo/sys"
compile pause.rs "$work/pause/bin/pause"
compile demo_server.rs "$work/demo/bin/demo-server"
compile call.rs "$work/demo/bin/call"
cp "$work/demo/bin/call" "$out/call"
cp /bin/busybox "$work/demo/bin/busybox"
for applet in $(/bin/busybox --list | grep -vx busybox); do ln -sf busybox "$work/demo/bin/$applet"; done
image edgemesh.dev/pause:1 "$work/pause" "$out/pause.tar" /bin/pause
image edgemesh.dev/demo:1 "$work/demo" "$out/demo.tar" /bin/demo-server
echo "$stamp" >"$out/stamp"
