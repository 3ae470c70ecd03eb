#!/usr/bin/env bash
# Boots a Linux guest whose network card is vhost-user-net, in a network namespace of its own, and
# gives its console; with --check it sends traffic both ways instead and says what flowed.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=resources/lib/common.sh
. "$ROOT/resources/lib/common.sh"
# shellcheck source=resources/lib/console.sh
. "$ROOT/resources/lib/console.sh"

usage() {
    cat <<'USAGE'
Usage: sudo resources/launch-vm.sh [OPTION]... [-- BACK-END-OPTION...]

Installs what is missing (apt), builds the back-end, boots a small Linux guest on it and gives the
guest's console. Host 10.99.0.1 and guest 10.99.0.2 are alone in a network namespace. At the end that
is gone with all that is in it; packages, the guest's parts in the cache and target/ stay.

  --check             no console: send traffic both ways, show what flowed, exit 0 only if it did
  --queue-pairs N     queue pairs of the network card (1)
  --memory SIZE       the guest's memory, as 512M or 2G (512M)
  --smp N             the guest's processors (as many as queue pairs)
  --vmm NAME          qemu (default) or cloud-hypervisor; the latter needs its binary in PATH and
                      a working KVM: without them nothing is run and the exit status is 77
  --device KIND       what the back-end ends the card on: tap (default); macvtap: on one end of a veth
                      pair, whose other end is the host; macvlan: the same, through a packet socket;
                      tun: a routed network, with another host (10.98.0.1, fd98::1) beyond this one
  --backend NAME      vhost-user-net (default) or qemu-tap: QEMU's own, to compare with
  --accel NAME        auto (default: KVM if it runs a guest here, else emulation), kvm or tcg
  --print-accel       no guest: print what auto stands for here, for the --accel of several runs
  --seconds N         how long --check has iperf3 send, each way (3)
  --keep-logs DIR     copy the logs of guest, VMM and back-end there at the end
  --help              this text

What follows -- is passed to the back-end, as in: -- --log-level debug
USAGE
}

usage_error() {
    say "launch-vm.sh: $*"
    usage >&2
    exit 2
}

HOST_IP=10.99.0.1
GUEST_IP=10.99.0.2
# For --device tun: the guest's, its gateway's, and those of a host beyond.
GUEST_IP6=fd99::2
GATEWAY6=fe80::1
BEYOND_IP=10.98.0.1
BEYOND_IP6=fd98::1
MAC=52:54:00:12:34:56
NETNS=vhost-user-net-$$
# The interface that the host reaches the guest through.
HOST_SIDE=tap0
DEVICE_OPTIONS=()
FILE_MIB=8
IPERF_SECONDS=3
# An emulated guest on a busy machine takes 10 s.
BOOT_SECONDS=90
# Without offloads no frame is longer than this.
PLAIN_FRAME=1514

MODE=console PAIRS=1 MEMORY=512M SMP='' VMM=qemu DEVICE=tap BACKEND=vhost-user-net ACCEL=auto LOGS=''
BACKEND_OPTIONS=()

