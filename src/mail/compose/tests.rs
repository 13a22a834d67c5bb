use chrono::{TimeDelta, TimeZone, Utc};
use mail_parser::{Message as Parsed, MessageParser};
use proptest::prelude::*;
use unicode_width::UnicodeWidthStr;
use uuid::Uuid;

use super::*;
use crate::correction::Overtaken as Why;
use crate::mail::letter::{Change, Overtaken};
use crate::mail::wrap::COLUMNS;
use crate::policy::{Lead, Reason};
use crate::token::{Address, Contact, Kind, MessageId, Owner, OwnerId, Status, Token, TokenId};

const LINK: &str = "https://tokens.example.org/";

fn now() -> Timestamp {
    Utc.with_ymd_and_hms(2027, 1, 24, 8, 0, 0).unwrap()
}

fn composer() -> Composer {
    let from = "Token watch <lapsed@example.org>".parse().expect("a mailbox");
    let reply_to = "help@example.org".parse().expect("a mailbox");
    Composer::new(from, Some(reply_to), Some(format!("{LINK}{{owner_id}}/{{token_id}}?x={{external_id}}")))
        .expect("a composer")
}

fn owner(number: u128) -> Owner {
    Owner {
        id: OwnerId::from(Uuid::from_u128(0xa000 + number)),
        key: "platform".into(),
        name: "Platform Team".into(),
        time_zone: chrono_tz::Europe::Berlin,
        locale: "en".into(),
    }
}

fn item(number: u128, description: &str, expires_at: Timestamp) -> Item {
    let owner = owner(0);
    let token = Token {
        id: TokenId::from(Uuid::from_u128(0xb000 + number)),
        owner: owner.id,
        kind: Kind::Additional,
        description: description.into(),
        scopes: vec!["repo:read".into(), "repo:write".into()],
        issued: true,
        external_id: None,
        source: None,
        hint: Some("x7Qa".into()),
        created_at: now() - TimeDelta::days(83),
        moved_from: None,
        expires_at: Some(expires_at),
        deadline_set_at: now() - TimeDelta::days(83),
        generation: 0,
        unplanned: false,
        uncorrected: false,
        last_used_at: None,
        status: Status::Active,
        ended_at: None,
        replaced_by: None,
    };
    Item { token, owner, lead: Lead::new(TimeDelta::days(7)), escalation: None, change: None, overtaken: None }
}

/// The same where the reader was told of a deadline in 3 days, and the token was replaced since.
fn overtaken(item: &Item) -> Item {
    let overtaken = Overtaken { told: now() + TimeDelta::days(3), why: Why::Replaced };
    Item { overtaken: Some(overtaken), ..item.clone() }
}

/// 23:00 UTC on the 31st is the end of that day in Berlin.
fn end_of_january() -> Timestamp {
    Utc.with_ymd_and_hms(2027, 1, 31, 23, 0, 0).unwrap()
}

fn letter(items: Vec<Item>) -> Letter {
    let to = Contact {
        id: ContactId::from(Uuid::from_u128(0xc000)),
        address: Address::parse("ann@example.org").expect("an address"),
        time_zone: None,
        locale: None,
        suppressed: None,
    };
    Letter { message: MessageId::from(Uuid::from_u128(0xd000)), to, content: Content::Reminders(items) }
}

/// A composed mail as another program's parser reads it.
struct Read {
    subject: String,
    text: String,
    html: String,
    head: String,
    calendars: Vec<String>,
}

fn read(bytes: &[u8]) -> Read {
    let parsed: Parsed<'_> = MessageParser::default().parse(bytes).expect("a mail");
    assert_eq!((parsed.text_body_count(), parsed.html_body_count()), (1, 1));
    assert!(parsed.attachment_count() <= 2, "calendar files at most");
    let raw = String::from_utf8_lossy(bytes);
    Read {
        subject: parsed.subject().expect("a subject").to_owned(),
        text: parsed.body_text(0).expect("a text").replace("\r\n", "\n"),
        html: parsed.body_html(0).expect("HTML").into_owned(),
        head: raw.split_once("\r\n\r\n").expect("a head").0.to_owned(),
        calendars: parsed.attachments().map(|part| part.text_contents().expect("a calendar file").to_owned()).collect(),
    }
}

