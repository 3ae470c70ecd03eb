//! The library's own side of a ring, without a back-end around it: for tests of rings and chains alone.

use std::ops::Range;
use std::sync::Arc;

use vhost_user_net::memory::{MemView, Region, RegionSetup};
use vhost_user_net::virtqueue::queue::RingFeatures;
use vhost_user_net::virtqueue::{self, Direction, GuestIovecs, Popped, Queue, QueueSize, RingBroken, RingError};

use super::memory::{GuestMemory, RegionInfo};
use super::split_ring::{RingAddrs, SplitRing};

/// With every feature that changes how a ring is read.
pub const ALL: RingFeatures = RingFeatures { event_idx: true, indirect: true };
/// With indirect descriptors alone.
pub const INDIRECT: RingFeatures = RingFeatures { event_idx: false, indirect: true };
/// With none.
pub const NONE: RingFeatures = RingFeatures { event_idx: false, indirect: false };

/// Guest memory as the library sees it.
pub fn view_of(mem: &GuestMemory) -> Arc<MemView> {
    let map = |region: &super::memory::Region| {
        let RegionInfo { guest, size, user, offset } = region.info;
        let setup = RegionSetup { guest, user, size, file_offset: offset };
        Arc::new(Region::map(setup, region.fd().try_clone_to_owned().unwrap()).unwrap())
    };
    Arc::new(MemView::new(mem.regions().iter().map(map).collect()).unwrap())
}

/// A ring's areas as the library finds them.
pub fn find(view: &Arc<MemView>, size: u16, at: RingAddrs) -> Result<virtqueue::SplitRing, RingError> {
    let RingAddrs { desc, avail, used } = at;
    let size = QueueSize::try_from(u32::from(size)).unwrap();
    virtqueue::SplitRing::new(view, size, virtqueue::SplitRingAddresses { desc, avail, used })
}

/// A queue with the list that its chains come in.
pub struct DeviceSide {
    pub queue: Queue,
    pub iovecs: GuestIovecs,
}

impl DeviceSide {
    /// Starts on a driver's ring.
    pub fn start(ring: &SplitRing, features: RingFeatures) -> Result<Self, RingBroken> {
        let view = view_of(ring.mem());
        let found = find(&view, ring.size, ring.addrs).unwrap();
        let iovecs = GuestIovecs::new(Arc::clone(&view), 64);
        Ok(Self { queue: Queue::start(found, view, features)?, iovecs })
    }

    /// The next chain; panics on a broken ring.
    pub fn pop(&mut self) -> Option<Popped> {
        self.try_pop().unwrap()
    }

    pub fn try_pop(&mut self) -> Result<Option<Popped>, RingBroken> {
        pop_in_both_ways(&mut self.queue, &mut self.iovecs)
    }

    /// Pops all that there is and completes it, each chain with `len`; tells how many chains that were.
    pub fn complete_all(&mut self, len: u32) -> usize {
        let mut count = 0;
        while let Some(popped) = self.pop() {
            self.queue.push_used(popped.head, len);
            count += 1;
        }
        count
    }

    /// What the pieces of `range` hold.
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        bytes(&self.iovecs, range)
    }
}

/// The next entry, as `pop` finds it; where `pop_single` takes it, that has to be the same.
pub fn pop_in_both_ways(queue: &mut Queue, iovecs: &mut GuestIovecs) -> Result<Option<Popped>, RingBroken> {
    let singles = [Direction::Readable, Direction::Writable].map(|direction| peek_single(queue, direction, iovecs));
    let popped = queue.pop(iovecs);
    for (single, is_writable) in singles.into_iter().zip([false, true]) {
        let Some((head, held)) = single else { continue };
        let Ok(Some(Popped { head: same_head, chain: Ok(shape) })) = &popped else {
            panic!("pop_single took {head}, pop {popped:?}");
        };
        assert_eq!(format!("{same_head:?}"), head);
        let (pieces, others) = (shape.readable(), shape.writable());
        let (pieces, others) = if is_writable { (others, pieces) } else { (pieces, others) };
        assert_eq!((pieces.len(), others.len(), shape.ring_descriptors), (1, 0, 1));
        assert_eq!(shape.readable_len + shape.writable_len, held.len());
        assert_eq!(bytes(iovecs, pieces), held);
    }
    popped
}

/// What `pop_single` takes, which is put back: the head, and what the buffer holds.
fn peek_single(queue: &mut Queue, direction: Direction, iovecs: &mut GuestIovecs) -> Option<(String, Vec<u8>)> {
    let at = iovecs.len();
    let single = queue.pop_single((direction, 1), iovecs);
    assert_eq!(iovecs.len(), at + usize::from(single.is_some()));
    let (head, len) = single?;
    let held = bytes(iovecs, at..at + 1);
    assert_eq!(held.len(), len as usize);
    let name = format!("{head:?}");
    queue.rewind(head);
    iovecs.truncate(at);
    Some((name, held))
}

fn bytes(iovecs: &GuestIovecs, range: Range<usize>) -> Vec<u8> {
    let mut bytes = vec![0; iovecs.bytes(range.clone())];
    assert_eq!(iovecs.copy_to(range, 0, &mut bytes), bytes.len());
    bytes
}
