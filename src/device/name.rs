//! Interface names.

use super::ioctl;

/// A network interface's name that the kernel takes as it is: 1 to 15 bytes, no `/`, `%`, `:` or white space, not `.`
/// or `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for InterfaceName {
    type Err = String;

    fn from_str(name: &str) -> Result<InterfaceName, String> {
        let wrong = if name.is_empty() {
            "it is empty".to_owned()
        } else if name.len() > ioctl::MAX_NAME {
            format!("it has {} bytes, and the kernel would cut it to {}", name.len(), ioctl::MAX_NAME)
        } else if name.contains('%') {
            "the kernel would expand the '%' to a new name".to_owned()
        } else if name == "." || name == ".." || name.contains(['/', ':']) || name.contains(char::is_whitespace) {
            "an interface's name has no '/', ':' or white space, and is not '.' or '..'".to_owned()
        } else {
            return Ok(InterfaceName(name.to_owned()));
        };
        Err(format!("not an interface name: {wrong}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_that_the_kernel_would_cut_or_expand_is_refused() {
        for bad in ["", "sixteen-bytes-xx", "tap%d", "a/b", ".", "..", "a b", "a:1"] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad:?}");
        }
        for good in ["tap0", "fifteen-bytes-x", "vm.1"] {
            assert_eq!(good.parse::<InterfaceName>().map(|n| n.0), Ok(good.to_owned()));
        }
    }
}
