//! What a mail server says that it can do (RFC 5321, section 4.1.1.1).

/// The extensions that delivery makes use of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offers {
    /// Several commands may be sent before the first is answered (RFC 2920).
    pub(super) pipelining: bool,
    /// The size of a message may be declared (RFC 1870); the largest that is taken, 0 where no limit is told.
    pub(super) size: Option<u64>,
    /// Content with bytes above 127 (RFC 6152).
    pub(super) eight_bit_mime: bool,
    /// Addresses that are not ASCII (RFC 6531).
    pub(super) smtp_utf8: bool,
}

impl Offers {
    /// Reads the lines of the answer to EHLO. What makes no sense is not offered.
    pub(super) fn read<'a>(lines: impl IntoIterator<Item = &'a str>) -> Self {
        let mut offers = Self::default();
        // The first line is the server's name.
        for line in lines.into_iter().skip(1) {
            let mut words = line.split_ascii_whitespace();
            let keyword = words.next().unwrap_or_default().to_ascii_uppercase();
            match keyword.as_str() {
                "PIPELINING" => offers.pipelining = true,
                "SIZE" => offers.size = words.next().map_or(Some(0), |limit| limit.parse().ok()),
                "8BITMIME" => offers.eight_bit_mime = true,
                "SMTPUTF8" => offers.smtp_utf8 = true,
                _ => {}
            }
        }
        offers
    }

    /// Whether a message of so many bytes is too large for the server.
    pub(super) fn are_exceeded_by(&self, bytes: usize) -> Option<u64> {
        self.size.filter(|limit| *limit > 0 && u64::try_from(bytes).is_ok_and(|bytes| bytes > *limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keywords_are_read_in_any_case_and_nonsense_is_passed_over() {
        let offers =
            Offers::read(["PIPELINING.example.org", "pipelining", "SIZE 1000", "8BitMIME", "SMTPUTF8", "", "X"]);
        let size = Some(1_000);
        assert_eq!(offers, Offers { pipelining: true, size, eight_bit_mime: true, smtp_utf8: true });
        assert_eq!((offers.are_exceeded_by(1_000), offers.are_exceeded_by(1_001)), (None, Some(1_000)));
        assert_eq!(Offers::read(["PIPELINING"]), Offers::default(), "a name, and no keyword");
        assert_eq!(Offers::read(["mx", "SIZE"]).size, Some(0));
        assert_eq!(Offers::read(["mx", "SIZE 0"]).are_exceeded_by(usize::MAX), None);
        assert_eq!(Offers::read(["mx", "SIZE many"]).size, None);
        assert_eq!(Offers::read([]), Offers::default());
    }
}
