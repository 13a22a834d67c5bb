//! The calendar file of a mail (iCalendar, RFC 5545): each token's deadline as an entry with an alarm.
//!
//! Guarantees that a token's entry has the same UID in every mail, and a SEQUENCE that grows with all that becomes of its
//! deadline ([`sequence`]), so that a program which has the entry already moves it, or takes it away where the deadline does not hold
//! any more (RFC 5546, sections 2.1.5 and 3.2.5); and that the same entries at the same
//! time make the same file. Pure.

use std::fmt::Write as _;

use chrono::{Datelike, TimeDelta, Timelike};

use crate::clock::Timestamp;
use crate::correction::{alarm_before, sequence};
use crate::token::Token;

/// How long a line may be, in bytes without its end (RFC 5545, section 3.1).
const LINE: usize = 75;

/// A deadline that lies ahead, in words.
pub(super) struct Entry<'a> {
    pub(super) token: &'a Token,
    pub(super) deadline: Timestamp,
    pub(super) title: String,
    pub(super) text: String,
    pub(super) link: Option<String>,
}

/// What a file does (RFC 5546, section 1.4), alike for all of its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// Notes the entries, or moves them.
    Publish,
    /// Takes them away.
    Cancel,
}

impl Method {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "PUBLISH",
            Self::Cancel => "CANCEL",
        }
    }
}

/// The file. `organizer` is the address that all of them come from; its domain makes the UIDs unique in the world.
pub(super) fn file(method: Method, entries: &[Entry<'_>], organizer: &lettre::Address, now: Timestamp) -> String {
    let mut file = String::new();
    for line in ["BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//lapsed//EN"] {
        folded(&mut file, line);
    }
    folded(&mut file, &format!("METHOD:{}", method.as_str()));
    for entry in entries {
        event(&mut file, method, entry, organizer, now);
    }
    folded(&mut file, "END:VCALENDAR");
    file
}

fn event(file: &mut String, method: Method, entry: &Entry<'_>, organizer: &lettre::Address, now: Timestamp) {
    let Entry { token, deadline, title, text, link } = entry;
    let title = escaped(title);
    folded(file, "BEGIN:VEVENT");
    folded(file, &format!("UID:token-{}@{}", token.id, organizer.domain()));
    folded(file, &format!("SEQUENCE:{}", sequence(token)));
    folded(file, &format!("DTSTAMP:{}", instant(now)));
    folded(file, &format!("DTSTART:{}", instant(*deadline)));
    folded(file, &format!("ORGANIZER:mailto:{organizer}"));
    folded(file, &format!("SUMMARY:{title}"));
    folded(file, &format!("DESCRIPTION:{}", escaped(text)));
    if let Some(link) = link {
        folded(file, &format!("URL:{link}"));
    }
    // It takes no time, and makes nobody busy.
    folded(file, "TRANSP:TRANSPARENT");
    if method == Method::Cancel {
        folded(file, "STATUS:CANCELLED");
    } else {
        folded(file, "BEGIN:VALARM");
        folded(file, "ACTION:DISPLAY");
        folded(file, &format!("TRIGGER:-{}", span(alarm_before(*deadline, now))));
        folded(file, &format!("DESCRIPTION:{title}"));
        folded(file, "END:VALARM");
    }
    folded(file, "END:VEVENT");
}

/// A span of whole hours (RFC 5545, section 3.3.6).
fn span(span: TimeDelta) -> String {
    if span == TimeDelta::days(1) { "P1D".to_owned() } else { format!("PT{}H", span.num_hours()) }
}

/// In UTC (RFC 5545, section 3.3.5, form 2), within the years that it can write.
fn instant(at: Timestamp) -> String {
    let seconds = at.timestamp().clamp(0, 253_402_300_799);
    let at = Timestamp::from_timestamp(seconds, 0).unwrap_or_default();
    let (date, time) = (at.date_naive(), at.time());
    let (year, month, day) = (date.year(), date.month(), date.day());
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", time.hour(), time.minute(), time.second())
}

/// A text as a value (RFC 5545, section 3.3.11).
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | ';' | ',' => _ = write!(escaped, "\\{c}"),
            '\n' => escaped.push_str("\\n"),
            c if c.is_control() => {}
            c => escaped.push(c),
        }
    }
    escaped
}

/// Adds a content line, folded between characters (RFC 5545, section 3.1).
fn folded(file: &mut String, line: &str) {
    let (mut rest, mut room) = (line, LINE);
    while rest.len() > room {
        let (piece, tail) = rest.split_at(rest.floor_char_boundary(room));
        file.push_str(piece);
        file.push_str("\r\n ");
        // The space is one of the bytes of its line.
        (rest, room) = (tail, LINE - 1);
    }
    file.push_str(rest);
    file.push_str("\r\n");
}

#[cfg(test)]
mod tests;