fn compose(items: Vec<Item>) -> Read {
    read(&composer().compose(&letter(items), now()).expect("composed").bytes)
}

fn in_days(number: u128, days: i64) -> Item {
    item(number, &format!("key {number}"), now() + TimeDelta::days(days))
}

#[test]
fn one_token_says_everything_about_it() {
    let mail = compose(vec![item(1, "deploy key (CI)", end_of_january())]);
    assert_eq!(mail.subject, "\"deploy key (CI)\" expires in 7 days");
    assert_eq!(
        mail.text,
        "This token expires soon.\n\
         \n\
         * deploy key (CI)\n\
         \u{20} expires   in 7 days, at the end of 31 January 2027\n\
         \u{20} exactly   2027-02-01 00:00:00 CET (UTC+01:00)\n\
         \u{20} in UTC    2027-01-31 23:00:00 UTC\n\
         \u{20} owner     Platform Team (platform)\n\
         \u{20} token     additional, ends in ...x7Qa\n\
         \u{20} scopes    repo:read, repo:write\n\
         \u{20} created   2 November 2026, 2 months ago\n\
         \u{20} last used never used, it may be safe to let it expire\n\
         \u{20} replace   https://tokens.example.org/00000000-0000-0000-0000-00000000a000/00000000-0000-0000-0000-00000000b001?x=\n\
         \n\
         To keep what uses a token working, replace the token before its deadline\n\
         and put the new one wherever the old one is used. One that nobody needs\n\
         any more can be left to expire.\n\
         \n\
         -- \n\
         Sent by lapsed, which watches the deadlines of API tokens, because this\n\
         address is a contact of the owners of these tokens."
    );
    assert!(mail.html.contains("<html lang=\"en\">"));
    assert!(mail.html.contains("in 7 days, at the end of 31 January 2027"));
    assert!(mail.html.contains(
        "<a class=\"button\" href=\"https:&#x2f;&#x2f;tokens.example.org&#x2f;00000000-0000-0000-0000-00000000a000&#x2f;00000000-0000-0000-0000-00000000b001?x=\""
    ));
}

#[test]
fn the_headers_are_those_of_an_automatic_mail() {
    let composed = composer().compose(&letter(vec![in_days(1, 7)]), now()).expect("composed");
    let mail = read(&composed.bytes);
    let mut lines: Vec<&str> = mail.head.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            " boundary=\"lapsed-parts-00000000-0000-0000-0000-00000000d000\"",
            "Auto-Submitted: auto-generated",
            "Content-Type: multipart/mixed;",
            "Date: Sun, 24 Jan 2027 08:00:00 +0000",
            "From: \"Token watch\" <lapsed@example.org>",
            "MIME-Version: 1.0",
            "Message-ID: <00000000-0000-0000-0000-00000000d000@example.org>",
            "References: <token-00000000-0000-0000-0000-00000000b001@example.org>",
            "Reply-To: help@example.org",
            "Subject: \"key 1\" expires in 7 days",
            "To: ann@example.org",
            "X-Auto-Response-Suppress: All",
        ]
    );
    let from: &str = composed.from.as_ref();
    let to: &str = composed.to.as_ref();
    assert_eq!((from, to), ("lapsed@example.org", "ann@example.org"));
    assert!(composed.bytes.is_ascii() && composed.bytes.ends_with(b"\r\n"));
}

#[test]
fn composing_again_makes_the_same_mail() {
    let letter = letter(vec![in_days(2, 7), in_days(1, 3)]);
    let (once, again) = (composer().compose(&letter, now()), composer().compose(&letter, now()));
    assert_eq!(once.expect("composed"), again.expect("composed"));
    let later = composer().compose(&letter, now() + TimeDelta::days(2)).expect("composed");
    assert!(read(&later.bytes).head.contains("Message-ID: <00000000-0000-0000-0000-00000000d000@example.org>"));
}

