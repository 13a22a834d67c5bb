//! Arbitrary bytes as a mail that came back: a notification or not, and the end comes.

#![no_main]

use lapsed::mail::dsn;
use lapsed::mail::outcome::{Later, decide_later};
use lapsed::token::Address;
use libfuzzer_sys::fuzz_target;

/// What lets the report be reached without finding the header first.
const BEGINNINGS: [&[u8]; 3] = [
    b"",
    b"Content-Type: message/delivery-status\n\n",
    b"Content-Type: multipart/report; boundary=b\n\n--b\nContent-Type: message/delivery-status\n\n",
];

fuzz_target!(|bytes: &[u8]| {
    let ann = Address::parse("ann@example.org").expect("an address");
    for beginning in BEGINNINGS {
        let Ok(notification) = dsn::read(&[beginning, bytes].concat()) else { continue };
        assert!(!notification.recipients.is_empty());
        if let Later::Failed { reply, suppress } = decide_later(&notification, &ann) {
            assert!(!reply.contains(char::is_control));
            let is_it = |recipient: &dsn::Recipient| recipient.address.as_ref() == Some(&ann);
            assert!(!suppress || notification.recipients.iter().any(is_it), "another address than the one that failed");
        }
    }
});
