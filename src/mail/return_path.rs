//! The address that a message's bounces come back to: `bounces+ID.SIGNATURE@example.org`.
//!
//! Guarantees that nobody who does not have the key can make one for a message: whoever could, could make us believe that
//! any address is dead. The same message has the same return path at each attempt. Relies on the mail system to deliver
//! what stands before the `+` with what comes after it (a *recipient delimiter*), in whatever case it likes.
//!
//! The signature is the first 64 bits of HMAC-SHA-256 (RFC 2104): each guess costs a mail.

use std::fmt;
use std::fmt::Write as _;

use hmac::{Hmac, KeyInit, Mac};
use lettre::Address;
use sha2::Sha256;
use uuid::Uuid;

use crate::token::MessageId;

/// Between the mailbox and the message.
const DELIMITER: char = '+';
/// Between the message and its signature.
const DOT: char = '.';
/// How much of the HMAC is used, in bytes.
const SIGNATURE: usize = 8;
/// What is signed begins with this, so that the key may sign other things elsewhere.
const CONTEXT: &[u8] = b"lapsed return path 1\0";

/// Signs return paths, and reads them back.
#[derive(Clone)]
pub struct ReturnPath {
    mailbox: Address,
    hmac: Hmac<Sha256>,
}

/// Prints no key.
impl fmt::Debug for ReturnPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReturnPath(..)")
    }
}

/// What an address is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// The return path of this message.
    Of(MessageId),
    /// It goes to our mailbox, but we did not sign it.
    Forged,
    /// Not a return path of ours.
    Other,
}

impl ReturnPath {
    /// Return paths through this mailbox, which is as [`config::Bounce`](crate::config::Bounce) has it, signed with this key.
    pub fn new(mailbox: Address, key: &[u8]) -> Self {
        Self { mailbox, hmac: Hmac::new_from_slice(key).expect("HMAC takes keys of any length") }
    }

    /// The return path of a message.
    ///
    /// # Errors
    /// Where the mailbox is not as [`ReturnPath::new`] asks.
    pub fn of(&self, message: MessageId) -> Result<Address, lettre::address::AddressError> {
        let signature = self.signature(message).finalize().into_bytes();
        let mut local = format!("{}{DELIMITER}{}{DOT}", self.mailbox.user(), message.uuid().simple());
        for byte in signature.iter().take(SIGNATURE) {
            // Writing to a String does not fail.
            let _ = write!(local, "{byte:02x}");
        }
        Address::new(local, self.mailbox.domain())
    }

    /// Reads an address that a mail came to.
    pub fn read(&self, address: &str) -> Read {
        let Some((local, domain)) = address.rsplit_once('@') else { return Read::Other };
        let Some((user, tail)) = local.split_once(DELIMITER) else { return Read::Other };
        if !domain.eq_ignore_ascii_case(self.mailbox.domain()) || !user.eq_ignore_ascii_case(self.mailbox.user()) {
            return Read::Other;
        }
        self.verified(tail).map_or(Read::Forged, Read::Of)
    }

    fn verified(&self, tail: &str) -> Option<MessageId> {
        let (id, signature) = tail.split_once(DOT)?;
        let message = MessageId::from(Uuid::try_parse(id).ok().filter(|_| id.len() == 32)?);
        // In constant time: how far a guess was right must not show.
        self.signature(message).verify_truncated_left(&bytes(signature)?).ok()?;
        Some(message)
    }

    fn signature(&self, message: MessageId) -> Hmac<Sha256> {
        self.hmac.clone().chain_update(CONTEXT).chain_update(message.uuid().as_bytes())
    }
}

/// [`SIGNATURE`] bytes as hexadecimal digits.
fn bytes(digits: &str) -> Option<[u8; SIGNATURE]> {
    let plain = digits.len() == 2 * SIGNATURE && digits.bytes().all(|b| b.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16).ok().filter(|_| plain).map(u64::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Bounce;
    use crate::token::Bucket;

    fn paths(key: &str) -> ReturnPath {
        ReturnPath::new("bounces@example.org".parse().expect("an address"), key.as_bytes())
    }

    fn message() -> MessageId {
        MessageId::new(Bucket::from_number(7), chrono::DateTime::from_timestamp(1_800_000_000, 0).expect("in range"))
    }

    #[test]
    fn a_return_path_names_its_message_and_is_the_same_each_time() {
        let (paths, id) = (paths("geheim"), message());
        let address = paths.of(id).expect("an address");
        assert_eq!(paths.of(id).expect("an address"), address);
        assert!(address.user().starts_with(&format!("bounces+{}.", id.uuid().simple())), "{address}");
        assert_eq!(paths.read(address.as_ref()), Read::Of(id));
        assert_eq!(paths.read(&address.to_string().to_uppercase()), Read::Of(id), "mail systems change the case");
    }

    /// Computed with OpenSSL: `printf 'lapsed return path 1\0\x01\x89...\x07' | openssl dgst -sha256 -hmac geheim`.
    #[test]
    fn the_signature_is_frozen() {
        let id = MessageId::from(Uuid::from_u128(0x0189_0000_0000_7000_8000_0000_0000_0007));
        let address = paths("geheim").of(id).expect("an address");
        assert_eq!(address.to_string(), "bounces+01890000000070008000000000000007.48788021944f694a@example.org");
    }

    #[test]
    fn the_longest_mailbox_leaves_a_local_part_that_every_server_takes() {
        let mailbox = Address::new("b".repeat(Bounce::LONGEST), "example.org").expect("an address");
        let address = ReturnPath::new(mailbox, b"geheim").of(message()).expect("an address");
        assert_eq!(address.user().len(), 64);
    }

    #[test]
    fn what_was_not_signed_with_this_key_is_forged() {
        let (ours, id) = (paths("geheim"), message());
        let theirs = paths("guessed").of(id).expect("an address");
        assert_eq!(ours.read(theirs.as_ref()), Read::Forged);
        let right = ours.of(id).expect("an address").to_string();
        let (before, after) = right.split_at(10);
        for wrong in [
            format!("{before}{}{}", if after.starts_with('0') { '1' } else { '0' }, &after[1..]),
            right.replace("@", "0@"),
            right.replace('.', ""),
            right.replacen('.', ".+", 1),
            "bounces+@example.org".to_owned(),
            format!("bounces+{}@example.org", id.uuid().simple()),
            format!("bounces+{}.@example.org", id.uuid().simple()),
            format!("bounces+{}.{}@example.org", id, &right[41..57]),
        ] {
            let read = ours.read(&wrong);
            assert_ne!(read, Read::Of(id), "{wrong}");
        }
        for other in ["bounces@example.org", "bounces", "", "@", "ann+x@example.org", "bounces+x@example.com"] {
            assert_eq!(ours.read(other), Read::Other, "{other}");
        }
    }

    #[test]
    fn a_key_is_not_printed() {
        assert!(!format!("{:?}", paths("geheim")).contains("geheim"));
    }

    proptest! {
        #[test]
        fn nothing_that_was_not_signed_is_believed(tail in ".{0,60}", any in ".{0,80}") {
            let paths = paths("geheim");
            for address in [format!("bounces+{tail}@example.org"), any] {
                prop_assert!(!matches!(paths.read(&address), Read::Of(_)));
            }
        }
    }
}
