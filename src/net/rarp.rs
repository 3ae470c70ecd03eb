//! The frame that tells switches where a guest is now, after a migration (RFC 903; vhost-user, `VHOST_USER_SEND_RARP`).

use super::header::HEADER_LEN;
use crate::mac::Mac;

/// The shortest Ethernet frame, without frame check sequence (IEEE 802.3).
const FRAME_MIN: usize = 60;

/// A broadcast RARP request of `mac` for its own address, behind an empty virtio-net header.
pub fn announcement(mac: Mac) -> Vec<u8> {
    let ethernet: [&[u8]; 3] = [&[0xff; 6], &mac, &[0x80, 0x35]];
    // Ethernet, IPv4, their address lengths, and operation 3: request reverse.
    let fixed: &[u8] = &[0, 1, 8, 0, 6, 4, 0, 3];
    let addresses: [&[u8]; 4] = [&mac, &[0; 4], &mac, &[0; 4]];
    let mut frame = vec![0; HEADER_LEN];
    ethernet.iter().chain([&fixed]).chain(&addresses).for_each(|part| frame.extend_from_slice(part));
    frame.resize(HEADER_LEN + FRAME_MIN, 0);
    frame
}
