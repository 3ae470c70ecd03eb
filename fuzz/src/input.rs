//! Reads a scenario out of a fuzzer's bytes. An input that has come to its end goes on with zeros, so every input is one.

use crate::kit::split_ring::Desc;

use crate::guest;

pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.u8()) % end
    }

    /// The set of `bits` that the next bytes choose.
    pub fn subset(&mut self, bits: &[u64]) -> u64 {
        let chosen = self.u16();
        bits.iter().enumerate().map(|(at, bit)| if chosen >> at & 1 == 1 { *bit } else { 0 }).sum()
    }

    /// An address in the guest's memory, at one of its borders, or anywhere.
    pub fn address(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => self.u64(),
            1 => guest::HOLE - u64::from(self.u8()),
            2 => guest::SECOND - u64::from(self.u8()),
            3 => guest::END - u64::from(self.u8()),
            _ => guest::DATA + u64::from(self.u16()),
        }
    }

    /// A length, mostly a short one.
    pub fn length(&mut self) -> u32 {
        match self.u8() % 8 {
            0 => self.u32(),
            1 => 0,
            2 => self.u16().into(),
            _ => self.u8().into(),
        }
    }

    /// A descriptor that is often good.
    pub fn descriptor(&mut self) -> Desc {
        let (addr, len) = (self.address(), self.length());
        let flags = u16::from(self.u8());
        // Unknown flags are to be ignored: both halves of the word have a turn.
        let flags = if flags & 0x80 == 0 { flags } else { flags << 8 | flags & 7 };
        Desc { addr, len, flags, next: u16::from(self.u8()) }
    }
}
