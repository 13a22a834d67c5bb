//! Strangers' texts in every place of a letter: it is a mail with our headers and no others, in lines that every server
//! takes, and a program that reads mail finds both of its parts.

#![no_main]

use std::sync::LazyLock;

use chrono::{TimeDelta, TimeZone, Utc};
use lapsed::mail::compose::Composer;
use lapsed::mail::letter::{Change, Content, Item, Letter};
use lapsed::policy::{Lead, Reason};
use lapsed::token::{Address, Contact, Kind, Owner, Token};
use libfuzzer_sys::fuzz_target;
use mail_parser::MessageParser;
use uuid::Uuid;

const KNOWN: [&str; 11] = [
    "Auto-Submitted",
    "Content-Type",
    "Date",
    "From",
    "MIME-Version",
    "Message-ID",
    "References",
    "Reply-To",
    "Subject",
    "To",
    "X-Auto-Response-Suppress",
];

static COMPOSER: LazyLock<Composer> = LazyLock::new(|| {
    let from = "lapsed@example.org".parse().expect("a mailbox");
    Composer::new(from, None, Some("https://tokens.example.org/{external_id}".into())).expect("templates")
});

/// Texts, divided by zeros, in the places of one token after the other; the first byte says when they expire.
fn letter(bytes: &[u8]) -> Option<Letter> {
    let (first, rest) = bytes.split_first()?;
    let now = Utc.timestamp_opt(1_800_000_000, 0).single()?;
    let texts: Vec<String> =
        rest.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    let items = texts.chunks(6).enumerate().map(|(n, texts)| {
        let text = |at: usize| texts.get(at).cloned().unwrap_or_default();
        let owner = Owner {
            id: Uuid::from_u128(n as u128 % 2 + 1).into(),
            key: text(1),
            name: text(2),
            time_zone: if n % 2 == 0 { chrono_tz::UTC } else { chrono_tz::Europe::Berlin },
            locale: if first % 2 == 0 { "en" } else { "de" }.into(),
        };
        let mut token = Token::new(owner.id, Kind::Additional, &text(0), now);
        token.scopes = vec![text(3)];
        token.hint = Some(text(4)).filter(|hint| !hint.is_empty());
        token.external_id = Some(text(5)).filter(|id| !id.is_empty());
        token.expires_at = Some(now + TimeDelta::hours(i64::from(*first) * 9 - 1_000 + n as i64 * 11));
        let escalation = (first % 3 == 0).then_some(Reason::NoContact);
        let change = (first % 5 == 0).then(|| Change { before: None, by: Some(text(4)) });
        Item { token, owner, lead: Lead::new(TimeDelta::days(7)), escalation, change }
    });
    let to = Contact {
        id: Uuid::from_u128(3).into(),
        address: Address::parse("ann@example.org").expect("an address"),
        time_zone: None,
        locale: None,
        suppressed: None,
    };
    Some(Letter { message: Uuid::from_u128(4).into(), to, content: Content::Reminders(items.collect()) })
}

fuzz_target!(|bytes: &[u8]| {
    let Some(letter) = letter(bytes) else { return };
    let now = Utc.timestamp_opt(1_800_000_000, 0).single().expect("an instant");
    let mail = COMPOSER.compose(&letter, now).expect("composed");
    assert!(mail.bytes.is_ascii() && mail.bytes.ends_with(b"\r\n"));
    for line in mail.bytes.split_inclusive(|byte| *byte == b'\n') {
        assert!(line.len() <= 1_000 && line.ends_with(b"\r\n"), "{}", line.escape_ascii());
    }
    let text = String::from_utf8_lossy(&mail.bytes);
    let (head, _) = text.split_once("\r\n\r\n").expect("a head");
    for line in head.lines().filter(|line| !line.starts_with([' ', '\t'])) {
        assert!(KNOWN.iter().any(|name| line.starts_with(&format!("{name}: "))), "{line}");
    }
    let parsed = MessageParser::default().parse(&mail.bytes).expect("a mail");
    assert_eq!((parsed.text_body_count(), parsed.html_body_count()), (1, 1));
    assert!(parsed.attachment_count() <= 1, "a calendar file at most");
});
