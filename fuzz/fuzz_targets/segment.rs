//! Finishing frames for a guest: a segmentation request of the host is cut, a checksum completed.
//!
//! Oracle: the segments are those of the kit's splitter; a completed frame is as the kit completes it; no header says
//! anything that the guest did not negotiate; no byte of payload is lost or added.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_user_net::net::features::GuestOffloads;
use vhost_user_net::net::header::{PROTOCOL_HEADERS_MAX, VnetHeader, check_rx};
use vhost_user_net::net::segment::{Need, complete_checksum, plan};
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::split::complete;
use vhost_user_net_fuzz::kit::virtio::VnetHdr;
use vhost_user_net_fuzz::scenario::{Flow, RX_FEATURES, Sent, frame, rx_needs, split};

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});

fn run(input: &mut Input<'_>) {
    let features = input.subset(&RX_FEATURES);
    let guest = GuestOffloads::of(features);
    let features = if features & 2 == 0 { 0 } else { features };
    let assert_negotiated = |header: &VnetHdr| {
        let needs = rx_needs(header).unwrap_or(u64::MAX);
        assert_eq!(needs & !features, 0, "{header:?} is not negotiated");
    };
    let mut sent = frame(input, &mut Flow::default());
    let header = VnetHeader::from_bytes(&sent.header.to_bytes());
    if let Ok(shown) = check_rx(header, guest) {
        return assert_negotiated(&VnetHdr::from_bytes(&shown.to_bytes()));
    }
    match plan(header, &sent.frame, guest) {
        Err(_) => {}
        Ok(Need::Checksum) => {
            let wanted = complete(&sent.header, &sent.frame);
            assert_eq!(complete_checksum(header, &mut sent.frame), Ok(VnetHeader::default()));
            assert!(sent.frame == wanted, "another checksum");
        }
        Ok(Need::Segmentation(plan)) => {
            let mut out = [0; PROTOCOL_HEADERS_MAX];
            let mut next = None;
            let mut segments = Vec::new();
            for index in 0..plan.segments() {
                let piece = plan.segment(&sent.frame, index, &mut out).expect("as many segments as it says");
                let header = VnetHdr::from_bytes(&piece.header.to_bytes());
                assert_negotiated(&header);
                assert_eq!(piece.payload.start, next.unwrap_or(piece.headers_len), "payload in order");
                next = Some(piece.payload.end);
                let frame = [&out[..piece.headers_len], &sent.frame[piece.payload]].concat();
                segments.push(Sent { header, frame }.completed());
            }
            assert_eq!(next, Some(sent.frame.len()), "all payload");
            assert_eq!(plan.segment(&sent.frame, plan.segments(), &mut out), None);
            if let Some(wanted) = split(&sent) {
                assert!(segments == wanted, "other segments than {wanted:02x?}: {segments:02x?}");
            }
        }
    }
}