parse_options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --check) MODE=check ;;
            --print-accel) MODE=print-accel ;;
            --help | -h) usage && exit 0 ;;
            --queue-pairs | --memory | --smp | --vmm | --device | --backend | --accel | --seconds | --keep-logs)
                [ $# -ge 2 ] || usage_error "$1 needs a value"
                case $1 in
                    --queue-pairs) PAIRS=$2 ;;
                    --memory) MEMORY=$2 ;;
                    --smp) SMP=$2 ;;
                    --vmm) VMM=$2 ;;
                    --device) DEVICE=$2 ;;
                    --backend) BACKEND=$2 ;;
                    --accel) ACCEL=$2 ;;
                    --seconds) IPERF_SECONDS=$2 ;;
                    --keep-logs) LOGS=$2 ;;
                esac
                shift
                ;;
            --) shift && BACKEND_OPTIONS=("$@") && break ;;
            *) usage_error "unknown option $1" ;;
        esac
        shift
    done
    SMP=${SMP:-$PAIRS}
    [[ $PAIRS =~ ^[1-9][0-9]*$ ]] || usage_error "--queue-pairs wants a number, not $PAIRS"
    [[ $SMP =~ ^[1-9][0-9]*$ ]] || usage_error "--smp wants a number, not $SMP"
    [[ $IPERF_SECONDS =~ ^[1-9][0-9]*$ ]] || usage_error "--seconds wants a number, not $IPERF_SECONDS"
    [[ $MEMORY =~ ^[1-9][0-9]*[MG]$ ]] || usage_error "--memory wants a size such as 512M, not $MEMORY"
    [[ $VMM =~ ^(qemu|cloud-hypervisor)$ ]] || usage_error "unknown VMM $VMM"
    [[ $DEVICE =~ ^(tap|macvtap|macvlan|tun)$ ]] || usage_error "unknown device $DEVICE"
    [ "$DEVICE" = tap ] || [ "$BACKEND" != qemu-tap ] || usage_error "qemu-tap has a TAP only"
    [[ $BACKEND =~ ^(vhost-user-net|qemu-tap)$ ]] || usage_error "unknown back-end $BACKEND"
    [[ $ACCEL =~ ^(auto|kvm|tcg)$ ]] || usage_error "unknown accelerator $ACCEL"
    [ "$VMM$BACKEND" != cloud-hypervisorqemu-tap ] || usage_error "qemu-tap is a part of QEMU"
}

# --- Beginning and end -----------------------------------------------------------------------

WORK='' VMM_PID='' BACKEND_PID='' HELPERS=() TERMINAL=''

# `stop PID` ends a process of ours, kindly at first.
stop() {
    [ -n "$1" ] && kill "$1" 2>/dev/null || return 0
    wait_for 3 gone "$1" || kill -9 "$1" 2>/dev/null || true
    # The shell's own word on it ("Killed") is not for the reader.
    { wait "$1" || true; } 2>/dev/null
}

clean_up() {
    local status=$? log pid
    trap - EXIT
    trap '' INT TERM HUP
    if [ $status != 0 ] && [ -n "$STEP" ]; then
        say
        say "Failed: $STEP"
    fi
    stop "$VMM_PID"
    stop "$BACKEND_PID"
    for pid in "${HELPERS[@]}"; do
        stop "$pid"
    done
    if [ -n "$WORK" ]; then
        for log in "$WORK"/*.log; do
            if [ $status != 0 ] && [ $status != 77 ] && [ $status -lt 128 ] && [ -s "$log" ]; then
                say "--- end of ${log##*/}"
                tail -n 15 "$log" >&2
            fi
            [ -z "$LOGS" ] || { mkdir -p "$LOGS" && cp "$log" "$LOGS/"; } || true
        done
    fi
    if [ -e "/run/netns/$NETNS" ]; then
        # Whoever is still in our namespace is ours.
        for pid in $(ip netns pids "$NETNS"); do
            kill -9 "$pid" 2>/dev/null || true
        done
        # Its interfaces end with it.
        ip netns delete "$NETNS" || true
        [ "$DEVICE" != tun ] || ip netns delete "$NETNS-beyond" || true
    fi
    [ -z "$TERMINAL" ] || stty "$TERMINAL" || true
    [ -z "$WORK" ] || rm -rf "$WORK"
    exit $status
}

# --- Steps -----------------------------------------------------------------------------------

