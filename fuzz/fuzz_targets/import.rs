//! Arbitrary bytes as a list to import: each row is good or bad, and the end comes.

#![no_main]

use std::io::Cursor;

use lapsed::import::List;
use libfuzzer_sys::fuzz_target;

/// What lets the parsers be reached without finding a header first.
const BEGINNINGS: [&[u8]; 3] =
    [b"", b"owner,description,expires_at,emails,external_id,created_at,last_used_at,revoked_at,time_zone,watch\n", b"{"];

fuzz_target!(|bytes: &[u8]| {
    for beginning in BEGINNINGS {
        let text = [beginning, bytes].concat();
        if let Ok(list) = List::open(Cursor::new(text)) {
            assert!(list.count() <= bytes.len() + 1, "more rows than bytes");
        }
    }
});
