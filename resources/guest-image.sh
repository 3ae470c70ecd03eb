#!/usr/bin/env bash
# shellcheck disable=SC2119 # step_done needs no argument
# Makes what the test guests boot from: a distribution kernel and a small initramfs with a shell,
# iperf3, ethtool and iproute2. Nothing of the kernel's and busybox's packages is installed; they are unpacked
# in the cache. A second run finds everything there and is done at once.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=resources/lib/common.sh
. "$ROOT/resources/lib/common.sh"

usage() {
    cat <<USAGE
Usage: guest-image.sh [--uml] [--refresh]

Makes the guest in $CACHE/guest ($(id -un)'s default, or below \$VHOST_USER_NET_CACHE):
  vmlinuz, initrd.gz      for QEMU and cloud-hypervisor
  uml/linux, uml/initrd.gz  with --uml: User Mode Linux, a guest that runs as a process
  README                  where they came from
and prints that directory. Installs missing host packages (qemu-system-x86, iperf3, ...) with apt.

  --uml      also make the User Mode Linux guest
  --refresh  make everything anew, with the kernel that is current now
USAGE
}

GUEST=$CACHE/guest

# In the order in which they depend on each other; what a kernel has built in has no file.
DRIVER_MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci
    failover net_failover virtio_net)
# There for those who want them, not loaded, in the order in which they depend on each other.
SPARE_MODULES=(pktgen macvlan llc stp garp mrp 8021q)

install_host_packages() {
    install_missing qemu-system-x86_64=qemu-system-x86 iperf3=iperf3 \
        ethtool=ethtool ip=iproute2 cpio=cpio xz=xz-utils zstd=zstd socat=socat
}

# Sets BUSYBOX. The guest has no C library of busybox's choosing, so it must be the static one; installed, that
# package would take the place of the host's own.
unpack_busybox() {
    unpack "$WORK/busybox" busybox-static
    BUSYBOX=$(find "$WORK/busybox" -path '*bin/busybox' -type f)
    [ -x "$BUSYBOX" ] || die "there is no busybox in package busybox-static"
}

