#!/usr/bin/env bash
# Everything that a change must pass, from a clean clone on a fresh machine, as CI runs it. The
# last lines are the test runner's own.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=resources/lib/common.sh
. "$ROOT/resources/lib/common.sh"

# What cannot run here is said to be skipped, in the table too, and is never shown as if it had passed.
STAGES=(fmt clippy docs release guest vm build-tests engines fuzz tests)

usage() {
    cat <<USAGE
Usage: sudo resources/run-tests.sh [--full] [--only STAGE]...

Installs what the tests need (apt) and runs these stages, in this order, up to the first failure:

  fmt          the sources are formatted
  clippy       no compiler or clippy warning, tests included
  docs         no rustdoc warning, and the examples in the documentation, if there are any
  release      the release build
  guest        Linux guests for the tests: QEMU and User Mode Linux
  vm           launch-vm.sh --check passes, with two queue pairs too, and on each kind of device
  build-tests  the tests compile
  engines      the data path's tests with each way to read and write frames, and with polling
  fuzz         each fuzz target for some seconds, a minute in all; see fuzz.sh
  tests        all other tests, then a table of hostile inputs: what is wanted, what was seen

  --full        what takes long as often as it is meant (1,000 kills, a million sessions): 15 minutes more
  --only STAGE  this stage only; may be given several times. tests takes guest along

Without root the tests that need namespaces, a TAP or a guest say SKIP. With it they find the
guests through VHOST_USER_NET_GUEST, which this script sets.
USAGE
}

# A test that hangs must not hang a CI machine.
TESTS_LIMIT=15m
# Of tests that do everything in full.
FULL_LIMIT=1h

stage_fmt() { run_rust cargo fmt --check; }
stage_clippy() { run_rust cargo clippy --all-targets -- -D warnings; }
stage_docs() {
    RUSTDOCFLAGS="-D warnings" run_rust cargo doc --no-deps
    run_rust cargo test --quiet --doc
}
stage_release() { run_rust cargo build --release; }
stage_vm() {
    if [ "$(id -u)" != 0 ]; then
        skip_stage "not root, so no VM"
        return
    fi
    local options status
    for options in "" "--queue-pairs 2" "--device macvtap" "--device macvlan" "--device tun"; do
        status=0
        # shellcheck disable=SC2086 # words
        "$ROOT/resources/launch-vm.sh" --check $options || status=$?
        [ $status != 77 ] || { skip_stage "launch-vm.sh --check $options" && continue; }
        [ $status = 0 ] || return $status
    done
}
stage_build-tests() { run_rust cargo test --lib --bins --tests --no-run; }
# The default way to read and write frames is the one of the tests themselves.
stage_engines() {
    local way ways=(IO=uring IO=syscall POLL_US=100)
    # What would go through io_uring may go without.
    : >"$SKIPPED_TESTS"
    run_rust cargo test --test engine_choice
    [ ! -s "$SKIPPED_TESTS" ] || {
        skip_stage "no io_uring here: $(head -n1 "$SKIPPED_TESTS")"
        ways=("${ways[@]:1}")
    }
    for way in "${ways[@]}"; do
        export "VHOST_USER_NET_TEST_$way"
        run_rust cargo test --test datapath --test differential --test rx_buffers \
            --test tx_faults --test chain_faults --test mutation --test control_queue
        unset "VHOST_USER_NET_TEST_${way%%=*}"
    done
}
stage_fuzz() {
    local status=0
    : >"$SKIPPED_TESTS"
    "$ROOT/resources/fuzz.sh" --minutes 1 || status=$?
    [ $status != 77 ] || { skip_stage "fuzz targets cannot be built here" && return; }
    [ ! -s "$SKIPPED_TESTS" ] || skip_stage "$(paste -sd';' "$SKIPPED_TESTS")"
    return $status
}
stage_tests() {
    local run=run_rust limit=()
    [ "$(id -u)" != 0 ] || run=run_rust_as_root
    # Not for people: timeout takes the command away from their Ctrl-C.
    [ -z "${CI:-}" ] || limit=(timeout --kill-after=10 "$TESTS_LIMIT")
    local printed held status=0
    printed=$(mktemp) held=$(mktemp)
    : >"$SKIPPED_TESTS"
    $run "${limit[@]}" cargo test --lib --bins --tests --no-fail-fast 2>&1 | tee "$printed" | count_skipped "$held" ||
        status=$?
    hostile_table "$printed"
    cat "$held"
    rm -f "$printed" "$held"
    return $status
}