# KVM may be there and not run a guest: nested and para-virtualised ones fail in many ways. So boot
# one. Sets KVM_FAULT if it does not come up.
kvm_runs_a_guest() {
    local pid log=$WORK/kvm.log
    KVM_FAULT="no /dev/kvm"
    [ -w /dev/kvm ] || return 1
    (
        cd "$WORK" # QEMU may abort: no core file in the checkout
        ulimit -c 0
        exec qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
            -machine q35 -accel kvm -cpu host -m 256M -kernel "$GUEST/vmlinuz" \
            -initrd "$GUEST/initrd.gz" -append "console=ttyS0 earlyprintk=ttyS0" \
            -serial "file:$log" </dev/null
    ) >"$WORK/kvm-errors.log" 2>&1 &
    pid=$!
    # Not the shell's business: it would report an abort.
    disown "$pid"
    HELPERS+=("$pid")
    # Two limits: a sound KVM says its first word in a second, a slow one may need more to get up.
    if wait_for 5 output_or_gone "$pid" "Linux version" "$log" &&
        wait_for 15 output_or_gone "$pid" "@@ READY" "$log" &&
        grep -q "@@ READY" "$log"; then
        KVM_FAULT=
    else
        KVM_FAULT=$(head -n1 "$WORK/kvm-errors.log" | cut -c1-100)
        KVM_FAULT=${KVM_FAULT:-no sign of life from a guest}
    fi
    stop "$pid"
    rm -f "$log" "$WORK/kvm-errors.log"
    [ -z "$KVM_FAULT" ]
}

output_or_gone() { grep -qs "$2" "$3" || gone "$1"; }

choose_accelerator() {
    if [ "$ACCEL" = auto ]; then
        step "Trying KVM"
        if kvm_runs_a_guest; then
            ACCEL=kvm
            step_done "runs a guest"
        else
            ACCEL=tcg
            step_done "runs no guest here ($KVM_FAULT): emulating, which is slower"
        fi
    fi
}

# Exit status 77 is the convention for "skipped".
skip_run() {
    say "launch-vm.sh: nothing was run: $*"
    exit 77
}

require_cloud_hypervisor() {
    local fault=
    if ! command -v cloud-hypervisor >/dev/null; then
        fault="there is no cloud-hypervisor in PATH"
    elif ! kvm_runs_a_guest; then
        fault="KVM runs no guest here ($KVM_FAULT)"
    fi
    [ -z "$fault" ] || skip_run "$fault"
    ACCEL=kvm
}

# In the background it is this array that must be used: a function there is one more process, and
# its number, not the program's, would be in $!.
IN_NS=(ip netns exec "$NETNS")
in_ns() { "${IN_NS[@]}" "$@"; }

make_network() {
    ip netns add "$NETNS"
    in_ns ip link set lo up
    "make_$DEVICE"
    in_ns ip address add $HOST_IP/24 dev "$HOST_SIDE"
    in_ns ip link set "$HOST_SIDE" up
}

make_tap() {
    [ -c /dev/net/tun ] || modprobe tun 2>/dev/null || die "no /dev/net/tun: this kernel has no TAP"
    local flags=(vnet_hdr)
    [ "$PAIRS" = 1 ] || flags+=(multi_queue)
    in_ns ip tuntap add dev tap0 mode tap "${flags[@]}"
    DEVICE_OPTIONS=(--tap tap0)
}

# `make_on_veth KIND`: a device on one end of a veth pair, with the guest's address.
make_on_veth() {
    local make=(in_ns ip link add link veth1 name "${1}0" address "$MAC" type "$1" mode bridge)
    in_ns ip link add veth0 type veth peer name veth1
    in_ns ip link set veth1 up
    "${make[@]}" 2>/dev/null || { modprobe "$1" 2>/dev/null && "${make[@]}"; } ||
        skip_run "this kernel has no ${1^^}"
    in_ns ip link set "${1}0" up
    HOST_SIDE=veth0
}

make_macvtap() {
    make_on_veth macvtap
    DEVICE_OPTIONS=(--macvtap macvtap0)
}

make_macvlan() {
    make_on_veth macvlan
    DEVICE_OPTIONS=(--interface macvlan0)
}

