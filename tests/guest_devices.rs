//! A real driver on each kind of device, with one and several queue pairs: bulk over TCP both ways, its content checked,
//! with the guest's offloads on and off.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::guest::{Bench, GuestSpec, HostDevice, MAC, Vmm, require_guest};
use common::transfer;

fn carries_bulk(test: &str, device: HostDevice) {
    if !require_guest(test, Vmm::Uml) || !device.require(test) {
        return;
    }
    for queue_pairs in [1, 4] {
        let backend = ["--front-end", "generic", "--mac", MAC];
        let spec = GuestSpec { queue_pairs, device, backend: &backend, ..GuestSpec::new(Vmm::Uml) };
        let mut bench = Bench::boot(&spec);
        for offloads in ["on", "off"] {
            bench.guest.run(&format!("ethtool -K eth0 tx {offloads} tso {offloads} rx-gro-hw {offloads}"));
            transfer::to_guest(&mut bench, 5001, 4, &mut |_| {});
            transfer::to_host(&mut bench, 5002, 4, &mut |_| {});
        }
        bench.assert_sound();
    }
}

#[test]
fn tap_carries_bulk() {
    carries_bulk("tap_carries_bulk", HostDevice::Tap);
}

#[test]
fn macvtap_carries_bulk() {
    carries_bulk("macvtap_carries_bulk", HostDevice::Macvtap);
}

#[test]
fn macvlan_carries_bulk() {
    carries_bulk("macvlan_carries_bulk", HostDevice::Macvlan);
}

#[test]
fn tun_carries_bulk() {
    carries_bulk("tun_carries_bulk", HostDevice::Tun);
}