#[test]
fn subjects_say_first_what_it_is_about() {
    let escalated = |number, owner_number, days| Item {
        owner: owner(owner_number),
        escalation: Some(Reason::NoContact),
        ..in_days(number, days)
    };
    for (items, subject) in [
        (vec![in_days(1, 7)], "\"key 1\" expires in 7 days"),
        (vec![in_days(1, 1)], "\"key 1\" expires tomorrow"),
        (vec![item(1, "ci", now() + TimeDelta::hours(2))], "\"ci\" expires today, in 2 hours"),
        (vec![item(1, "ci", now())], "\"ci\" expired today"),
        (vec![in_days(1, -1)], "\"key 1\" expired yesterday"),
        (vec![in_days(1, 7), in_days(2, 7)], "2 tokens expire in 7 days"),
        (vec![in_days(1, 7), in_days(2, 1), in_days(3, 30)], "3 tokens expire soon, the first tomorrow"),
        (vec![in_days(1, 0), in_days(2, 0)], "2 tokens expired today"),
        (vec![in_days(1, 0), in_days(2, -3)], "2 tokens have expired"),
        (vec![in_days(1, 0), in_days(2, 3)], "1 token has expired, 1 more expires soon"),
        (
            vec![in_days(1, 0), in_days(2, -1), in_days(3, 3), in_days(4, 3)],
            "2 tokens have expired, 2 more expire soon",
        ),
        (vec![escalated(1, 1, 7)], "1 owner could not be told about 1 token"),
        (vec![escalated(1, 1, 7), escalated(2, 1, 7), escalated(3, 2, 7)], "2 owners could not be told about 3 tokens"),
        (
            vec![in_days(1, 7), escalated(2, 1, 7)],
            "\"key 1\" expires in 7 days; 1 owner could not be told about 1 token",
        ),
        (
            vec![item(1, &"long ".repeat(40), now() + TimeDelta::days(7))],
            "\"long long long long long long long long long long long long…\" expires in 7 days",
        ),
    ] {
        assert_eq!(compose(items).subject, subject);
    }
}

#[test]
fn the_most_urgent_stand_first_and_the_rest_is_counted() {
    let items: Vec<Item> = (1..=60).rev().map(|days| in_days(u128::try_from(days).expect("positive"), days)).collect();
    let mail = compose(items);
    assert_eq!(mail.subject, "60 tokens expire soon, the first tomorrow");
    let listed: Vec<&str> = mail.text.lines().filter_map(|line| line.strip_prefix("* ")).collect();
    assert_eq!(listed.len(), LISTED);
    assert_eq!((listed[0], listed[1], listed[49]), ("key 1", "key 2", "key 50"));
    assert!(mail.text.contains("\n... and 10 more.\n"));
    assert_eq!(mail.html.matches("<h3").count(), LISTED);
    assert!(mail.html.contains("... and 10 more."));
}

#[test]
fn the_zone_is_the_contacts_else_the_owners() {
    let mut letter = letter(vec![item(1, "ci", end_of_january())]);
    letter.to.time_zone = Some(chrono_tz::Pacific::Kiritimati);
    let mail = read(&composer().compose(&letter, now()).expect("composed").bytes);
    assert!(mail.text.contains("in 8 days, on 1 February 2027 at 13:00"), "{}", mail.text);
    letter.to.time_zone = Some(chrono_tz::UTC);
    let mail = read(&composer().compose(&letter, now()).expect("composed").bytes);
    assert!(mail.text.contains("in 7 days, on 31 January 2027 at 23:00"));
    assert_eq!(mail.text.matches("2027-01-31 23:00:00 UTC").count(), 1, "once is enough");
}