make_tun() {
    [ -c /dev/net/tun ] || modprobe tun 2>/dev/null || die "no /dev/net/tun: this kernel has no TUN"
    local flags=(vnet_hdr)
    [ "$PAIRS" = 1 ] || flags+=(multi_queue)
    in_ns ip tuntap add dev tun0 mode tun "${flags[@]}"
    in_ns ip link set tun0 up
    HOST_SIDE=tun0
    DEVICE_OPTIONS=(--tun tun0 --gateway "$HOST_IP,$GATEWAY6")
    # What the guest reaches through the host: it is routed there, and back.
    ip netns add "$NETNS-beyond"
    in_ns ip link add veth0 type veth peer name veth1 netns "$NETNS-beyond"
    in_ns ip address add 10.98.0.2/24 dev veth0
    in_ns ip address add fd98::2/64 dev veth0 nodad
    in_ns ip link set veth0 up
    in_ns ip -6 route add "$GUEST_IP6/128" dev tun0
    in_ns sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
    ip -n "$NETNS-beyond" address add $BEYOND_IP/24 dev veth1
    ip -n "$NETNS-beyond" address add $BEYOND_IP6/64 dev veth1 nodad
    ip -n "$NETNS-beyond" link set veth1 up
    ip -n "$NETNS-beyond" route add default via 10.98.0.2
    ip -n "$NETNS-beyond" -6 route add default via fd98::2
}

start_backend() {
    "${IN_NS[@]}" "$TARGET/release/vhost-user-net" --socket-path "$WORK/net.sock" \
        "${DEVICE_OPTIONS[@]}" --queue-pairs "$PAIRS" "${BACKEND_OPTIONS[@]}" >"$WORK/backend.log" 2>&1 </dev/null &
    BACKEND_PID=$!
    wait_for 5 socket_or_gone || die "the back-end did not make its socket within 5 s"
    ! gone "$BACKEND_PID" || die "the back-end has ended"
}

socket_or_gone() { [ -S "$WORK/net.sock" ] || gone "$BACKEND_PID"; }

# Whether the installed QEMU is of this version (such as 9.2) or newer.
qemu_is_at_least() {
    local version
    version=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\.[0-9]*\).*/\1/p')
    [ "$(printf '%s\n' "$1" "$version" | sort -V | head -n1)" = "$1" ]
}

# QEMU's word for "try again every second" changed with 9.2.
reconnect_option() {
    if qemu_is_at_least 9.2; then
        echo reconnect-ms=1000
    else
        echo reconnect=1
    fi
}

