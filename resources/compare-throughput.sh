#!/usr/bin/env bash
# TCP through this back-end next to QEMU's own userspace tap, in the same guest on the same machine.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'USAGE'
Usage: sudo resources/compare-throughput.sh [RUNS] [LAUNCH-VM-OPTION...]

TCP through this back-end next to QEMU's own userspace tap, in the same guest on the same machine:
RUNS interleaved runs of each (5 unless told), their medians and ratios. A run takes about half a
minute. Options are launch-vm.sh's, but for --check and --backend, which are set here:

  sudo resources/compare-throughput.sh 3 --queue-pairs 2
USAGE
}

usage_error() {
    printf 'compare-throughput.sh: %s\n' "$*" >&2
    usage >&2
    exit 2
}

runs=5
case ${1:-} in
    --help | -h) usage && exit 0 ;;
    '' | -*) ;;
    *) runs=$1 && shift ;;
esac
[[ $runs =~ ^[1-9][0-9]*$ ]] || usage_error "RUNS is a number from 1 up, not $runs"
for option in "$@"; do
    case $option in
        --help | -h) usage && exit 0 ;;
        --check | --backend) usage_error "$option is set here" ;;
        --) break ;;
    esac
done
[ "$(id -u)" = 0 ] || usage_error "must be root, as launch-vm.sh: sudo resources/compare-throughput.sh"
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