#[test]
fn the_fallback_learns_who_could_not_be_told_and_why() {
    let why = "the owner has no contact that takes mail";
    let mut imported = in_days(2, 3);
    imported.token.issued = false;
    imported.token.external_id = Some("gitlab/42".into());
    let items = vec![
        in_days(3, 9),
        Item { escalation: Some(Reason::NoContact), ..in_days(1, 7) },
        Item { escalation: Some(Reason::NoContact), ..imported },
    ];
    let mail = compose(items);
    let (own, escalated) = mail.text.split_once("THESE OWNERS COULD NOT BE TOLD\n").expect("two parts");
    assert!(own.contains("* key 3\n") && !own.contains("* key 1\n"));
    assert!(escalated.contains(&format!("  not told  {why}\n  rotate    lapsed token rotate 000000b001\n")));
    assert!(escalated.contains(&format!("  not told  {why}\n  look up   lapsed token show 000000b002\n")));
    assert!(escalated.contains("  known as  gitlab/42\n"));
    assert!(mail.html.contains("These owners could not be told</h2>"));
}

#[test]
fn bounces_come_to_a_return_path_of_the_messages_own() {
    let composer = Composer::new("lapsed@example.org".parse().expect("a mailbox"), None, None).expect("a composer");
    let plain = composer.compose(&letter(vec![in_days(1, 7)]), now()).expect("composed");
    assert_eq!(plain.from.to_string(), "lapsed@example.org");
    let paths = ReturnPath::new("bounces@example.org".parse().expect("an address"), b"geheim");
    let composer = composer.with_return_path(Some(paths.clone()));
    let signed = composer.compose(&letter(vec![in_days(1, 7)]), now()).expect("composed");
    assert_eq!(signed.from, paths.of(letter(Vec::new()).message).expect("an address"));
    assert_eq!(signed.bytes, plain.bytes, "only the envelope differs");
}

#[test]
fn without_a_link_the_mail_says_who_can_replace_a_token() {
    let composer = Composer::new("lapsed@example.org".parse().expect("a mailbox"), None, None).expect("a composer");
    let mut imported = in_days(2, 7);
    imported.token.issued = false;
    let mail = read(&composer.compose(&letter(vec![in_days(1, 7), imported]), now()).expect("composed").bytes);
    assert!(mail.text.contains("  replace   ask an operator, who runs: lapsed token rotate 000000b001\n"));
    assert!(mail.text.contains("  replace   where it was issued\n"));
    assert!(!mail.html.contains("<a "));
    assert!(!mail.head.contains("Reply-To"));
}

#[test]
fn a_mail_about_several_tokens_begins_a_thread_of_its_own() {
    assert!(!compose(vec![in_days(1, 7), in_days(2, 7)]).head.contains("References"));
    let first = "References: <token-00000000-0000-0000-0000-00000000b001@example.org>";
    for days in [30, 7, -1] {
        assert!(compose(vec![in_days(1, days)]).head.contains(first), "later mails about one token follow the first");
    }
}

#[test]
fn what_cannot_be_composed_says_why_and_names_no_address() {
    let composer = composer();
    let mut broken = letter(vec![in_days(1, 7)]);
    broken.to.address = Address::from_store("ann@example.org\r\nBcc: all@example.org".into());
    let error = composer.compose(&broken, now()).expect_err("no address").to_string();
    assert_eq!(error, "the address of contact 00000000-0000-0000-0000-00000000c000 is not a mail address");
    let mut without_deadline = in_days(1, 7);
    without_deadline.token.expires_at = None;
    assert!(matches!(composer.compose(&letter(vec![without_deadline]), now()), Err(ComposeError::Nothing)));
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let from = || "lapsed@example.org".parse::<Mailbox>().expect("a mailbox");
    for (url, problem) in [
        ("ftp://example.org", "it begins with https:// or http://"),
        ("javascript:alert(1)", "it begins with https:// or http://"),
        ("https://example.org/{token}", "the placeholders are {token_id}, {owner_id} and {external_id}"),
        ("https://example.org/{token_id", "a { is not closed"),
        ("https://example.org/a b", "it has a character that a link cannot have"),
    ] {
        let error = Composer::new(from(), None, Some(url.into())).expect_err(url).to_string();
        assert!(error.ends_with(problem), "{error}");
    }
    let mut from = from();
    from.name = Some("Token\r\nBcc: all@example.org\0 watch".into());
    from.email = lettre::Address::new("lapsed", "bücher.example").expect("an address");
    let composer = Composer::new(from, None, None).expect("a composer");
    let composed = composer.compose(&letter(vec![in_days(1, 7)]), now()).expect("composed");
    let parsed = MessageParser::default().parse(&composed.bytes).expect("a mail");
    let from = parsed.from().and_then(|from| from.first()).expect("a sender");
    assert_eq!(from.name(), Some("Token Bcc: all@example.org watch"));
    assert_eq!(from.address(), Some("lapsed@xn--bcher-kva.example"));
    assert!(parsed.bcc().is_none());
}