# Sets COMMAND to the VMM's command line. The arguments are the guest's style of console.
vmm_command() {
    local cpu=max accel=tcg,thread=multi netdev ring=1024
    local words="console=ttyS0 quiet guest.ip=$GUEST_IP/24 guest.peer=$HOST_IP guest.queues=$PAIRS $*"
    if [ "$VMM" = cloud-hypervisor ]; then
        COMMAND=(cloud-hypervisor --kernel "$GUEST/vmlinuz" --initramfs "$GUEST/initrd.gz"
            --cmdline "$words" --cpus "boot=$SMP" --memory "size=$MEMORY,shared=on"
            --net "vhost_user=true,socket=$WORK/net.sock,num_queues=$((2 * PAIRS)),queue_size=1024,vhost_mode=client,mac=$MAC"
            --serial tty --console off)
        return
    fi
    # Emulated processors with a thread each run now and then into a breakpoint that their kernel has taken away (Oops: int3, on
    # QEMU 7.2 at least). Two have time enough on one.
    [ "$SMP" -gt 2 ] || accel=tcg,thread=single
    [ "$ACCEL" = tcg ] || { cpu=host accel=kvm; }
    # shellcheck disable=SC2054 # the commas are QEMU's
    COMMAND=(qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot
        # The back-end reaches the guest's memory through this file.
        -object "memory-backend-memfd,id=mem0,size=$MEMORY,share=on"
        -machine q35,memory-backend=mem0 -m "$MEMORY" -accel "$accel" -cpu "$cpu" -smp "$SMP"
        -kernel "$GUEST/vmlinuz" -initrd "$GUEST/initrd.gz" -append "$words")
    if [ "$BACKEND" = vhost-user-net ]; then
        COMMAND+=(-chardev "socket,id=chr0,path=$WORK/net.sock,$(reconnect_option)")
        netdev="vhost-user,id=net0,chardev=chr0,queues=$PAIRS"
    else
        netdev="tap,id=net0,ifname=$HOST_SIDE,script=no,downscript=no,vhost=off,queues=$PAIRS"
        # QEMU allows more for vhost-user only.
        ring=256
    fi
    local device="virtio-net-pci,netdev=net0,mac=$MAC,romfile=,rx_queue_size=1024,tx_queue_size=$ring"
    [ "$PAIRS" = 1 ] || device+=",mq=on"
    if [ "$BACKEND-$ACCEL" = vhost-user-net-tcg ] && ! qemu_is_at_least 9.0; then
        # Older ones crash when an emulated guest unmasks an MSI-X vector of a vhost-user device (they act as if KVM were
        # there), so the guest gets none and uses the one interrupt line.
        device+=",vectors=0"
    else
        device+=",vectors=$((2 * PAIRS + 2))"
    fi
    COMMAND+=(-netdev "$netdev" -device "$device")
}

run_console() {
    vmm_command guest.shell=interactive
    [ "$VMM" != qemu ] || COMMAND+=(-serial mon:stdio)
    say
    say "The guest's console follows. Leave it with: poweroff$([ "$VMM" != qemu ] || echo ', or Ctrl-A X')"
    say "The host is $HOST_IP; iperf3 -s runs there. The guest is $GUEST_IP."
    say
    TERMINAL=$(stty -g)
    # In the background with our terminal, so that a signal to this script is not kept waiting.
    "${IN_NS[@]}" "${COMMAND[@]}" <&0 2>"$WORK/vmm.log" &
    VMM_PID=$!
    wait "$VMM_PID"
}

# Leaves the guest's console at the first command.
boot_for_check() {
    local attempt
    vmm_command
    [ "$VMM" != qemu ] || COMMAND+=(-serial stdio)
    console_open "$WORK"
    for attempt in first second; do
        "${IN_NS[@]}" "${COMMAND[@]}" <"$WORK/console.in" >>"$CONSOLE_LOG" 2>"$WORK/vmm.log" &
        VMM_PID=$!
        wait_for $BOOT_SECONDS console_shows_or_gone '^@@ READY\|Kernel panic' || true
        ! console_shows '^@@ READY' || return 0
        [ $attempt = first ] || break
        is_emulators_fault || break
        say && say "The guest's kernel panicked in emulation before it used its network card; booting it once more"
        stop "$VMM_PID"
        cp "$CONSOLE_LOG" "$WORK/panic.log"
        : >"$CONSOLE_LOG"
    done
    if gone "$VMM_PID"; then die "$VMM has ended"; fi
    die "no guest came up within $BOOT_SECONDS s"
}

# QEMU's emulation of several processors has faults of its own, on busy hosts. What the guest did with us is none of them.
is_emulators_fault() {
    [ "$ACCEL" = tcg ] && console_shows 'Kernel panic' || return 1
    [ "$BACKEND" = vhost-user-net ] || return 0
    read_backend_counters && [ "$(backend rx_frames) $(backend tx_frames)" = "0 0" ]
}

# --- Checks ----------------------------------------------------------------------------------
# Each returns whether it passed, with a word on it in DETAIL.

FAILED=()

check() {
    DETAIL=
    step "$1"
    if "$2"; then
        step_done "$DETAIL"
    else
        step_done "FAILED  $DETAIL"
        FAILED+=("$1")
    fi
}

