//! The check of virtio-net headers, both ways.
//!
//! Oracle: `header_model` for tx, the features that a header needs for rx. Where this runs as root, the kernel is asked
//! too: what is let through, a TAP takes, but for limits of the kernel's own.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use vhost_user_net::device::tap::{self, Extras, TapByName};
use vhost_user_net::device::{Device, DeviceQueue, Layer};
use vhost_user_net::net::features::GuestOffloads;
use vhost_user_net::net::header::{SegmentLimit, TxRules, VnetHeader, check_rx};
use vhost_user_net_fuzz::header_model;
use vhost_user_net_fuzz::input::Input;
use vhost_user_net_fuzz::kit::virtio::{VnetHdr, gso, net_flag};
use vhost_user_net_fuzz::scenario::{Flow, RX_FEATURES, Sent, TX_FEATURES, frame, rx_needs};

static TAP: OnceLock<Option<(Device, DeviceQueue)>> = OnceLock::new();

fuzz_target!(
    init: {
        TAP.get_or_init(|| match open_tap() {
            Ok(tap) => Some(tap),
            Err(why) => {
                eprintln!("SKIPPED: the kernel's verdict: {why}");
                None
            }
        });
    },
    |data: &[u8]| run(&mut Input::new(data))
);

/// A TAP in a network namespace of this process.
fn open_tap() -> Result<(Device, DeviceQueue), String> {
    // SAFETY: nothing here holds a descriptor or thinks of a namespace yet.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .map_err(|errno| format!("no namespace: {errno}"))?;
    let how = TapByName {
        layer: Layer::Ethernet,
        name: "fuzz".parse()?,
        queue_pairs: 1,
        shared: false,
        mtu: None,
        extras: Extras::default(),
        reopens: false,
    };
    let (device, mut queues) = tap::open(&how).map_err(|error| vhost_user_net::error_chain(&error).to_string())?;
    Ok((device, queues.remove(0)))
}

fn run(input: &mut Input<'_>) {
    let (tx, rx) = (input.subset(&TX_FEATURES), input.subset(&RX_FEATURES));
    let sent = if input.flag() {
        frame(input, &mut Flow::default())
    } else {
        let header = VnetHdr::from_bytes(&input.array::<{ VnetHdr::LEN }>());
        Sent { header, frame: input.rest().to_vec() }
    };
    let header = VnetHeader::from_bytes(&sent.header.to_bytes());
    let start = &sent.frame[..sent.frame.len().min(header_model::START)];
    // Also for a frame whose length is another than that of what was copied.
    for len in [sent.frame.len(), sent.frame.len().saturating_mul(64)] {
        let wanted = header_model::check(tx, sent.header, len, start);
        let got = TxRules::of(tx, SegmentLimit::LARGEST).check(header, len, start);
        assert_eq!(got.map(|got| got.header.to_bytes()).ok(), wanted.map(VnetHdr::to_bytes), "{got:?} of {len} bytes");
        if let Some(wanted) = wanted.filter(|_| len == sent.frame.len()) {
            ask_kernel(&Sent { header: wanted, ..sent.clone() });
        }
    }
    let shown = check_rx(header, GuestOffloads::of(rx));
    // A guest without checksums has nothing of what needs them.
    let rx = if rx & 2 == 0 { 0 } else { rx };
    let is_allowed = rx_needs(&VnetHdr { flags: sent.header.flags & net_flag::NEEDS_CSUM, ..sent.header });
    assert_eq!(shown.is_ok(), is_allowed.is_some_and(|needs| needs & !rx == 0), "{shown:?}");
    if let Ok(shown) = shown {
        let needs = rx_needs(&VnetHdr::from_bytes(&shown.to_bytes())).unwrap();
        assert_eq!(needs & !rx, 0, "{shown:?}");
    }
}

fn datagrams(sent: &Sent) -> usize {
    (sent.frame.len() - usize::from(sent.header.hdr_len)).div_ceil(sent.header.gso_size.into())
}

fn ask_kernel(sent: &Sent) {
    let Some((_, queue)) = TAP.get().and_then(Option::as_ref) else { return };
    match rustix::io::write(queue, &sent.bytes()) {
        Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => {}
        // Linux wants 20 bytes before a checksum, and that many of a transport header behind its start.
        Err(Errno::INVAL) if sent.header.csum_start < 20 => {}
        // And it makes no more than 128 datagrams of one frame, 64 before 6.10.
        Err(Errno::INVAL) if sent.header.gso_type == gso::UDP_L4 && datagrams(sent) > 64 => {}
        Err(errno) => panic!("the kernel says {errno} to {:?} before {} bytes", sent.header, sent.frame.len()),
    }
    // What it answers is not to fill its queue.
    let mut bytes = [0; 2048];
    while rustix::io::read(queue, &mut bytes).is_ok() {}
}
