#!/usr/bin/env bash
# Runs the fuzz targets of fuzz/, without cargo-fuzz and with the stable toolchain: a target is a
# program, and what makes it a fuzzer are flags of the compiler.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=resources/lib/common.sh
. "$ROOT/resources/lib/common.sh"

MINUTES=10
# Targets at a time. Most of what one does is on one thread.
LANES=2
# Exit status for what could not run here.
SKIPPED=77

usage() {
    cat <<USAGE
Usage: [sudo] resources/fuzz.sh [--minutes N] [TARGET]...

Builds the fuzz targets and runs them, or those that are named, $LANES at a time, for N minutes in
all (default $MINUTES), which takes half as long. What is found is a test case in fuzz/artifacts/, and
the exit status 1.

The targets, see the head of each for its oracle: $(targets | paste -sd' ')

Inputs that reached something new are kept in fuzz/corpus/, so that the next run goes on from
there. As root the target 'header' asks the kernel for its verdict too. To look at a finding, run
the target, which is in target/fuzz/ (or CARGO_TARGET_DIR), with the test case as its argument.
USAGE
}

targets() { (cd "$ROOT/fuzz/fuzz_targets" && printf '%s\n' *.rs | sed 's/\.rs$//'); }

# Nightly features on whatever toolchain there is.
fuzz_env() {
    BUILD_ENV=(RUSTC_BOOTSTRAP=1 "RUSTC_WRAPPER=$ROOT/resources/lib/instrument.sh"
        "CARGO_TARGET_DIR=$TARGET/fuzz" RUSTFLAGS=)
    HOST=$(run_rust rustc -vV | sed -n 's/^host: //p')
    BIN=$TARGET/fuzz/$HOST/release
}

# Whether this toolchain has AddressSanitizer and takes what instrument.sh adds.
can_fuzz() {
    local probe status=0
    probe=$(mktemp -d)
    echo 'fn main() {}' >"$probe/probe.rs"
    chmod -R a+rwX "$probe"
    run_rust env RUSTC_BOOTSTRAP=1 CARGO_PKG_NAME=vhost-user-net-fuzz "$ROOT/resources/lib/instrument.sh" \
        rustc --out-dir "$probe" "$probe/probe.rs" >"$probe/log" 2>&1 ||
        status=1
    [ $status = 0 ] || sed -n 1,3p "$probe/log" >&2
    rm -r "$probe"
    return $status
}

build() {
    step "Building the fuzz targets"
    quietly run_rust env "${BUILD_ENV[@]}" cargo build --manifest-path fuzz/Cargo.toml \
        --release --locked --target "$HOST" || die "the fuzz targets do not build"
    step_done
}

# `run_target NAME SECONDS` prints one line, or what was found.
run_target() {
    local log corpus=$ROOT/fuzz/corpus/$1 status=0
    log=$(mktemp)
    mkdir -p "$corpus"
    step "$1"
    "$BIN/$1" "$corpus" -artifact_prefix="$ROOT/fuzz/artifacts/$1-" -max_total_time="$2" \
        -max_len=4096 -timeout=20 -rss_limit_mb=2048 >"$log" 2>&1 || status=$?
    if [ $status = 0 ]; then
        step_done "$(sed -n 's/^Done \([0-9]*\) runs.*/\1 inputs/p; s/.*DONE *\(cov: [0-9]*\).*/\1/p' "$log" | paste -sd' ')"
        # To the caller's list of what could not run, too, if it has one.
        ! grep -a '^SKIPPED: ' "$log" >&2 || sed -n 's/^SKIPPED: //p' "$log" >>"${VHOST_USER_NET_SKIPPED:-/dev/null}"
    else
        step_done "FOUND something, exit status $status"
        grep -aA20 'panicked at\|ERROR: \|SUMMARY: ' "$log" | grep -av '^ *#\|^stack backtrace' | head -40 >&2
        grep -a 'Test unit written' "$log" >&2 || :
    fi
    rm "$log"
    return $status
}

# `run_lane SECONDS TARGET...` runs targets one after the other, all of them even if one finds something. What each prints
# comes at its end, in one piece: another lane prints too.
run_lane() {
    local seconds=$1 target report found=0
    shift
    for target in "$@"; do
        report=$(run_target "$target" "$seconds" 2>&1) || found=1
        say "$report"
    done
    return $found
}

# `run_targets SECONDS TARGET...` deals them out to the lanes.
run_targets() {
    local seconds=$1 number lane lanes=() found=0
    shift
    for ((number = 0; number < LANES; number++)); do
        # shellcheck disable=SC2046 # names without blanks
        run_lane "$seconds" $(printf '%s\n' "$@" | awk -v number=$number -v lanes=$LANES 'NR % lanes == number') &
        lanes+=($!)
    done
    # Processes in the background do not hear a Ctrl-C.
    # shellcheck disable=SC2064 # those of now
    trap "kill ${lanes[*]} 2>/dev/null || :" EXIT
    for lane in "${lanes[@]}"; do
        wait "$lane" || found=1
    done
    return $found
}

main() {
    local chosen=() seconds found=0
    while [ $# -gt 0 ]; do
        case $1 in
            --minutes)
                [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { usage >&2 && exit 2; }
                MINUTES=$2
                shift
                ;;
            --help | -h) usage && exit 0 ;;
            *)
                targets | grep -qxF -- "$1" || { usage >&2 && exit 2; }
                chosen+=("$1")
                ;;
        esac
        shift
    done
    [ ${#chosen[@]} -gt 0 ] || mapfile -t chosen < <(targets)
    find_rust_to_build
    install_missing c++=build-essential
    fuzz_env
    can_fuzz || {
        say "SKIP: this toolchain cannot build fuzz targets (AddressSanitizer and coverage are missing)"
        exit $SKIPPED
    }
    build
    mkdir -p "$ROOT/fuzz/corpus" "$ROOT/fuzz/artifacts"
    "$BIN/seeds" "$ROOT/fuzz/corpus"
    seconds=$((MINUTES * 60 / ${#chosen[@]}))
    run_targets $((seconds > 0 ? seconds : 1)) "${chosen[@]}" || found=1
    [ -z "$BUILDER" ] || chown -R "$BUILDER:" "$ROOT/fuzz/corpus" "$ROOT/fuzz/artifacts"
    return $found
}

main "$@" </dev/null