#[test]
fn an_address_with_other_letters_is_kept() {
    let mut letter = letter(vec![in_days(1, 7)]);
    letter.to.address = Address::parse("jürgen@bücher.example").expect("an address");
    let composed = composer().compose(&letter, now()).expect("composed");
    let to: &str = composed.to.as_ref();
    assert_eq!(to, "jürgen@xn--bcher-kva.example");
    let parsed = MessageParser::default().parse(&composed.bytes).expect("a mail");
    let to = parsed.to().and_then(|to| to.first()).and_then(|to| to.address());
    assert_eq!(to, Some("jürgen@xn--bcher-kva.example"));
}

#[test]
fn hostile_texts_become_neither_headers_nor_links_nor_markup() {
    let hostile = "<img src=x onerror=alert(1)>\r\nBcc: all@evil.example\0 \u{202e}https://evil.example </bdi><a href=\"https://evil.example\">x</a> {{ 7 * 7 }}";
    let mut item = item(1, hostile, end_of_january());
    item.owner.name = hostile.into();
    item.owner.key = hostile.into();
    item.token.scopes = vec![hostile.into()];
    item.token.hint = Some(hostile.into());
    item.token.external_id = Some(hostile.into());
    item.change = Some(Change { before: None });
    let escalated = Item { escalation: Some(Reason::NoContact), ..item.clone() };
    let mail = compose(vec![overtaken(&item), item, escalated]);
    check(&mail);
    assert!(mail.text.contains("{{ 7 * 7"), "a template in a description is a text");
    assert!(mail.html.contains("&lt;img src=x onerror=alert(1)&gt;"));
}

/// What holds for every mail, whatever people typed.
fn check(mail: &Read) {
    let known = ["Auto-Submitted", "Content-Type", "Date", "From", "MIME-Version", "Message-ID", "References"];
    let known = known.into_iter().chain(["Reply-To", "Subject", "To", "X-Auto-Response-Suppress"]);
    let known: Vec<&str> = known.collect();
    for line in mail.head.lines().filter(|line| !line.starts_with(' ')) {
        assert!(known.iter().any(|name| line.starts_with(&format!("{name}: "))), "{line}");
    }
    let hidden = |c: char| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c);
    assert!(!mail.subject.contains(hidden) && !mail.subject.contains('\n'), "{:?}", mail.subject);
    assert!(!mail.text.contains(hidden), "{:?}", mail.text);
    for line in mail.text.lines() {
        assert!(line.width() <= COLUMNS || line.contains(LINK), "{line:?}");
    }
    for (at, _) in mail.text.match_indices("://") {
        let start = at.saturating_sub("https".len());
        assert!(mail.text.get(start..).is_some_and(|rest| rest.starts_with(LINK)), "{:?}", mail.text);
    }
    let allowed = [
        "!DOCTYPE", "a", "bdi", "body", "code", "div", "h1", "h2", "h3", "head", "html", "meta", "p", "style", "tbody",
    ];
    let allowed = allowed.into_iter().chain(["table", "td", "th", "title", "tr"]).collect::<Vec<_>>();
    for tag in mail.html.split('<').skip(1) {
        let name = tag.trim_start_matches('/').split(['>', ' ']).next().unwrap_or_default();
        assert!(allowed.contains(&name), "<{tag}");
    }
    let names =
        ["BEGIN", "VERSION", "PRODID", "METHOD", "UID", "SEQUENCE", "DTSTAMP", "DTSTART", "SUMMARY", "DESCRIPTION"];
    let names: Vec<&str> =
        names.into_iter().chain(["ORGANIZER", "STATUS", "URL", "TRANSP", "ACTION", "TRIGGER", "END"]).collect();
    for calendar in &mail.calendars {
        assert!(calcard::icalendar::ICalendar::parse(calendar).is_ok(), "{calendar:?}");
    }
    for line in mail
        .calendars
        .iter()
        .flat_map(|calendar| calendar.split_terminator("\r\n"))
        .filter(|line| !line.starts_with(' '))
    {
        let name = line.split(':').next().unwrap_or_default();
        assert!(names.contains(&name) && !line.contains(hidden), "{line:?}");
        assert!(name != "URL" || line.starts_with(&format!("URL:{LINK}")), "{line:?}");
    }
    for link in mail.html.split("href=\"").skip(1) {
        assert!(link.starts_with("https:&#x2f;&#x2f;tokens.example.org&#x2f;"), "{link}");
    }
}