check_address() {
    guest 10 "ip -o -4 address show dev eth0; ls -d /sys/class/net/eth0/queues/rx-* | wc -l"
    DETAIL="$GUEST_IP on eth0, ${GUEST_OUT##*$'\n'} of $PAIRS queue pairs"
    [[ $GUEST_OUT == *"inet $GUEST_IP/24"*$'\n'"$PAIRS" ]]
}

check_ping() {
    guest 20 "ping -c 5 -i 0.2 -W 2 $HOST_IP"
    DETAIL=$(grep -o '[0-9]* packets received\|min/avg.*' <<<"$GUEST_OUT" | paste -sd' ')
    [[ $GUEST_OUT == *" 0% packet loss"* ]]
}

check_beyond() {
    guest 60 "ip address add $GUEST_IP6/128 dev eth0 nodad && ip -6 route add default via $GATEWAY6 dev eth0 &&
        ping -c 3 -i 0.2 -W 2 $BEYOND_IP && ping -6 -c 3 -i 0.2 -W 2 $BEYOND_IP6" || true
    DETAIL=$(grep -o '[0-9]* packets received' <<<"$GUEST_OUT" | paste -sd' ')
    [ "$(grep -c ' 0% packet loss' <<<"$GUEST_OUT")" = 2 ] || { DETAIL=$GUEST_OUT && return 1; }
}

listening() { in_ns ss -Hltn "sport = :$1" | grep -q .; }

# `serve PORT COMMAND...` starts a listener on the host's side.
serve() {
    local port=$1
    shift
    "${IN_NS[@]}" "$@" >>"$WORK/host.log" 2>&1 </dev/null &
    HELPERS+=($!)
    wait_for 5 listening "$port"
}

file_sum() { sha256sum "$1" | cut -c1-64; }

check_file_to_host() {
    local sum
    serve 5001 socat -u TCP-LISTEN:5001 "OPEN:$WORK/received,creat" || return 1
    guest 60 "dd if=/dev/urandom of=/tmp/sent bs=1M count=$FILE_MIB 2>/dev/null
        timeout 30 nc $HOST_IP 5001 </tmp/sent && sha256sum /tmp/sent" || { DETAIL=$GUEST_OUT && return 1; }
    sum=${GUEST_OUT%% *}
    wait_for 5 gone "${HELPERS[-1]}"
    DETAIL="$FILE_MIB MiB, sha256 ${sum:0:12}… sent, $(file_sum "$WORK/received" | cut -c1-12)… received"
    [ "$sum" = "$(file_sum "$WORK/received")" ]
}

check_file_to_guest() {
    local sum
    dd if=/dev/urandom of="$WORK/sent" bs=1M count=$FILE_MIB status=none
    sum=$(file_sum "$WORK/sent")
    serve 5002 socat -u "OPEN:$WORK/sent" TCP-LISTEN:5002 || return 1
    guest 60 "timeout 30 nc $HOST_IP 5002 >/tmp/received && sha256sum /tmp/received" ||
        { DETAIL=$GUEST_OUT && return 1; }
    DETAIL="$FILE_MIB MiB, sha256 ${sum:0:12}… sent, ${GUEST_OUT:0:12}… received"
    [ "$sum" = "${GUEST_OUT%% *}" ]
}

# `iperf OPTION...` leaves Mbit/s in RATE.
iperf() {
    guest $((IPERF_SECONDS + 20)) \
        "timeout $((IPERF_SECONDS + 15)) iperf3 -c $HOST_IP -t $IPERF_SECONDS -P $PAIRS -f m $*" || true
    # The last such line is the sum, if there are several streams.
    RATE=$(awk '/receiver/ { rate = $(NF - 2) } END { print rate + 0 }' <<<"$GUEST_OUT")
    DETAIL="$RATE Mbit/s"
    [ "$RATE" != 0 ] || DETAIL=$(tail -n2 <<<"$GUEST_OUT" | tr '\n' ' ')
    [ "$RATE" != 0 ]
}

