//! Counters: one set per queue pair, written by its worker and read by anyone.
//!
//! A counter has one writer, a worker (`rings_resumed_off_base`: the control thread), which adds with a plain load and
//! store, no locked instruction. Each set has cache lines of its own, so workers do not slow each other down. Every way
//! to drop a frame has a counter, so that at a quiescent moment frames in = frames out + drops.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`; only its one writer may.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($(#[doc = $meaning:literal] $name:ident,)+) => {
        /// One queue pair's counters; rx and tx are the guest's.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct PairCounters {
            $(#[doc = $meaning] pub $name: Counter,)+
        }

        impl PairCounters {
            /// What each counter counts, by its name.
            pub const MEANINGS: &[(&str, &str)] = &[$((stringify!($name), $meaning),)+];

            /// Every counter's name and value.
            pub fn values(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.get()),)+].into_iter()
            }
        }
    };
}

counters! {
    /// Frames given to the guest.
    rx_frames,
    /// Bytes of these frames, without virtio-net header.
    rx_bytes,
    /// Frames given to the guest that are longer than 1514 bytes: unsegmented or jumbo frames.
    rx_large_frames,
    /// Frames given to the device.
    tx_frames,
    /// Bytes of these frames, without virtio-net header.
    tx_bytes,
    /// Frames given to the device that are longer than 1514 bytes.
    tx_large_frames,
    /// Frames of the guest that went to the device together with others of their flow, as one frame.
    tx_coalesced_frames,
    /// Frames that were made of several frames of the guest: each is one write.
    tx_coalesced_runs,
    /// Wake-ups by the rx ring's kick.
    rx_kicks,
    /// Calls for the rx ring.
    rx_calls,
    /// Wake-ups by the tx ring's kick.
    tx_kicks,
    /// Calls for the tx ring.
    tx_calls,
    /// Dropped: no buffer of the guest is large enough for the frame.
    rx_drop_too_large,
    /// Dropped: the frame needs an offload that the guest did not negotiate.
    rx_drop_not_negotiated,
    /// Dropped: a frame of a tunnel that has to be segmented, which cannot be done here.
    rx_drop_tunnel,
    /// Dropped: not for a MAC address or VLAN that the guest asked for.
    rx_drop_filtered,
    /// Dropped: shorter than a virtio-net and an Ethernet header, or, from a TUN, no IP packet.
    rx_drop_short,
    /// Dropped: the kernel could not hand the frame over.
    rx_drop_refused,
    /// Dropped: read for a queue pair that the guest then stopped using.
    rx_drop_disabled,
    /// The gateway's answers to ARP requests and neighbour solicitations, and requests of its own.
    rx_neighbour_answers,
    /// Dropped: an answer of the gateway, because too many waited.
    rx_drop_answers,
    /// Buffers returned unused: malformed chains, and good ones that stood in the way of a malformed one.
    rx_bad_chains,
    /// Frames that were read before the guest had enough buffers, and had to be kept and copied.
    rx_held,
    /// Frames of the host that were segmented here for the guest; each segment counts as a frame given to the guest.
    rx_segmented_frames,
    /// The segments of these frames.
    rx_segments,
    /// Reads that failed for a passing reason.
    rx_read_errors,
    /// Dropped: malformed descriptor chain.
    tx_drop_bad_chain,
    /// Dropped: shorter than a virtio-net and an Ethernet header, or longer than any frame.
    tx_drop_bad_length,
    /// Dropped: the virtio-net header asks for what was not negotiated or does not fit the frame.
    tx_drop_bad_header,
    /// Dropped: the host would have to cut it into more segments than `--max-segments` allows.
    tx_drop_too_many_segments,
    /// Dropped: no IP packet, and the device takes nothing else.
    tx_drop_not_ip,
    /// ARP requests and neighbour solicitations that went to the gateway, as there is nobody else.
    tx_neighbour_requests,
    /// Discarded: the ring was disabled (vhost-user, "Ring states").
    tx_drop_disabled,
    /// Dropped: the interface is down, has no carrier, or is gone.
    tx_drop_link_down,
    /// Dropped: the kernel had no memory for it, twice.
    tx_drop_no_memory,
    /// Dropped: the kernel refused the frame.
    tx_drop_refused,
    /// Rings that could not go on: their indices or heads made no sense, their kick died, their memory was taken away.
    broken_rings,
    /// Rings that carried on from the used index where the front-end's base said otherwise.
    rings_resumed_off_base,
}

/// The whole card's counters, written by the control thread.
#[derive(Debug, Default)]
pub struct CardCounters {
    /// How often the link went up or down.
    pub link_changes: Counter,
    /// How often the interface's MTU changed.
    pub mtu_changes: Counter,
    /// Changes of either that the guest could not be told of.
    pub changes_untold: Counter,
}

impl fmt::Display for CardCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CardCounters { link_changes, mtu_changes, changes_untold } = self;
        let [link, mtu, untold] = [link_changes, mtu_changes, changes_untold].map(Counter::get);
        write!(f, "card link_changes={link} mtu_changes={mtu} changes_untold={untold}")
    }
}

impl fmt::Display for PairCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Counters of trouble are worth reading only if there was some.
        let is_trouble = |name: &str| ["drop", "bad", "broken"].iter().any(|word| name.contains(word));
        self.values().filter(|(name, value)| *value > 0 || !is_trouble(name)).enumerate().try_for_each(
            |(at, (name, value))| {
                let space = if at == 0 { "" } else { " " };
                write!(f, "{space}{name}={value}")
            },
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fmt::Write as _;
    use std::fs;
    use std::path::Path;

    use super::*;

    /// `UPDATE_DOCS=1 cargo test --lib metrics` writes the table anew.
    #[test]
    fn table_in_the_documentation_is_of_these_counters() {
        const MARK: &str = "<!-- From here on it is made by src/metrics.rs. -->\n\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/service.md");
        let document = fs::read_to_string(&path).unwrap();
        let (before, _) = document.split_once(MARK).unwrap();
        let mut wanted = format!("{before}{MARK}| counter of a queue pair | counts |\n|---|---|\n");
        for (name, meaning) in PairCounters::MEANINGS {
            writeln!(wanted, "| `{name}` | {} |", meaning.trim().trim_end_matches('.')).unwrap();
        }
        if std::env::var_os("UPDATE_DOCS").is_some() {
            fs::write(&path, &wanted).unwrap();
        }
        assert!(fs::read_to_string(&path).unwrap() == wanted, "UPDATE_DOCS=1 cargo test --lib metrics");
    }

    #[test]
    fn counters_of_trouble_are_shown_only_where_there_was_some() {
        let counters = PairCounters::default();
        counters.tx_drop_bad_chain.add(2);
        let shown = counters.to_string();
        assert!(shown.contains("tx_frames=0") && shown.contains("tx_drop_bad_chain=2"), "{shown}");
        assert!(!shown.contains("tx_drop_refused"), "{shown}");
    }
}