# Each hostile input with what is wanted and what became of it, by what the harness printed.
hostile_table() {
    run_rust env VHOST_USER_NET_RESULTS=- cargo test --quiet --test hostile -- \
        --exact table::table_of_the_cases --nocapture <"$1" 2>&1 | grep '^| ' || say "There is no table of hostile inputs"
}

# The harness counts a test that could not run as passed: says how many those were, which each has written to a file,
# before the harness's own last line, which is kept in the file $1 for later.
count_skipped() {
    awk -v held_file="$1" -v skipped_file="$SKIPPED_TESTS" '
        /^test result: / || (held != "" && $0 == "") { held = held $0 "\n"; next }
        { printf "%s", held; held = ""; print; fflush() }
        END { while ((getline line <skipped_file) > 0) skipped++
              printf "skipped: %d of the tests counted as passed could not run here (SKIPPED above)\n", skipped
              printf "%s", held >held_file }'
}

stage_guest() {
    if [ "$(id -u)" != 0 ]; then
        skip_stage "not root, so no guests, namespaces or TAPs"
        return
    fi
    VHOST_USER_NET_GUEST=$("$ROOT/resources/guest-image.sh" --uml)
    export VHOST_USER_NET_GUEST
}

require_components() {
    env "${TOOLCHAIN[@]}" cargo fmt --version >/dev/null 2>&1 &&
        env "${TOOLCHAIN[@]}" cargo clippy --version >/dev/null 2>&1 && return
    step "Adding rustfmt and clippy"
    quietly run_rust rustup component add rustfmt clippy || die "rustfmt and clippy are needed"
    step_done
}

TABLE=''
# What the stage that runs did not do, and why.
SKIPPED=''
# What tests that cannot run write a line to each.
SKIPPED_TESTS=''

# `skip_stage WHY` says that a stage, or a part of it, cannot run here.
skip_stage() {
    say "SKIP: $*"
    SKIPPED+="${SKIPPED:+; }$*"
}

print_table() {
    say
    say "Stages so far:"
    printf '%s' "$TABLE" >&2
    say
}

at_exit() {
    local status=$?
    [ $status = 0 ] || [ -z "$STEP" ] || {
        TABLE+=$(printf '  %-12s %7s s  FAILED, exit status %s' "$STEP" "$(step_seconds)" $status)$'\n'
        print_table
    }
    rm -f "$SKIPPED_TESTS"
    remove_namespaces
}

# Those of tests that were killed, which remove their own otherwise: their names begin with what this run had them called.
remove_namespaces() {
    local path
    for path in /run/netns/vun-"$VHOST_USER_NET_RUN"-*; do
        [ -e "$path" ] || continue
        ip netns pids "${path##*/}" | xargs -r kill -KILL || :
        ip netns delete "${path##*/}" || :
    done
}

run_stage() {
    # The table comes before the last stage: that one's own last lines are to be the last.
    [ "$1" != tests ] || print_table
    speaking_step "$1"
    SKIPPED=''
    "stage_$1"
    TABLE+=$(printf '  %-12s %7s s%s' "$1" "$(step_seconds)" "${SKIPPED:+  SKIPPED: $SKIPPED}")$'\n'
    if [ "$1" = tests ]; then STEP=''; else step_done "${SKIPPED:+SKIPPED}"; fi
}

main() {
    local only=() stage
    while [ $# -gt 0 ]; do
        case $1 in
            --only)
                [[ " ${STAGES[*]} " == *" ${2:-} "* ]] || { usage >&2 && exit 2; }
                [ "$2" != tests ] || only+=(guest)
                only+=("$2")
                shift
                ;;
            --full)
                export VHOST_USER_NET_FULL=1
                TESTS_LIMIT=$FULL_LIMIT
                ;;
            --help | -h) usage && exit 0 ;;
            *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    SKIPPED_TESTS=$(mktemp)
    # Tests of whoever builds write to it too.
    chmod 666 "$SKIPPED_TESTS"
    export VHOST_USER_NET_SKIPPED=$SKIPPED_TESTS VHOST_USER_NET_RUN=run$$
    trap at_exit EXIT
    find_rust_to_build
    require_components
    for stage in "${STAGES[@]}"; do
        [ ${#only[@]} = 0 ] || [[ " ${only[*]} " == *" $stage "* ]] || continue
        run_stage "$stage"
    done
}

# Nothing here asks anything.
main "$@" </dev/null