check_iperf_to_host() {
    iperf
    RATE_TX=$RATE
    [ "$RATE" != 0 ]
}

check_iperf_to_guest() {
    iperf -R
    RATE_RX=$RATE
    [ "$RATE" != 0 ]
}

check_offloads() {
    guest 10 "ethtool -k eth0"
    OFFLOADS=$(sed -nE '/^(rx-checksumming|tx-checksumming|tcp-segmentation-offload|generic-receive-offload|tx-udp-segmentation):/s/^/    /p' <<<"$GUEST_OUT")
    DETAIL="segmentation or checksums are left to the guest"
    [[ $OFFLOADS == *"rx-checksumming: on"*"tx-checksumming: on"*"tcp-segmentation-offload: on"* ]] || return 1
    DETAIL="the guest leaves segmentation and checksums to the host"
}

# `host_side KEY` reads a counter of that interface. What it sends is what the guest receives.
host_side() { in_ns cat "/sys/class/net/$HOST_SIDE/statistics/$1"; }

# `backend KEY` is the sum of a counter over the queue pairs, `-` where the back-end has none.
backend() {
    [ "$BACKEND" = vhost-user-net ] || { echo - && return; }
    awk -v key="$1" '{ for (i = 1; i <= NF; i++) if (split($i, kv, "=") == 2 && kv[1] == key) sum += kv[2] }
        END { printf "%.0f\n", sum }' <<<"$BACKEND_COUNTERS"
}

counter_lines() { grep -c 'pair=[0-9]' "$WORK/backend.log"; }

more_counter_lines_than() { [ "$(counter_lines)" -ge $(($1 + PAIRS)) ]; }

# SIGUSR1 makes the back-end log its counters, one line a queue pair.
read_backend_counters() {
    local before
    before=$(counter_lines) || true
    kill -USR1 "$BACKEND_PID"
    wait_for 3 more_counter_lines_than "$before" || return 1
    BACKEND_COUNTERS=$(grep 'pair=[0-9]' "$WORK/backend.log" | tail -n "$PAIRS")
}

# The files went through this very interface, not around it.
check_host_side() {
    local least=$((FILE_MIB * 1024 * 1024))
    DETAIL="$(host_side tx_bytes) bytes to the guest, $(host_side rx_bytes) from it"
    [ "$(host_side tx_bytes)" -gt $least ] && [ "$(host_side rx_bytes)" -gt $least ]
}

check_large_frames() {
    if [ "$BACKEND" = vhost-user-net ]; then
        read_backend_counters || { DETAIL="the back-end logged none after SIGUSR1" && return 1; }
        DETAIL="above $PLAIN_FRAME bytes: $(backend rx_large_frames) to the guest, $(backend tx_large_frames) from it"
        [ "$(backend rx_large_frames)" -gt 0 ] && [ "$(backend tx_large_frames)" -gt 0 ]
    else
        DETAIL="mean frame: $(mean_frame tx) bytes to the guest, $(mean_frame rx) from it"
        [ "$(mean_frame tx)" -gt $PLAIN_FRAME ] && [ "$(mean_frame rx)" -gt $PLAIN_FRAME ]
    fi
}

mean_frame() { echo $(($(host_side "$1_bytes") / ($(host_side "$1_packets") + 1))); }

check_end() {
    guest 1 poweroff || true
    wait_for 15 gone "$VMM_PID" || { DETAIL="the guest does not power off" && return 1; }
    [ "$BACKEND" = vhost-user-net ] || return 0
    local status=0
    kill -TERM "$BACKEND_PID"
    wait_for 5 gone "$BACKEND_PID" || { DETAIL="the back-end does not end on SIGTERM" && return 1; }
    wait "$BACKEND_PID" || status=$?
    BACKEND_PID=
    DETAIL="back-end's exit status $status, socket $([ -e "$WORK/net.sock" ] && echo left behind || echo removed)"
    [ $status = 0 ] && [ ! -e "$WORK/net.sock" ]
}

