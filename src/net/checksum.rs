//! The Internet checksum (RFC 1071), which `coalesce` checks and `segment` writes, and SCTP's CRC. Pure arithmetic on
//! private bytes.
//!
//! A sum is kept in 64 bits, unfolded, until somebody needs the 16 bits of it. Byte order does not matter to the sum
//! (RFC 1071, section 2 (B)): words are added as the machine reads them, and only the 16 bits that come out are in the
//! order that they have on the wire.

/// Sums that run side by side, so that the compiler can add several words at once.
const LANES: usize = 8;

/// An unfolded one's complement sum of 16-bit words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The sum of `bytes`, the last one padded with a zero if there is an odd number of them.
    #[inline]
    pub fn of(bytes: &[u8]) -> Sum {
        // A 32-bit word counts as its two 16-bit words: 2^16 is 1 in one's complement.
        let (rows, rest) = bytes.as_chunks::<{ 4 * LANES }>();
        let mut lanes = [0_u64; LANES];
        for row in rows {
            let (words, _) = row.as_chunks::<4>();
            lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane += u64::from(u32::from_ne_bytes(*word)));
        }
        let (words, rest) = rest.as_chunks::<4>();
        let mut last = [0; 4];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        let words = words.iter().chain([&last]).map(|word| u64::from(u32::from_ne_bytes(*word)));
        Sum(lanes.into_iter().chain(words).sum())
    }

    /// This sum and another one.
    #[inline]
    pub fn plus(self, other: Sum) -> Sum {
        // Sums of frames are far from 2^64: each is below 2^14 words of 2^32.
        Sum(self.0.wrapping_add(other.0))
    }

    /// This sum and one 16-bit word.
    #[inline]
    pub fn plus_word(self, word: u16) -> Sum {
        self.plus(Sum(u64::from(word.to_be())))
    }

    /// The 16 bits of the sum, not complemented: what `NEEDS_CSUM` wants in the checksum field for a pseudo-header.
    #[inline]
    pub fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::from_be(sum as u16)
    }

    /// The checksum: the complement of the sum.
    #[inline]
    pub fn complement(self) -> u16 {
        !self.fold()
    }
}

/// The sum of the pseudo-header without its length: `addresses` are source and destination as they stand in the IP
/// header, 8 bytes of IPv4 or 32 of IPv6 (RFC 9293, "3.1 Header Format"; RFC 8200, "8.1 Upper-Layer Checksums").
#[inline]
pub fn pseudo_header(addresses: &[u8], protocol: u8) -> Sum {
    Sum::of(addresses).plus_word(u16::from(protocol))
}

/// CRC32c (RFC 9260, "Appendix A. CRC32c Checksum Calculation"), bit by bit: it is rarely needed.
pub fn crc32c(bytes: &[u8]) -> u32 {
    /// Castagnoli's polynomial, its bits in reverse.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let bit = |crc: u32| (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..u8::BITS).fold(crc ^ u32::from(*byte), |crc, _| bit(crc)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Word by word, as RFC 1071 has it.
    fn plain(bytes: &[u8]) -> u16 {
        bytes.chunks(2).fold(0_u16, |sum, word| {
            let word = u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
            let (sum, carry) = sum.overflowing_add(word);
            sum + u16::from(carry)
        })
    }

    proptest! {
        #[test]
        fn sum_is_that_of_the_words(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert_eq!(Sum::of(&bytes).fold(), plain(&bytes));
        }
    }

    #[test]
    fn example_of_rfc_1071_comes_out() {
        let sum = Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
        assert_eq!(sum.complement(), 0x220d);
    }

    /// RFC 3720, "CRC Examples".
    #[test]
    fn crc32c_of_known_bytes_comes_out() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