fn hostile_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<String>(),
        Just("\r\nBcc: all@evil.example\r\n\r\n<script>".to_owned()),
        Just("\0\u{202e}\u{2066}\u{200b}\u{feff}".to_owned()),
        Just("https://evil.example/ www.evil.example".to_owned()),
        Just("\"'><img src=x>&amp;{{ x }}{% for".to_owned()),
        Just("👩\u{200d}👩\u{200d}👧 日本語 עברית e\u{301}".to_owned()),
        Just("x".repeat(10_000)),
        Just("\u{301}".repeat(10_000)),
        Just("=?utf-8?q?=0d=0aBcc:_all?= --lapsed-".to_owned()),
    ];
    prop::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_text_breaks_out(
        description in hostile_text(),
        name in hostile_text(),
        key in hostile_text(),
        scope in hostile_text(),
        hint in hostile_text(),
        external_id in hostile_text(),
        changed: bool,
        corrected: bool,
        escalated: bool,
        german: bool,
        sender in hostile_text(),
        address in prop::option::of(hostile_text()),
        days in -400i64..400,
    ) {
        let mut item = item(1, &description, now() + TimeDelta::days(days));
        item.owner.name = name;
        item.owner.key = key;
        item.token.scopes = vec![scope; 30];
        item.token.hint = Some(hint);
        item.token.external_id = Some(external_id);
        item.escalation = escalated.then_some(Reason::Undeliverable);
        item.change = changed.then_some(Change { before: None });
        item.owner.locale = if german { "de" } else { "en" }.into();
        let mut from: Mailbox = "lapsed@example.org".parse().expect("a mailbox");
        from.name = Some(sender);
        let composer = Composer::new(from, Some("help@example.org".parse().expect("a mailbox")), Some(format!("{LINK}{{external_id}}")));
        let mut items = vec![item.clone()];
        items.extend(corrected.then(|| overtaken(&item)));
        let mut letter = letter(items);
        let composer = composer.expect("a composer");
        if let Some(address) = address {
            let mut hostile = letter.clone();
            hostile.to.address = Address::from_store(format!("{address}@example.org"));
            match composer.compose(&hostile, now()) {
                Ok(composed) => check(&read(&composed.bytes)),
                Err(error) => prop_assert!(matches!(error, ComposeError::Recipient(_)), "{error}"),
            }
            letter.to.locale = Some(address);
        }
        let composed = composer.compose(&letter, now()).expect("composed");
        prop_assert!(composed.bytes.is_ascii());
        prop_assert!(composed.bytes.split(|byte| *byte == b'\n').all(|line| line.len() <= 998 && (line.is_empty() || line.ends_with(b"\r"))));
        prop_assert!(composed.bytes.len() < 200_000, "{}", composed.bytes.len());
        check(&read(&composed.bytes));
    }
}
