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
  --only STAGE  this stage only; may be given several times

A stage that has no end within $LIMIT fails ($FULL_LIMIT with --full). Without root the tests that need
namespaces, a TAP or a guest say SKIP. With it they find the guests through VHOST_USER_NET_GUEST,
which this script sets.
USAGE
}

# What hangs must not hang a CI machine.
LIMIT=15m
# Where tests do everything in full.
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
    local accel options status
    # A KVM that runs no guest takes seconds to show that.
    accel=$("$ROOT/resources/launch-vm.sh" --print-accel)
    for options in "" "--queue-pairs 2" "--device macvtap" "--device macvlan" "--device tun"; do
        status=0
        # shellcheck disable=SC2086 # words
        "$ROOT/resources/launch-vm.sh" --check --accel "$accel" --seconds 1 $options || status=$?
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
    local run=run_rust printed held status=0
    if [ "$(id -u)" = 0 ]; then
        run=run_rust_as_root
        VHOST_USER_NET_GUEST=$("$ROOT/resources/guest-image.sh" --uml)
        export VHOST_USER_NET_GUEST
    fi
    printed=$(mktemp) held=$(mktemp)
    : >"$SKIPPED_TESTS"
    $run cargo test --lib --bins --tests --no-fail-fast 2>&1 | tee "$printed" | count_skipped "$held" ||
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
    "$ROOT/resources/guest-image.sh" --uml
}

require_components() {
    env "${TOOLCHAIN[@]}" cargo fmt --version >/dev/null 2>&1 &&
        env "${TOOLCHAIN[@]}" cargo clippy --version >/dev/null 2>&1 && return
    step "Adding rustfmt and clippy"
    quietly run_rust rustup component add rustfmt clippy || die "rustfmt and clippy are needed"
    step_done
}

TABLE=''
# timeout's, with whose number for a name all processes of the stage that runs are a group.
STAGE_PID=''

# `skip_stage WHY` says that a stage, or a part of it, cannot run here.
skip_stage() {
    say "SKIP: $*"
    echo "$*" >>"$SKIPPED"
}

print_table() {
    say
    say "Stages so far:"
    printf '%s' "$TABLE" >&2
    say
}

at_exit() {
    local status=$? why
    trap '' INT TERM HUP
    thaw_what_is_frozen
    end_stage
    [ -z "$STEP" ] || {
        why="exit status $status"
        [ $status != 0 ] || why="told to end"
        [ $status != 124 ] || why="no end within $LIMIT"
        TABLE+=$(printf '  %-12s %7s s  FAILED, %s' "$STEP" "$(step_seconds)" "$why")$'\n'
        print_table
    }
    remove_what_tests_left
    rm -rf "$TMPDIR"
}

# What runs still, where the stage failed or hangs, or this script was told to end.
end_stage() {
    [ -n "$STAGE_PID" ] || return 0
    kill -TERM -- "-$STAGE_PID" 2>/dev/null || return 0
    wait_for 10 stage_gone || kill -KILL -- "-$STAGE_PID" || :
}

stage_gone() { ! kill -0 -- "-$STAGE_PID" 2>/dev/null; }

# Tests that are killed leave what they remove otherwise; the names begin with what this run had them called.
control_groups() { find /sys/fs/cgroup{/freezer,} -maxdepth 1 -name "vun-$VHOST_USER_NET_RUN-*" 2>/dev/null || :; }

# It would not even end.
thaw_what_is_frozen() {
    local path
    for path in $(control_groups); do
        { echo THAWED >"$path/freezer.state" || echo 0 >"$path/cgroup.freeze"; } 2>/dev/null || :
    done
}

remove_what_tests_left() {
    local path
    for path in /run/netns/vun-"$VHOST_USER_NET_RUN"-*; do
        [ -e "$path" ] || continue
        ip netns pids "${path##*/}" | xargs -r kill -KILL || :
        ip netns delete "${path##*/}" || :
    done
    for path in $(control_groups); do
        wait_for 3 rmdir "$path" 2>/dev/null || say "Cannot remove $path"
    done
}

run_stage() {
    local skipped
    # The table comes before the last stage: that one's own last lines are to be the last.
    [ "$1" != tests ] || print_table
    speaking_step "$1"
    : >"$SKIPPED"
    # This script once more, in a process group of its own: so all of it can be ended.
    timeout --kill-after=10 "$LIMIT" bash "$0" --stage "$1" &
    STAGE_PID=$!
    wait "$STAGE_PID"
    STAGE_PID=''
    skipped=$(paste -sd';' "$SKIPPED")
    TABLE+=$(printf '  %-12s %7s s%s' "$1" "$(step_seconds)" "${skipped:+  SKIPPED: $skipped}")$'\n'
    if [ "$1" = tests ]; then STEP=''; else step_done "${skipped:+SKIPPED}"; fi
}

# What this run keeps for its time, in a directory where all that it starts, whoever that runs as, has its temporary files.
begin_run() {
    TMPDIR=$(mktemp -d -t vun-XXXXXX)
    chmod 1777 "$TMPDIR"
    # To each of these a line is written: by a stage of what it did not do, and by tests that cannot run. Whoever builds
    # runs tests too.
    SKIPPED=$TMPDIR/skipped SKIPPED_TESTS=$TMPDIR/skipped-tests
    touch "$SKIPPED" "$SKIPPED_TESTS"
    chmod 666 "$SKIPPED_TESTS"
    export TMPDIR SKIPPED SKIPPED_TESTS VHOST_USER_NET_SKIPPED=$SKIPPED_TESTS VHOST_USER_NET_RUN=run$$
    trap at_exit EXIT
}

main() {
    local only=() stage
    while [ $# -gt 0 ]; do
        case $1 in
            --only)
                [[ " ${STAGES[*]} " == *" ${2:-} "* ]] || { usage >&2 && exit 2; }
                only+=("$2")
                shift
                ;;
            --stage)
                # Of run_stage only.
                find_rust
                "stage_$2"
                exit
                ;;
            --full)
                export VHOST_USER_NET_FULL=1
                LIMIT=$FULL_LIMIT
                ;;
            --help | -h) usage && exit 0 ;;
            *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    begin_run
    find_rust_to_build
    require_components
    for stage in "${STAGES[@]}"; do
        [ ${#only[@]} = 0 ] || [[ " ${only[*]} " == *" $stage "* ]] || continue
        run_stage "$stage"
    done
}

# Nothing here asks anything.
main "$@" </dev/null
