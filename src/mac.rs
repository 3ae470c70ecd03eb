//! MAC addresses, the guest's and the host's.

use std::fmt::{self, Display, Formatter};

/// A MAC address.
pub type Mac = [u8; 6];

/// Shows an address in the usual notation, or that it is unknown.
pub fn shown(mac: impl Into<Option<Mac>>) -> impl Display {
    Shown(mac.into())
}

struct Shown(Option<Mac>);

impl Display for Shown {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Some([a, b, c, d, e, g]) = self.0 else { return f.write_str("unknown") };
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_shown_as_it_is_usually_written() {
        assert_eq!(shown([0, 0x1b, 2, 3, 4, 0xff]).to_string(), "00:1b:02:03:04:ff");
        assert_eq!(shown(None::<Mac>).to_string(), "unknown");
    }
}