row() { printf '  %-34s %16s %16s\n' "$@"; }

# To standard output: the result, where everything before was progress.
print_table() {
    echo
    row "What flowed ($BACKEND, $ACCEL)" "to the guest" "from the guest"
    row "$HOST_SIDE frames" "$(host_side tx_packets)" "$(host_side rx_packets)"
    row "$HOST_SIDE bytes" "$(host_side tx_bytes)" "$(host_side rx_bytes)"
    row "$HOST_SIDE mean frame, bytes" "$(mean_frame tx)" "$(mean_frame rx)"
    row "$HOST_SIDE dropped" "$(host_side tx_dropped)" "$(host_side rx_dropped)"
    row "back-end frames" "$(backend rx_frames)" "$(backend tx_frames)"
    row "back-end bytes" "$(backend rx_bytes)" "$(backend tx_bytes)"
    row "back-end frames above $PLAIN_FRAME bytes" "$(backend rx_large_frames)" "$(backend tx_large_frames)"
    row "iperf3 TCP, Mbit/s" "${RATE_RX:-0}" "${RATE_TX:-0}"
    echo "  Offloads of the guest's eth0:"
    echo "${OFFLOADS:-    unknown}"
    echo
}

run_checks() {
    check "Address" check_address
    check "Ping" check_ping
    [ "$DEVICE" != tun ] || check "Ping beyond the gateway" check_beyond
    check "File, guest to host" check_file_to_host
    check "File, host to guest" check_file_to_guest
    check "iperf3, guest to host" check_iperf_to_host
    check "iperf3, host to guest" check_iperf_to_guest
    check "Offloads in the guest" check_offloads
    check "Bytes on $HOST_SIDE" check_host_side
    check "Large frames" check_large_frames
    print_table
    check "Power off, end of the back-end" check_end
    [ ${#FAILED[@]} = 0 ]
}

# --- The run ---------------------------------------------------------------------------------

main() {
    local start
    start=$(now)
    parse_options "$@"
    [ "$(id -u)" = 0 ] || die "must be root to make a network namespace: sudo resources/launch-vm.sh"
    [ $MODE != console ] || [ -t 0 ] || die "no terminal on standard input; --check needs none"
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP

    WORK=$(mktemp -d -t vhost-user-net.XXXXXX)
    speaking_step "Guest image"
    GUEST=$("$ROOT/resources/guest-image.sh")
    step_done "$GUEST"
    if [ $MODE = print-accel ]; then
        choose_accelerator
        echo "$ACCEL"
        exit
    fi
    [ "$VMM" = qemu ] || require_cloud_hypervisor
    if [ "$BACKEND" = vhost-user-net ]; then
        find_rust_to_build
        speaking_step "Building the back-end"
        run_rust cargo build --release --bin vhost-user-net
        step_done
    fi
    choose_accelerator
    step "Making namespace $NETNS"
    make_network
    step_done "$HOST_SIDE, $HOST_IP/24"
    if [ "$BACKEND" = vhost-user-net ]; then
        step "Starting the back-end"
        start_backend
        step_done "process $BACKEND_PID"
    fi
    serve 5201 iperf3 -s || die "iperf3 does not listen"
    if [ $MODE = console ]; then
        run_console
        exit
    fi
    step "Booting the guest"
    boot_for_check
    step_done "$(sed -n 's/^@@ READY //p' "$CONSOLE_LOG")"
    if run_checks; then
        say "Passed in $(seconds $(($(now) - start))) s: traffic flowed both ways."
    else
        say "FAILED: $(printf '%s; ' "${FAILED[@]}")"
        exit 1
    fi
}

main "$@"
