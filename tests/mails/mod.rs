//! Whole mails, as they are sent: each kind in each language, read back by a parser that is not the composer's, and compared
//! with what somebody has looked at, in `tests/mails/LANGUAGE/KIND.txt`.
//!
//! After a change of wording or form: `LAPSED_TEST_RENEW=1 tests/run --test suite mails::`, and then read what
//! `git diff tests/mails` shows. Nothing in the files depends on the day or on chance.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use calcard::icalendar::{ICalendar, ICalendarProperty};
use chrono::{DateTime, NaiveDateTime, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;
use lapsed::clock::Timestamp;
use lapsed::mail::Composer;
use lapsed::mail::letter::{Alert, Content, Item, Kind, Letter};
use lapsed::mail::sample;
use lapsed::token::{Address, Token};
use mail_parser::{MessageParser, MimeHeaders, PartType};
use uuid::Uuid;

use crate::support::cli::Place;

pub const LANGUAGES: [&str; 2] = ["en", "de"];

/// A Sunday.
pub fn now() -> Timestamp {
    Utc.with_ymd_and_hms(2027, 1, 24, 8, 0, 0).unwrap()
}

pub fn composer() -> Composer {
    let from = "Token watch <tokens@example.org>".parse().expect("a mailbox");
    let reply_to = "help@example.org".parse().expect("a mailbox");
    Composer::new(from, Some(reply_to), Some("https://example.org/tokens/{token_id}".into())).expect("a composer")
}

pub fn letter(content: Content, locale: &str) -> Letter {
    let mut to = sample::contact(Address::parse("ann@example.org").expect("an address"));
    to.locale = Some(locale.to_owned());
    Letter { message: Uuid::from_u128(0xd000).into(), to, content }
}

fn reminders() -> Vec<Item> {
    let Content::Reminders(items) = sample::content(Kind::Reminder, now()) else { panic!("reminders") };
    items
}

/// Every mail that there is, with more than one form of some.
pub fn contents() -> Vec<(&'static str, Content)> {
    let mut contents: Vec<_> = Kind::ALL.map(|kind| (kind.as_str(), sample::content(kind, now()))).into();
    contents.push(("reminder-of-one", Content::Reminders(reminders().into_iter().take(1).collect())));
    contents.push(("reminder-of-60", Content::Reminders(reminders().into_iter().cycle().take(60).collect())));
    contents.push(("alert-expiry", Content::Alert(Alert::Expiry { tokens: 12_345 })));
    contents
}

/// A mail for people: its head, and its parts decoded.
fn readable(bytes: &[u8]) -> String {
    let mail = MessageParser::default().parse(bytes).expect("a mail");
    let head = String::from_utf8_lossy(bytes).split_once("\r\n\r\n").expect("a head").0.replace("\r\n", "\n");
    let mut readable = format!("{head}\n");
    writeln!(readable, "(subject: {})", mail.subject().expect("a subject")).expect("memory");
    for part in &mail.parts {
        let kind = part.content_type().expect("a type");
        let kind = format!("{}/{}", kind.ctype(), kind.subtype().unwrap_or_default());
        let name = part.attachment_name().map_or_else(String::new, |name| format!(", {name}"));
        match &part.body {
            PartType::Text(text) | PartType::Html(text) => {
                write!(readable, "\n===== {kind}{name}\n{}\n", text.replace("\r\n", "\n")).expect("memory");
            }
            PartType::Multipart(_) => {}
            other => panic!("a part that nobody expects: {other:?}"),
        }
    }
    readable
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mails")
}

#[test]
fn each_kind_reads_in_each_language_as_somebody_has_seen_it() {
    let renew = std::env::var_os("LAPSED_TEST_RENEW").is_some();
    let (mut wrong, mut seen) = (Vec::new(), BTreeSet::new());
    for language in LANGUAGES {
        fs::create_dir_all(directory().join(language)).expect("a directory");
        for (name, content) in contents() {
            let composed = composer().compose(&letter(content, language), now()).expect("composed");
            let readable = readable(&composed.bytes);
            let path = directory().join(language).join(format!("{name}.txt"));
            if renew {
                fs::write(&path, &readable).expect("written");
            }
            let expected = fs::read_to_string(&path).unwrap_or_default();
            if expected != readable {
                let lines = || expected.lines().map(Some).chain(std::iter::repeat(None));
                let differs = readable.lines().zip(lines()).find(|(is, was)| Some(*is) != *was);
                wrong.push(format!("{}: {differs:?}", path.display()));
            }
            seen.insert(path);
        }
        for entry in fs::read_dir(directory().join(language)).expect("the directory") {
            let path = entry.expect("an entry").path();
            assert!(seen.contains(&path), "{} is of no mail", path.display());
        }
    }
    assert!(wrong.is_empty(), "not as it was: LAPSED_TEST_RENEW=1 renews the files.\n{}", wrong.join("\n"));
}

/// The lines of a token in a mail's text.
fn lines(item: Item, at: Timestamp, zone: Tz, locale: &str) -> Vec<String> {
    let mut letter = letter(Content::Reminders(vec![item]), locale);
    letter.to.time_zone = Some(zone);
    let text = composer().write(&letter, at).expect("written").text;
    text.lines().filter(|line| line.starts_with("  ")).take(3).map(|line| line.trim().to_owned()).collect()
}

fn expiring(at: Timestamp) -> Item {
    let item = reminders().remove(0);
    Item { token: Token { expires_at: Some(at), ..item.token }, ..item }
}

#[test]
fn every_zone_gets_its_own_days_and_both_changes_of_the_clocks() {
    use chrono_tz::{America, Asia, Europe, Pacific};
    let utc = |text: &str| -> Timestamp {
        let at = NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M").expect(text);
        DateTime::from_naive_utc_and_offset(at, Utc)
    };
    for (zone, now, deadline, english, german, exact) in [
        (
            Asia::Kolkata,
            "2027-01-24 08:00",
            "2027-01-31 18:30",
            "in 7 days, at the end of 31 January 2027",
            "in 7 Tagen, am Ende des 31. Januar 2027",
            "2027-02-01 00:00:00 IST (UTC+05:30)",
        ),
        (
            Pacific::Kiritimati,
            "2027-01-30 09:00",
            "2027-01-31 12:00",
            "in 2 days, on 1 February 2027 at 02:00",
            "in 2 Tagen, am 1. Februar 2027 um 02:00 Uhr",
            "2027-02-01 02:00:00 (UTC+14:00)",
        ),
        // The clocks go from 24:00 on 4 September to 01:00.
        (
            America::Santiago,
            "2027-09-03 15:00",
            "2027-09-05 04:00",
            "tomorrow, at the end of 4 September 2027",
            "morgen, am Ende des 4. September 2027",
            "2027-09-05 01:00:00 (UTC-03:00)",
        ),
        // And back from 24:00 on 3 April to 23:00.
        (
            America::Santiago,
            "2027-04-03 15:00",
            "2027-04-04 03:30",
            "today, on 3 April 2027 at 23:30",
            "heute, am 3. April 2027 um 23:30 Uhr",
            "2027-04-03 23:30:00 (UTC-04:00)",
        ),
        // The clocks go forward on 28 March: a day of 23 hours.
        (
            Europe::Berlin,
            "2027-03-27 22:45",
            "2027-03-28 22:00",
            "tomorrow, at the end of 28 March 2027",
            "morgen, am Ende des 28. März 2027",
            "2027-03-29 00:00:00 CEST (UTC+02:00)",
        ),
        // And back on 31 October: a day of 25 hours, with two times that are half past two.
        (
            Europe::Berlin,
            "2027-10-30 12:00",
            "2027-10-31 00:30",
            "tomorrow, on 31 October 2027 at 02:30",
            "morgen, am 31. Oktober 2027 um 02:30 Uhr",
            "2027-10-31 02:30:00 CEST (UTC+02:00)",
        ),
        (
            Europe::Berlin,
            "2027-10-30 12:00",
            "2027-10-31 01:30",
            "tomorrow, on 31 October 2027 at 02:30",
            "morgen, am 31. Oktober 2027 um 02:30 Uhr",
            "2027-10-31 02:30:00 CET (UTC+01:00)",
        ),
        (
            Europe::Berlin,
            "2027-10-30 22:10",
            "2027-10-31 23:00",
            "today, at the end of 31 October 2027",
            "heute, am Ende des 31. Oktober 2027",
            "2027-11-01 00:00:00 CET (UTC+01:00)",
        ),
    ] {
        let item = || expiring(utc(deadline));
        let in_utc = format!("{deadline}:00 UTC");
        let said = lines(item(), utc(now), zone, "en");
        assert_eq!(said, [format!("expires   {english}"), format!("exactly   {exact}"), format!("in UTC    {in_utc}")]);
        let said = lines(item(), utc(now), zone, "de");
        assert_eq!(said, [format!("endet     {german}"), format!("genau     {exact}"), format!("in UTC    {in_utc}")]);
    }
}

#[test]
fn what_is_known_of_a_tokens_use_is_said() {
    let used = |days_ago: Option<i64>, locale: &str| {
        let mut item = expiring(now() + TimeDelta::days(7));
        item.token.last_used_at = days_ago.map(|days| now() - TimeDelta::days(days));
        let letter = letter(Content::Reminders(vec![item]), locale);
        let text = composer().write(&letter, now()).expect("written").text;
        let label = if locale == "de" { "  benutzt   " } else { "  last used " };
        let line = text.lines().find_map(|line| line.strip_prefix(label)).expect("a line");
        line.to_owned()
    };
    for (days, english, german) in [
        (Some(0), "today", "heute"),
        (Some(1), "yesterday", "gestern"),
        (Some(12), "12 days ago", "vor 12 Tagen"),
        (Some(61), "2 months ago", "vor 2 Monaten"),
        (
            Some(125),
            "4 months ago, it may be safe to let it expire",
            "vor 4 Monaten, vielleicht kann es einfach ablaufen",
        ),
        (
            Some(800),
            "2 years ago, it may be safe to let it expire",
            "vor 2 Jahren, vielleicht kann es einfach ablaufen",
        ),
        (None, "never used, it may be safe to let it expire", "noch nie, vielleicht kann es einfach ablaufen"),
    ] {
        assert_eq!(used(days, "en"), english);
        assert_eq!(used(days, "de"), german);
    }
}

#[test]
fn subjects_name_what_it_is_about_first() {
    let subject = |days: &[i64], locale: &str| {
        let items = days.iter().map(|days| expiring(now() + TimeDelta::days(*days))).collect();
        composer().write(&letter(Content::Reminders(items), locale), now()).expect("written").subject
    };
    // The week ends on Sunday, the day of `now`.
    let monday = now() + TimeDelta::days(1);
    for (days, english, german) in [
        (&[7][..], "\"deploy key (CI)\" expires in 7 days", "„deploy key (CI)“ läuft in 7 Tagen ab"),
        (&[3], "\"deploy key (CI)\" expires in 3 days", "„deploy key (CI)“ läuft in 3 Tagen ab"),
        (&[0], "\"deploy key (CI)\" expired today", "„deploy key (CI)“ ist heute abgelaufen"),
        (&[2, 2], "2 tokens expire in 2 days", "2 Token laufen in 2 Tagen ab"),
        (&[1, 5, 6], "3 tokens expire soon, the first tomorrow", "3 Token laufen bald ab, das erste morgen"),
        (&[-1, -2], "2 tokens have expired", "2 Token sind abgelaufen"),
        (&[-1, 2], "1 token has expired, 1 more expires soon", "1 Token ist abgelaufen, 1 weiteres läuft bald ab"),
    ] {
        assert_eq!(subject(days, "en"), english);
        assert_eq!(subject(days, "de-AT"), german);
    }
    let items: Vec<Item> = [1, 5, 6].map(|days| expiring(monday + TimeDelta::days(days))).into();
    let on_monday =
        |locale| composer().write(&letter(Content::Reminders(items.clone()), locale), monday).expect("written");
    assert_eq!(on_monday("en").subject, "3 tokens expire this week");
    assert_eq!(on_monday("de").subject, "3 Token laufen diese Woche ab");
}

/// What a mail program could take for an address of the web or of mail, or for the start of one.
const LINKS: [&str; 6] = ["https://evil", "http://evil", "www.evil", "evil.example/", "mailto:us", "us@evil"];

#[test]
fn what_people_typed_is_only_text() {
    let typed = [
        "https://evil.example/login?x=1",
        "see www.evil.example or write to us@evil.example, mailto:us@evil.example",
        "<a href=\"https://evil.example/\">renew</a><img src=\"https://evil.example/x\"><script>x()</script>",
        "[renew](https://evil.example/) <https://evil.example/>",
        "key\r\nBcc: us@evil.example\r\n\r\n<h1>x</h1>",
        "key\r\nEND:VEVENT\r\nBEGIN:VEVENT\r\nATTACH:https://evil.example/",
        "=?utf-8?q?key=0D=0ABcc:_us=40evil.example?=",
        "{{ own.count }} {% include 'style.css' %} {# x #}",
        "\" onmouseover=\"x()\" style=\"display:none",
    ];
    for text in typed {
        for (name, content) in contents() {
            let (is_test, items) = match content {
                Content::Test(items) => (true, items),
                Content::Reminders(items) => (false, items),
                Content::Alert(_) => continue,
            };
            let mut items = items;
            for item in &mut items {
                let texts = [&mut item.token.description, &mut item.owner.name, &mut item.owner.key];
                texts.into_iter().for_each(|place| text.clone_into(place));
                item.token.scopes = vec![text.to_owned()];
                (item.token.hint, item.token.external_id) = (Some(text.to_owned()), Some(text.to_owned()));
            }
            let content = if is_test { Content::Test(items) } else { Content::Reminders(items) };
            for language in LANGUAGES {
                let letter = letter(content.clone(), language);
                let composed = composer().compose(&letter, now()).expect("composed");
                harmless(&composed.bytes, &format!("{language}/{name} with {text:?}"));
            }
        }
    }
}

fn harmless(bytes: &[u8], of: &str) {
    let mail = MessageParser::default().parse(bytes).expect("a mail");
    let known = [
        "From",
        "To",
        "Subject",
        "Date",
        "Message-ID",
        "Auto-Submitted",
        "X-Auto-Response-Suppress",
        "Reply-To",
        "References",
        "MIME-Version",
        "Content-Type",
    ];
    let headers: Vec<&str> = mail.headers().iter().map(|header| header.name()).collect();
    assert!(headers.iter().all(|header| known.contains(header)), "{of}: {headers:?}");
    // What the template engine escapes though it need not.
    let html = mail.body_html(0).expect("HTML").replace("&#x2f;", "/");
    let document = html.to_lowercase();
    for attribute in ["href=", "src=", "onmouseover="] {
        for (at, _) in document.match_indices(attribute) {
            let value = document.get(at + attribute.len()..).expect("the rest");
            let inside =
                document.get(..at).expect("before").rfind(['<', '>']).map(|at| document[at..].starts_with('<'));
            let ours = attribute == "href=" && value.starts_with("\"https://example.org/tokens/");
            assert!(ours || inside != Some(true), "{of}: {attribute}{}", value.chars().take(40).collect::<String>());
        }
    }
    assert!(!["<script", "<img", "<h1>"].iter().any(|tag| document.contains(tag)), "{of}: {html}");
    let text = mail.body_text(0).expect("a text").into_owned();
    let files = mail.attachments().map(|part| part.text_contents().expect("a text").replace("\r\n ", ""));
    let files: Vec<String> = files.collect();
    for shown in [&text, &html].into_iter().chain(&files) {
        // What was typed as markup stands in the HTML as text; of a calendar file only what a program shows.
        let shown = shown.replace("mailto:tokens@example.org", "");
        let found: Vec<_> = LINKS.iter().filter(|link| shown.contains(**link)).collect();
        assert!(found.is_empty(), "{of}: {found:?} in {shown}");
    }
    for file in &files {
        let calendar = ICalendar::parse(file).unwrap_or_else(|entry| panic!("{of}: {entry:?}"));
        let attached = calendar.components.iter().any(|component| component.has_property(&ICalendarProperty::Attach));
        assert!(!attached, "{of}: {file}");
    }
}

#[test]
fn a_mail_is_in_the_contacts_language_or_else_in_its_owners() {
    let mut item = expiring(now() + TimeDelta::days(7));
    item.owner.locale = "de-AT".into();
    let mut letter = letter(Content::Reminders(vec![item]), "fr");
    let subject = |letter: &Letter| composer().write(letter, now()).expect("written").subject;
    assert_eq!(subject(&letter), "\"deploy key (CI)\" expires in 7 days", "there is no French");
    letter.to.locale = None;
    assert_eq!(subject(&letter), "„deploy key (CI)“ läuft in 7 Tagen ab");
    letter.to.locale = Some("en".into());
    assert_eq!(subject(&letter), "\"deploy key (CI)\" expires in 7 days");
}

/// The paragraphs of a document that stand before an indented block, and the block.
fn blocks(document: &str) -> Vec<(String, String)> {
    let (mut found, mut paragraph, mut block) = (Vec::new(), String::new(), String::new());
    for line in document.lines().chain(["end"]) {
        if let Some(code) = line.strip_prefix("    ") {
            block.push_str(code);
            block.push('\n');
        } else if line.is_empty() && !block.is_empty() {
            block.push('\n');
        } else if line.is_empty() {
            paragraph.push_str("\n\n");
        } else {
            if !block.is_empty() {
                let before = paragraph.trim_end().rsplit("\n\n").next().unwrap_or_default().to_owned();
                found.push((before, std::mem::take(&mut block).trim_end_matches('\n').to_owned() + "\n"));
                paragraph.clear();
            }
            paragraph.push_str(line);
            paragraph.push('\n');
        }
    }
    found
}

#[test]
fn the_documents_examples_are_true() {
    let blocks = blocks(include_str!("../../docs/mail.md"));
    let block = |before: &str| {
        let found = blocks.iter().find(|(paragraph, _)| paragraph.contains(before));
        found.unwrap_or_else(|| panic!("no block after {before:?} in {blocks:#?}")).1.as_str()
    };
    let seen = fs::read_to_string(directory().join("en/reminder-of-one.txt")).expect("a mail");
    assert!(seen.contains(block("The text of a reminder of one token")), "{seen}");

    let place = Place::new();
    fs::create_dir_all(place.path("templates/de/expired")).expect("a directory");
    fs::create_dir_all(place.path("templates/reminder")).expect("a directory");
    place.write("templates/reminder/subject.txt", block("`reminder/subject.txt`"));
    place.write("templates/de/expired/body.txt", block("`de/expired/body.txt`"));
    place.write("templates/_desk.txt", block("`_desk.txt`"));
    place.configure("[mail]\ntemplates = \"templates\"\n");
    let reminder = place.line("mail preview").ok();
    assert!(reminder.starts_with(block("`lapsed mail preview` begins with")), "{reminder}");
    let expired = place.line("mail preview --kind expired --locale de").ok();
    assert!(expired.ends_with(block("`lapsed mail preview --kind expired --locale de` ends with")), "{expired}");

    place.write("templates/reminder/subject.txt", "{#- Mine. -#}\n{{ ownr.count }} tokens");
    place.configure("[mail]\ntransport = \"maildir\"\nfrom = \"a@example.org\"\ntemplates = \"templates\"\n[mail.maildir]\npath = \"mail\"\n");
    let complaint = block("names that there are, and nothing starts").trim_end();
    for command in ["run --once", "mail preview"] {
        let said = place.line(command).fails(2);
        assert!(said.contains(complaint), "{said}");
    }
    let checked = place.line("check --format json").stdout.replace("\\\"", "\"");
    assert!(checked.contains(complaint), "{checked}");
}
