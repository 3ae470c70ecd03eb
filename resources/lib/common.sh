# shellcheck shell=bash disable=SC2034,SC2119,SC2120 # the sourcing scripts use it all
# What the scripts in resources/ share: messages, timed steps, missing packages, the Rust toolchain.
# Sourced, never run. The caller has set `set -euo pipefail` and $ROOT (the checkout).

# Guests and their parts are kept between runs.
if [ "$(id -u)" = 0 ]; then
    CACHE=${VHOST_USER_NET_CACHE:-/var/cache/vhost-user-net}
else
    CACHE=${VHOST_USER_NET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vhost-user-net}
fi

# Where cargo, which runs in the checkout, puts what it builds.
TARGET=${CARGO_TARGET_DIR:-target}
[[ $TARGET = /* ]] || TARGET=$ROOT/$TARGET

say() { printf '%s\n' "$*" >&2; }

die() {
    say "${0##*/}: $*"
    exit 1
}

# --- Timed steps -----------------------------------------------------------------------------

# Milliseconds, for differences only.
now() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# `seconds 1234` prints 1.2
seconds() { printf '%d.%d' $(($1 / 1000)) $(($1 % 1000 / 100)); }

STEP='' STEP_SPOKE=''
# `step TEXT` opens a step, `step_done [DETAIL]` closes it and shows its time. A script that ends
# in between has failed in that step ($STEP).
step() {
    STEP=$*
    STEP_SPOKE=
    STEP_START=$(now)
    printf '%-40s ' "$STEP" >&2
}

# For a step whose commands print things themselves.
speaking_step() {
    step "$@"
    STEP_SPOKE=yes
    say
}

step_seconds() { seconds $(($(now) - STEP_START)); }

step_done() {
    [ -z "$STEP_SPOKE" ] || printf '%-40s ' "$STEP" >&2
    printf '%6s s  %s\n' "$(step_seconds)" "$*" >&2
    STEP=
}

# `quietly COMMAND...` shows what a command printed only if it failed.
quietly() {
    local output
    output=$("$@" 2>&1 </dev/null) || {
        printf '\n%s\n' "$output" >&2
        return 1
    }
}

# --- Waiting -----------------------------------------------------------------------------------

# `gone PID`: has a process of ours ended?
gone() { ! kill -0 "$1" 2>/dev/null; }

# `wait_for SECONDS COMMAND...` until the command succeeds.
wait_for() {
    local deadline=$(($(now) + $1 * 1000))
    shift
    until "$@"; do
        [ "$(now)" -lt $deadline ] || return 1
        sleep 0.05
    done
}

# --- Packages --------------------------------------------------------------------------------

export DEBIAN_FRONTEND=noninteractive
# Another apt may be at work (unattended upgrades of a new machine): wait for it.
APT=(apt-get -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)

apt_update() {
    [ -z "${APT_UPDATED:-}" ] || return 0
    step "Reading package lists"
    quietly "${APT[@]}" update || die "apt-get update failed"
    step_done
    APT_UPDATED=yes
}

# `install_missing COMMAND=PACKAGE...` installs the packages whose command is not there.
install_missing() {
    local pair packages=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
    done
    [ ${#packages[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "please install: ${packages[*]} (no apt-get here to do it)"
    [ "$(id -u)" = 0 ] || die "please install, or run this as root: ${packages[*]}"
    apt_update
    step "Installing ${packages[*]}"
    quietly "${APT[@]}" install -y --no-install-recommends "${packages[@]}" ||
        die "cannot install ${packages[*]}"
    step_done
}

# --- Rust ------------------------------------------------------------------------------------

# Finds the toolchain, and who runs it. Under sudo it is the invoking user's, and that user builds,
# so that target/ and the crate cache stay theirs. Sets TOOLCHAIN (environment for cargo) and
# BUILDER (empty: ourselves).
find_rust() {
    local home=${HOME:-/root} user=''
    BUILDER=''
    if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        user=$SUDO_USER
        home=$(getent passwd "$user" | cut -d: -f6)
    fi
    TOOLCHAIN=("PATH=$home/.cargo/bin:$PATH")
    if [ -n "$user" ]; then
        if [ -x "$home/.cargo/bin/cargo" ]; then
            TOOLCHAIN+=("RUSTUP_HOME=$home/.rustup" "CARGO_HOME=$home/.cargo")
        fi
        # A checkout that the user cannot write to is root's to build.
        if runuser -u "$user" -- test -w "$ROOT"; then
            BUILDER=$user
            BUILDER_HOME=$home
            TOOLCHAIN+=("HOME=$home")
        fi
    fi
    require_rust
}

# `find_rust`, and what building needs beside it: rustc has a C compiler link.
find_rust_to_build() {
    find_rust
    install_missing cc=build-essential
}

require_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml")
    have=$(env "${TOOLCHAIN[@]}" rustc --version 2>/dev/null | cut -d' ' -f2) || have=none
    env "${TOOLCHAIN[@]}" cargo --version >/dev/null 2>&1 || have=none
    if [ "$have" = none ] || [ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -n1)" != "$wanted" ]; then
        die "Rust $wanted or newer is needed (found: $have; the distribution's may be too old):" \
            "install it with rustup, https://rustup.rs, then run this again"
    fi
}

# `run_rust COMMAND...` runs a command of the toolchain on this checkout, as whoever builds.
run_rust() {
    local as=()
    [ -z "$BUILDER" ] || as=(runuser -u "$BUILDER" --)
    (cd "$ROOT" && "${as[@]}" env "${TOOLCHAIN[@]}" "$@")
}

# `run_rust_as_root COMMAND...` is for tests, which are built by then and need root. What it leaves
# in the builder's directories is given back to the builder.
run_rust_as_root() {
    local status=0
    (cd "$ROOT" && env "${TOOLCHAIN[@]}" "HOME=${HOME:-/root}" "$@") || status=$?
    if [ -n "$BUILDER" ]; then
        find "$TARGET" "$BUILDER_HOME/.cargo" -xdev -user root \
            -exec chown -h "$BUILDER:" {} + 2>/dev/null || true
    fi
    return $status
}
