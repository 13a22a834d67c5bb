//! The calendar file of a mail (iCalendar, RFC 5545): each token's deadline as an entry with an alarm.
//!
//! Guarantees that a token's entry has the same UID in every mail, and a SEQUENCE that grows with the deadline's generation,
//! so that a program which has the entry already moves it (RFC 5546, section 2.1.5); and that the same entries at the same
//! time make the same file. Pure.

use std::fmt::Write as _;

use chrono::TimeDelta;

use crate::clock::Timestamp;
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

/// The file. `domain` makes the UIDs unique in the world.
pub(super) fn file(entries: &[Entry<'_>], domain: &str, now: Timestamp) -> String {
    let mut file = String::new();
    for line in ["BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//lapsed//EN", "METHOD:PUBLISH"] {
        folded(&mut file, line);
    }
    for entry in entries {
        event(&mut file, entry, domain, now);
    }
    folded(&mut file, "END:VCALENDAR");
    file
}

fn event(file: &mut String, entry: &Entry<'_>, domain: &str, now: Timestamp) {
    let Entry { token, deadline, title, text, link } = entry;
    // A day before, or an hour where there is less.
    let before = if *deadline - now > TimeDelta::days(1) { "P1D" } else { "PT1H" };
    let title = escaped(title);
    folded(file, "BEGIN:VEVENT");
    folded(file, &format!("UID:token-{}@{domain}", token.id));
    folded(file, &format!("SEQUENCE:{}", token.generation.max(0)));
    folded(file, &format!("DTSTAMP:{}", instant(now)));
    folded(file, &format!("DTSTART:{}", instant(*deadline)));
    folded(file, &format!("SUMMARY:{title}"));
    folded(file, &format!("DESCRIPTION:{}", escaped(text)));
    if let Some(link) = link {
        folded(file, &format!("URL:{link}"));
    }
    // It takes no time, and makes nobody busy.
    folded(file, "TRANSP:TRANSPARENT");
    folded(file, "BEGIN:VALARM");
    folded(file, "ACTION:DISPLAY");
    folded(file, &format!("TRIGGER:-{before}"));
    folded(file, &format!("DESCRIPTION:{title}"));
    folded(file, "END:VALARM");
    folded(file, "END:VEVENT");
}

/// In UTC (RFC 5545, section 3.3.5, form 2), within the years that it can write.
fn instant(at: Timestamp) -> String {
    let seconds = at.timestamp().clamp(0, 253_402_300_799);
    Timestamp::from_timestamp(seconds, 0).unwrap_or_default().format("%Y%m%dT%H%M%SZ").to_string()
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
    let mut used = 0;
    for c in line.chars() {
        if used + c.len_utf8() > LINE {
            file.push_str("\r\n ");
            used = 1;
        }
        file.push(c);
        used += c.len_utf8();
    }
    file.push_str("\r\n");
}

#[cfg(test)]
mod tests;
