//! What a descriptor chain means (VIRTIO 1.3, "The Virtqueue Descriptor Table", "Indirect Descriptors"), read from the
//! guest's memory by straight lines: all descriptors first, then what each of them may be.

use vhost_user_net::virtqueue::{ChainFault, GuestIovecs, Shape};

use crate::guest;
use crate::kit::memory::GuestMemory;
use crate::kit::split_ring::{Desc, RingAddrs};
use crate::kit::virtio::desc_flag::{INDIRECT, NEXT, WRITE};

/// Pieces that one system call takes; tables up to this size may always be used.
const PIECES_MAX: usize = 1024;
/// Buffers of no bytes that a chain may have.
const EMPTY_MAX: usize = 64;

/// A ring as the walk needs it.
#[derive(Clone, Copy)]
pub struct Ring {
    pub addrs: RingAddrs,
    pub size: u16,
    pub indirect: bool,
}

/// What a chain is.
#[derive(Debug)]
pub enum Walk {
    Good(Chain),
    /// Good, unless its pieces are more than one system call takes, which depends on where the regions came to lie.
    Long(Chain),
    Bad,
}

/// The buffers of a chain: address and length of each.
#[derive(Debug, Default)]
pub struct Chain {
    pub readable: Vec<(u64, u32)>,
    pub writable: Vec<(u64, u32)>,
}

impl Chain {
    pub fn readable_len(&self) -> usize {
        total(&self.readable)
    }

    pub fn writable_len(&self) -> usize {
        total(&self.writable)
    }

    /// What is in the readable buffers.
    pub fn bytes(&self, mem: &GuestMemory) -> Vec<u8> {
        read(mem, &self.readable)
    }

    /// What is in the writable buffers.
    pub fn written(&self, mem: &GuestMemory) -> Vec<u8> {
        read(mem, &self.writable)
    }
}

fn total(buffers: &[(u64, u32)]) -> usize {
    buffers.iter().map(|(_, len)| *len as usize).sum()
}

fn read(mem: &GuestMemory, buffers: &[(u64, u32)]) -> Vec<u8> {
    buffers.iter().flat_map(|(addr, len)| mem.read(*addr, *len as usize)).collect()
}

pub fn walk(mem: &GuestMemory, ring: Ring, head: u16) -> Walk {
    match descriptors(mem, ring, head) {
        Some(descs) => judge(&descs),
        None => Walk::Bad,
    }
}

fn descriptors(mem: &GuestMemory, ring: Ring, head: u16) -> Option<Vec<Desc>> {
    let most = usize::from(ring.size).max(PIECES_MAX);
    let (mut table, mut size, mut in_ring) = (ring.addrs.desc, usize::from(ring.size), true);
    let (mut index, mut seen) = (usize::from(head), 0);
    let mut all = Vec::new();
    while index < size && seen < size {
        let desc = load(mem, table + Desc::LEN * index as u64);
        seen += 1;
        if desc.flags & INDIRECT != 0 {
            let bytes = desc.len as usize;
            let may_be = ring.indirect && in_ring && desc.flags & NEXT == 0;
            if !may_be
                || bytes == 0
                || !bytes.is_multiple_of(16)
                || bytes / 16 > most
                || !guest::has(desc.addr, bytes as u64)
            {
                return None;
            }
            (table, size, in_ring, index, seen) = (desc.addr, bytes / 16, false, 0, 0);
            continue;
        }
        all.push(desc);
        if desc.flags & NEXT == 0 {
            return Some(all);
        }
        index = desc.next.into();
    }
    None
}

fn load(mem: &GuestMemory, addr: u64) -> Desc {
    let bytes = mem.read(addr, 16);
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    Desc {
        addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
        len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        flags: word(12),
        next: word(14),
    }
}

fn judge(descs: &[Desc]) -> Walk {
    let mut chain = Chain::default();
    for desc in descs.iter().filter(|desc| desc.len > 0) {
        let is_readable = desc.flags & WRITE == 0;
        if (is_readable && !chain.writable.is_empty()) || !guest::has(desc.addr, desc.len.into()) {
            return Walk::Bad;
        }
        let part = if is_readable { &mut chain.readable } else { &mut chain.writable };
        part.push((desc.addr, desc.len));
    }
    if chain.readable_len().max(chain.writable_len()) > u32::MAX as usize {
        return Walk::Bad;
    }
    let empty = descs.iter().filter(|desc| desc.len == 0).count();
    let (least, most) = pieces(&chain);
    match () {
        () if empty > EMPTY_MAX || least > PIECES_MAX => Walk::Bad,
        () if most > PIECES_MAX => Walk::Long(chain),
        () => Walk::Good(chain),
    }
}

/// How many pieces of the host's memory the buffers are: neighbours within one part are one, and what runs from one region
/// into the next may be.
fn pieces(chain: &Chain) -> (usize, usize) {
    let (mut count, mut borders) = (0, 0);
    for part in [&chain.readable, &chain.writable] {
        let mut end = None;
        for (addr, len) in part {
            count += usize::from(end != Some(*addr));
            let last = addr + u64::from(*len);
            borders += usize::from(*addr < guest::SECOND && last > guest::SECOND || end == Some(guest::SECOND));
            end = Some(last);
        }
    }
    (count, count + borders)
}

/// Compares what the library found with what the model did; the chain's bytes too, where they are not gigabytes of one
/// place named again and again.
pub fn assert_same(wanted: Walk, got: &Result<Shape, ChainFault>, iovecs: &GuestIovecs, mem: &GuestMemory) {
    match (wanted, got) {
        (Walk::Bad | Walk::Long(_), Err(_)) => {}
        (Walk::Good(chain) | Walk::Long(chain), Ok(shape)) => {
            let lens = (chain.readable_len(), chain.writable_len());
            assert_eq!((shape.readable_len, shape.writable_len), lens);
            if lens.0 + lens.1 > 1 << 20 {
                return;
            }
            for (range, wanted) in [(shape.readable(), chain.bytes(mem)), (shape.writable(), chain.written(mem))] {
                let mut bytes = vec![0; wanted.len()];
                assert_eq!(iovecs.copy_to(range, 0, &mut bytes), wanted.len());
                assert!(bytes == wanted, "other bytes of a chain");
            }
        }
        (wanted, got) => panic!("model says {wanted:?}, got {got:?}"),
    }
}
