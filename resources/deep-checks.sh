#!/usr/bin/env bash
# What takes longer than the test command may: see docs/ledger.md for what it found, and when.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=resources/lib/common.sh
. "$ROOT/resources/lib/common.sh"

PARTS=(miri asan tsan syscalls coverage mutants deny fuzz full)
# Minutes of fuzzing.
MINUTES=60
# Orders of threads that Miri tries.
SEEDS=32
# A test of shares of time, which sanitizers change.
SHARES=both_directions_get_their_turn
# One that needs two mappings side by side, which sanitizers keep apart.
SIDE_BY_SIDE=regions_side_by_side
# And tests of how much memory a process has, which AddressSanitizer adds to and gives back late.
NOT_WITH_ASAN=(start_with_too_little_memory leave_nothing out_of_descriptors_does_not_spin keeps_no_descriptor_and_no_mapping
    leave_none_behind leave_memory_flat memory_that_is_cut_off "$SIDE_BY_SIDE" "$SHARES")
WITH_TSAN=(session control_queue datapath rx_buffers)
# Tests that start the program, which are traced: those on packet sockets apart.
TRACED=(tap macvtap tun following interface_trouble hostile sandbox packet)
# Calls that no trace of them has: on a host with another clock; by the kernel's own doing; after a signal, such as a
# debugger's; the allocator's rarer ways; of a control queue, which User Mode Linux's tests alone hand over; and what
# is traced on a TAP alone.
NOT_TRACED='control madvise|sched_yield|clock_gettime|restart_syscall|rt_sigreturn|brk|mprotect|control-queue (epoll_ctl|ioctl .*|mmap|ppoll)'
# Those that fail because they are traced.
NOT_WITH_STRACE=(frames_pass_where_little_memory that_was_stopped_for_a_while that_was_frozen_for_a_while)
# Lines of these that tests must have been to, in percent.
COVERAGE_LEAST=95
# Mutants that tests must have found, of those that they found or missed, in percent.
MUTANTS_LEAST=90
# Seconds that tests of a mutant may take: far more than they do, and than the first to fail waits for what does not come.
MUTANTS_TIMEOUT=300
# Mutants whose tests may take longer than that, in percent of all: whether they were found, or the machine was slow,
# nobody knows.
MUTANTS_SLOW_MOST=10
# What faults are put into, and the tests that are to find them: of a file's own, since each fault has these built anew.
MUTATED=(
    "src/virtqueue/chain.rs src/virtqueue/queue.rs src/virtqueue/split.rs: rings ring_exhaustive chain_faults ring_notifications"
    "src/virtqueue/iovec.rs: rings chain_faults rx_buffers tx_faults packet"
    "src/net/header.rs: header tx_faults"
    "src/vhost_user/codec.rs: session"
)

usage() {
    cat <<USAGE
Usage: sudo resources/deep-checks.sh [--only PART]... [--minutes N]

Installs what it needs and runs these parts, in this order; one that cannot run here says SKIP:

  miri      rings, and jobs for threads, under Miri: each access is within its mapping, each hand-over between
            threads is ordered (needs a nightly toolchain with components miri and rust-src)
  asan      the tests with AddressSanitizer (any toolchain that has it), root only
  tsan      tests whose threads share memory with ThreadSanitizer (needs a nightly toolchain with rust-src)
  syscalls  each system call that the sandbox lets through is made by a test (strace), root only
  coverage  lines of vhost_user, virtqueue and net that the tests have been to (cargo-llvm-cov)
  mutants   faults put into rings, header and codec, one at a time, that tests must find (cargo-mutants); hours
  deny      licences, sources and advisories of what the program is built from (cargo-deny, deny.toml)
  fuzz      each fuzz target, N minutes in all (default $MINUTES)
  full      the test command with --full

It ends with what each part took, and with status 1 if one failed.
USAGE
}

# `cargo_tool COMMAND CRATE` installs a cargo command if it is not there.
cargo_tool() {
    ! run_rust cargo "$1" --version >/dev/null 2>&1 || return 0
    step "Installing $2"
    quietly run_rust cargo install --locked "$2" || {
        say "SKIP: $2 cannot be installed"
        return 77
    }
    step_done
}

