# shellcheck shell=bash disable=SC2034 # the sourcing scripts use GUEST_OUT and the fds
# Drives the console of a guest that runs the init script of resources/guest. Sourced, never run.
#
# What the guest prints goes to a file that is looked at again and again, not to `read -t`: that one
# aborts some versions of bash when a trap that exits interrupts it.

# `console_open DIRECTORY` makes the input CONSOLE_IN, to be the VMM's standard input, and names the
# output, CONSOLE_LOG.
console_open() {
    mkfifo "$1/console.in"
    # For reading too: then a guest that has ended does not end us with SIGPIPE.
    exec {CONSOLE_IN}<>"$1/console.in"
    CONSOLE_LOG=$1/console.log
    : >"$CONSOLE_LOG"
    GUEST_COMMANDS=0
}

console_shows() { grep -q "$1" "$CONSOLE_LOG"; }

console_shows_or_gone() { console_shows "$1" || gone "$VMM_PID"; }

# `guest SECONDS COMMAND` runs a command in the guest (process $VMM_PID); its output is in
# GUEST_OUT, its status is ours; 124 if it does not end in time.
guest() {
    # The number tells a late answer to an earlier command from ours.
    local number=$((GUEST_COMMANDS += 1)) end
    printf 'echo "@@ begin %d"\n%s\necho "@@ end %d $?"\n' $number "$2" $number >&"$CONSOLE_IN"
    wait_for "$1" console_shows_or_gone "^@@ end $number " || true
    GUEST_OUT=$(sed "1,/^@@ begin $number\$/d; /^@@ end $number /,\$d" "$CONSOLE_LOG")
    end=$(grep "^@@ end $number " "$CONSOLE_LOG") || {
        GUEST_OUT+=" (no answer within $1 s)"
        return 124
    }
    return "${end##* }"
}
