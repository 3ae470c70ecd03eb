#!/usr/bin/env bash
# compare-throughput.sh [RUNS] [LAUNCH-VM-OPTION...]: TCP through this back-end next to QEMU's own userspace tap, in the same guest on
# the same machine: RUNS interleaved runs of each (5 unless told), their medians and ratios. About half a minute a run.
set -euo pipefail
cd "$(dirname "$0")/.."

runs=${1:-5}
shift || true
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# One boot with one back-end; appends "guest-to-host host-to-guest" in Mbit/s to its file.
measure() {
    local backend=$1 log=$results/log
    shift
    resources/launch-vm.sh --check --backend "$backend" "$@" > "$log" 2>&1 || { cat "$log" >&2; exit 1; }
    awk '/iperf3, guest to host/ { tx = $(NF - 1) } /iperf3, host to guest/ { rx = $(NF - 1) } END { print tx, rx }' \
        "$log" >> "$results/$backend"
    printf '  %-15s %s\n' "$backend" "$(tail -n 1 "$results/$backend")"
}

median() { sort -n | awk '{ v[NR] = $1 } END { print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }

echo "Mbit/s, guest to host and host to guest:"
for ((run = 1; run <= runs; run++)); do
    echo "run $run of $runs"
    measure vhost-user-net "$@"
    measure qemu-tap "$@"
done
for direction in "1 guest to host" "2 host to guest"; do
    column=${direction%% *}
    ours=$(awk "{ print \$$column }" "$results/vhost-user-net" | median)
    theirs=$(awk "{ print \$$column }" "$results/qemu-tap" | median)
    awk -v name="${direction#* }" -v a="$ours" -v b="$theirs" \
        'BEGIN { printf "median, %s: %s, QEMU tap %s, ratio %.2f\n", name, a, b, a / b }'
done