# `nightly COMPONENT...` is whether there is a nightly toolchain with these.
nightly() {
    quietly run_rust rustup component add --toolchain nightly "$@" || {
        say "SKIP: there is no nightly toolchain with $* ('rustup toolchain install nightly')"
        return 77
    }
}

# Each seed is another order of the threads, and another choice among the values that a load may see.
part_miri() {
    nightly miri rust-src || return
    run_rust env "MIRIFLAGS=-Zmiri-disable-isolation -Zmiri-many-seeds=0..$SEEDS" \
        "CARGO_TARGET_DIR=$TARGET/miri" cargo +nightly miri test --lib -- virtqueue::tests mailbox
}

part_asan() {
    local skip=()
    [ "$(id -u)" = 0 ] || { say "SKIP: not root, so most tests cannot run" && return 77; }
    for name in "${NOT_WITH_ASAN[@]}"; do skip+=(--skip "$name"); done
    # A leak is looked for by a thread of its own, which the sandbox forbids.
    run_rust_as_root env RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 \
        "CARGO_TARGET_DIR=$TARGET/asan" \
        cargo test --target "$(host)" --lib --bins --tests --no-fail-fast -- "${skip[@]}"
}

part_tsan() {
    local tests=() name
    nightly rust-src || return
    for name in "${WITH_TSAN[@]}"; do tests+=(--test "$name"); done
    run_rust env RUSTFLAGS=-Zsanitizer=thread "CARGO_TARGET_DIR=$TARGET/tsan" \
        cargo +nightly test -Zbuild-std --target "$(host)" --lib "${tests[@]}" --no-fail-fast -- --skip "$SIDE_BY_SIDE" --skip "$SHARES"
}

part_syscalls() {
    local name binary tests=() skip=() traces status=0 permitted unused
    [ "$(id -u)" = 0 ] || { say "SKIP: not root, so no test of the program can run" && return 77; }
    install_missing strace=strace
    for name in "${NOT_WITH_STRACE[@]}"; do skip+=(--skip "$name"); done
    traces=$(mktemp -d)
    for name in "${TRACED[@]}"; do tests+=(--test "$name"); done
    run_rust cargo test --no-run "${tests[@]}" 2>"$traces/built" || return 1
    for name in "${TRACED[@]}"; do
        binary=$(sed -n "s/.*(\(.*\/$name-[0-9a-f]*\))$/\1/p" "$traces/built")
        run_rust_as_root strace -f -qq -s 16 -o "|awk -f resources/lib/seen-calls.awk >$traces/$name" \
            "$binary" "${skip[@]}" || status=1
    done
    # Apart from grep, which fails where nothing is left, as it should be.
    permitted=$(awk -f "$ROOT/resources/lib/unused-calls.awk" "$ROOT/docs/sandbox.md" "${TRACED[@]/#/$traces/}") || {
        say "The traces in $traces cannot be compared with docs/sandbox.md"
        return 1
    }
    unused=$(grep -vE "($NOT_TRACED)\$" <<<"$permitted" || :)
    rm -r "$traces"
    [ -z "$unused" ] || { say "Permitted, and never made: $unused" && return 1; }
    return $status
}

host() { run_rust rustc -vV | sed -n 's/^host: //p'; }

# Counters are in a mapped file from the start on: in its sandbox a process cannot write one at its end.
part_coverage() {
    cargo_tool llvm-cov cargo-llvm-cov || return
    run_rust rustup component add llvm-tools >/dev/null 2>&1 || {
        say "SKIP: the toolchain has no component llvm-tools"
        return 77
    }
    [ "$(id -u)" = 0 ] || { say "SKIP: not root, so most tests cannot run" && return 77; }
    # The program that is left out needs more memory when it counts.
    run_rust_as_root env RUSTFLAGS=-Cllvm-args=-runtime-counter-relocation LLVM_PROFILE_FILE_NAME=vhost-%c%4m.profraw \
        cargo llvm-cov --lib --bins --tests --summary-only --fail-under-lines $COVERAGE_LEAST \
        --ignore-filename-regex '(^|/)(tests|benches)/|src/(device|daemon|memory|sandbox|worker|nic)/|src/[a-z_]*\.rs' \
        -- --skip start_with_too_little_memory
}

