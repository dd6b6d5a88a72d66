#!/bin/sh
# Records which functions idle daemons run on x86-64, for the linker (crates/function-order), with the programs of a release build in the folder
# given. To be done again after the compiler, many libraries or what idle daemons do have changed; without it daemons are only larger.
set -eu

bin=$1
lists=crates/function-order/lists
export EDGEMESH_LAB=order EDGEMESH_BIN="$bin"

results=$(mktemp -d)
trap '"$bin/lab" down; rm -r "$results"' EXIT
"$bin/lab" up
# Ten seconds after their start the daemons give back what is mapped of their programs. What they run from then on counts.
sleep 12
recorders=
for daemon in edge-a1/agent/edgemesh-agent edge-a1/edgecore/edgecore edge-b1/gateway/edgemesh-gateway; do
    host=${daemon%%/*}
    package=${daemon##*/}
    daemon=${daemon#*/}
    "$bin/bench" functions "$host" "${daemon%/*}" --seconds 150 > "$lists/$package.new" && mv "$lists/$package.new" "$lists/$package.txt" &
    recorders="$recorders $!"
done
# Brings pods, which are idle too.
"$bin/bench" --here --results "$results" --short --only rss_agent
for recorder in $recorders; do
    wait "$recorder"
done
wc -l "$lists"/*.txt