# The kernel packages (image, and modules where they are apart) behind a meta package: the newest
# of Debian's kernels for clouds, or Ubuntu's kernel for virtual machines.
kernel_packages() {
    local meta image
    for meta in linux-image-6.12-cloud-amd64 linux-image-cloud-amd64 linux-image-virtual linux-image-generic; do
        image=$(apt-cache depends "$meta" 2>/dev/null |
            sed -n 's/^[ |]*Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n1) || true
        [ -n "$image" ] || continue
        echo "$image"
        apt-cache depends "$image" | sed -n 's/^[ |]*Depends: \(linux-modules-[0-9].*\)$/\1/p'
        return
    done
    die "apt knows no kernel package for guests"
}

# `unpack DIRECTORY PACKAGE...` downloads packages and unpacks them, installing nothing.
unpack() {
    local directory=$1 deb
    shift
    mkdir -p "$directory/debs"
    step "Unpacking $*"
    # Root's downloads go through the user _apt, who cannot write to our directory.
    (cd "$directory/debs" && quietly "${APT[@]}" -o APT::Sandbox::User=root download "$@") ||
        die "cannot download $*"
    for deb in "$directory"/debs/*.deb; do
        dpkg-deb -x "$deb" "$directory"
    done
    rm -r "$directory/debs"
    step_done
}

# `add_modules KERNEL_TREE INITRAMFS_TREE`: busybox's insmod takes plain .ko files only.
add_modules() {
    local tree=$1 target=$2/lib/modules name file
    mkdir -p "$target"
    for name in "${DRIVER_MODULES[@]}" "${SPARE_MODULES[@]}"; do
        file=$(find "$tree" -name "$name.ko*" | head -n1)
        case $file in
            '') continue ;;
            *.xz) xz -dc "$file" >"$target/$name.ko" ;;
            *.zst) zstd -qdc "$file" >"$target/$name.ko" ;;
            *) cp "$file" "$target/$name.ko" ;;
        esac
    done
    for name in "${DRIVER_MODULES[@]}"; do
        [ ! -e "$target/$name.ko" ] || echo "$name"
    done >"$target/load"
}

# `add_program INITRAMFS_TREE NAME` copies a program and the libraries it is linked with.
add_program() {
    local tree=$1 program
    program=$(command -v "$2")
    cp -L --remove-destination "$program" "$tree/bin/$2"
    # shellcheck disable=SC2046 # one word a library is what is wanted
    (cd / && cp -L --parents $(ldd "$program" | grep -o '/[^ ]*') "$tree")
    # The C library loads this one when a thread of iperf3 ends.
    # shellcheck disable=SC2046
    (cd / && cp -L --parents $(ldconfig -p | grep -o '/.*x86_64.*/libgcc_s\.so\.1$') "$tree")
}

# `make_initramfs KERNEL_TREE OUTPUT`
make_initramfs() {
    local tree=$WORK/initramfs
    step "Packing ${2#"$NEW/"}"
    rm -rf "$tree"
    mkdir -p "$tree"/{bin,dev,proc,sys,tmp,etc}
    cp "$BUSYBOX" "$tree/bin/busybox"
    local name
    for name in $("$BUSYBOX" --list); do
        [ "$name" = busybox ] || ln -s busybox "$tree/bin/$name"
    done
    for name in ip ethtool iperf3; do
        add_program "$tree" "$name"
    done
    add_modules "$1" "$tree"
    install -m 755 "$ROOT/resources/guest/init" "$tree/init"
    (cd "$tree" && find . | cpio -o -H newc -R 0:0 --quiet | gzip -1) >"$2"
    step_done
}

make_guest() {
    local packages
    mapfile -t packages < <(kernel_packages)
    [ ${#packages[@]} -gt 0 ] || exit 1
    unpack "$WORK/kernel" "${packages[@]}"
    cp "$WORK"/kernel/boot/vmlinuz-* "$NEW/vmlinuz"
    make_initramfs "$WORK/kernel" "$NEW/initrd.gz"
    chmod a+r "$NEW/vmlinuz"
    echo "vmlinuz, initrd.gz: ${packages[*]}" >>"$NEW/README"
}

make_uml_guest() {
    mkdir -p "$NEW/uml"
    # Not every distribution has it.
    if ! apt-cache show user-mode-linux >/dev/null 2>&1; then
        say "No package user-mode-linux here: tests that need it will be skipped"
        echo "uml: none, the distribution has no such package" >>"$NEW/README"
        return
    fi
    unpack "$WORK/uml" user-mode-linux
    install -m 755 "$WORK/uml/usr/bin/linux.uml" "$NEW/uml/linux"
    make_initramfs "$WORK/uml/usr/lib/uml/modules" "$NEW/uml/initrd.gz"
    echo "uml: user-mode-linux, $("$NEW/uml/linux" --version)" >>"$NEW/README"
}

# A guest made by another version of these recipes is not reused.
recipe() { cat "$0" "$ROOT/resources/guest/init" | sha256sum | cut -c1-16; }

is_current() { [ -e "$1" ] && grep -q "^recipe $(recipe)\$" "$GUEST/README" 2>/dev/null; }

clean_up() { [ -z "${WORK:-}" ] || rm -rf "$WORK"; }

main() {
    local uml=no refresh=no
    while [ $# -gt 0 ]; do
        case $1 in
            --uml) uml=yes ;;
            --refresh) refresh=yes ;;
            --help | -h) usage && exit 0 ;;
            *) usage >&2 && exit 2 ;;
        esac
        shift
    done
    [ "$(uname -m)" = x86_64 ] || die "guests are made for x86-64 hosts only"
    install_host_packages

    # One run at a time: the second finds what the first has made.
    mkdir -p "$CACHE"
    exec 9>"$CACHE/lock"
    flock 9
    if [ $refresh = no ] && is_current "$GUEST/vmlinuz" &&
        { [ $uml = no ] || is_current "$GUEST/uml"; }; then
        echo "$GUEST"
        return
    fi
    WORK=$(mktemp -d "$CACHE/work.XXXXXX")
    trap clean_up EXIT
    NEW=$WORK/guest
    mkdir -p "$NEW"
    printf 'Made by resources/guest-image.sh; safe to delete.\nrecipe %s\n' "$(recipe)" >"$NEW/README"
    apt_update
    unpack_busybox
    make_guest
    [ $uml = no ] || make_uml_guest
    # One rename, so that nobody ever sees half a guest.
    rm -rf "$GUEST"
    mv "$NEW" "$GUEST"
    echo "$GUEST"
}

main "$@"