part_mutants() {
    local group options out name status=0
    cargo_tool mutants cargo-mutants || return
    [ "$(id -u)" = 0 ] || { say "SKIP: not root, so tests on packet sockets cannot run" && return 77; }
    out=$(mktemp -d)
    touch "$out"/{caught,missed,timeout}
    for group in "${MUTATED[@]}"; do
        # shellcheck disable=SC2086 # words
        options="$(printf -- '--file %s ' ${group%%:*}) -C=--lib $(printf -- '-C=--test=%s ' ${group#*:})"
        # Tests that fail wait for what does not come: all of them at a time. Two jobs in one target directory would run each
        # other's tests.
        # 2 is that some were missed, 3 that some took too long: both are judged below.
        # shellcheck disable=SC2086 # words
        CARGO_PROFILE_DEV_DEBUG=none RUST_TEST_THREADS=16 \
            run_rust_as_root env -u CARGO_TARGET_DIR cargo mutants --jobs 2 --timeout $MUTANTS_TIMEOUT \
            --output "$out" $options >&2 || status=$?
        [[ $status =~ ^[023]$ ]] || return $status
        for name in caught missed timeout; do cat "$out/mutants.out/$name.txt" >>"$out/$name"; done
        rm -r "$out/mutants.out"
        status=0
    done
    judge_mutants "$out" || status=1
    rm -r "$out"
    return $status
}

# `judge_mutants DIRECTORY` by the lists in its files caught, missed and timeout, which it shows but for the first.
judge_mutants() {
    (
        cd "$1" || exit
        sed 's/^/missed: /' missed
        sed 's/^/too slow to tell: /' timeout
        awk -v least=$MUTANTS_LEAST -v slow_most=$MUTANTS_SLOW_MOST '
            { count[FILENAME]++ }
            END { found = count["caught"] + 0; judged = found + count["missed"]; slow = count["timeout"] + 0
                  share = judged ? 100 * found / judged : 0; slow_share = slow ? 100 * slow / (judged + slow) : 0
                  printf "mutants: %d of %d found, %.1f %%; %d more took too long to tell, %.1f %% of all\n",
                      found, judged, share, slow, slow_share
                  exit share < least || slow_share > slow_most }' caught missed timeout
    )
}

# The database is fetched apart: what then fails is an advisory, not the network.
part_deny() {
    cargo_tool deny cargo-deny || return
    run_rust cargo deny check licenses bans sources || return 1
    run_rust cargo deny fetch db || {
        say "SKIP: the advisories cannot be fetched; licences, bans and sources are right"
        return 77
    }
    run_rust cargo deny check --disable-fetch advisories
}

part_fuzz() { "$ROOT/resources/fuzz.sh" --minutes "$MINUTES"; }
part_full() { "$ROOT/resources/run-tests.sh" --full; }

main() {
    local only=() part status failed=0 table=''
    while [ $# -gt 0 ]; do
        case $1 in
            --only)
                [[ " ${PARTS[*]} " == *" ${2:-} "* ]] || { usage >&2 && exit 2; }
                only+=("$2")
                shift
                ;;
            --minutes)
                [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { usage >&2 && exit 2; }
                MINUTES=$2
                shift
                ;;
            --help | -h) usage && exit 0 ;;
            *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    [ ${#only[@]} -gt 0 ] || only=("${PARTS[@]}")
    find_rust_to_build
    for part in "${only[@]}"; do
        status=0
        speaking_step "$part"
        "part_$part" || status=$?
        case $status in
            0) status=passed ;;
            77) status='not run, see SKIP above' ;;
            *) status="FAILED, exit status $status" failed=1 ;;
        esac
        table+=$(printf '  %-10s %8s s  %s' "$part" "$(step_seconds)" "$status")$'\n'
        step_done "$status"
    done
    say
    printf '%s' "$table" >&2
    return $failed
}

main "$@" </dev/null
