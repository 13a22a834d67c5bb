use proptest::prelude::*;

use super::*;
use crate::mail::outcome::{Later, decide_later};

const ID: &str = "019ab5f3-5c40-7e65-9b6f-da1b104f4ab0";
const RETURN_PATH: &str = "bounces+x.y@example.org";

/// The samples: the shapes that mail systems write, with what they say of us left out.
macro_rules! samples {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../../tests/bounces/", $name, ".eml")))),+]
    };
}
const SAMPLES: &[(&str, &str)] = samples![
    "postfix-no-such-user",
    "exim-no-such-user",
    "exchange-not-found",
    "gmail-no-such-user",
    "exchange-mailbox-full",
    "exim-member-of-a-list",
    "gmail-refused-as-spam",
    "postfix-given-up",
    "postfix-delayed",
    "out-of-office",
    "a-person-answers",
];

fn ann() -> Address {
    Address::parse("ann@example.net").expect("an address")
}

/// A sample about our message to Ann.
fn sample(name: &str) -> String {
    let (_, text) = SAMPLES.iter().find(|(known, _)| *known == name).expect(name);
    let filled = text.replace("{{to}}", "Ann@example.net").replace("{{return_path}}", RETURN_PATH);
    filled.replace("{{message_id}}", &format!("{ID}@example.org"))
}

/// What follows from a sample.
fn later(name: &str) -> Later {
    decide_later(&read(sample(name).as_bytes()).expect(name), &ann())
}

fn failed(name: &str) -> (String, bool) {
    match later(name) {
        Later::Failed { reply, suppress } => (reply, suppress),
        Later::Nothing => panic!("{name}: nothing"),
    }
}

#[test]
fn what_each_mail_system_writes_says_which_message_and_to_whom_it_came() {
    for (name, _) in SAMPLES.iter().take(9) {
        let text = sample(name);
        let read_as_is = read(text.as_bytes()).expect(name);
        assert_eq!(read_as_is.about.map(|id| id.to_string()).as_deref(), Some(ID), "{name}");
        assert!(read_as_is.came_to.iter().any(|address| address == RETURN_PATH), "{name}: {:?}", read_as_is.came_to);
        assert_eq!(read_as_is.recipients.len(), 1, "{name}");
        assert_eq!(read(text.replace('\n', "\r\n").as_bytes()).expect(name), read_as_is, "{name} with CR LF");
    }
}

#[test]
fn an_address_that_does_not_exist_is_dead_whoever_says_so() {
    for (name, said) in [
        ("postfix-no-such-user", "bounced: 550 5.1.1 <Ann@example.net>: Recipient address rejected: User unknown"),
        ("exim-no-such-user", "bounced: 550 no such user here"),
        ("exchange-not-found", "bounced: 550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient Ann@example.net"),
        (
            "gmail-no-such-user",
            "bounced: 550-5.1.1 The account that you tried to reach is not there. Look for 550-5.1.1",
        ),
    ] {
        let (reply, suppress) = failed(name);
        assert!(reply.starts_with(said), "{name}: {reply}");
        assert!(suppress, "{name}");
    }
}

#[test]
fn what_is_not_the_addresss_fault_fails_and_does_not_suppress() {
    for (name, said) in [
        ("exchange-mailbox-full", "bounced: 554 5.2.2 mailbox full"),
        ("gmail-refused-as-spam", "bounced: 550-5.7.1 [192.0.2.7] Messages like this one"),
        ("postfix-given-up", "bounced: connect to mail.example.net[192.0.2.25]:25: Connection timed out"),
        ("exim-member-of-a-list", "bounced: 550 5.1.1 no such user here"),
    ] {
        let (reply, suppress) = failed(name);
        assert!(reply.starts_with(said), "{name}: {reply}");
        assert!(!suppress, "{name}");
    }
}

#[test]
fn what_is_still_being_tried_or_was_delivered_changes_nothing() {
    assert_eq!(later("postfix-delayed"), Later::Nothing);
    for action in ["delivered", "relayed", "expanded", "Delayed (for now)"] {
        let text = sample("postfix-no-such-user").replace("Action: failed", &format!("Action: {action}"));
        assert_eq!(decide_later(&read(text.as_bytes()).expect(action), &ann()), Later::Nothing, "{action}");
    }
}

#[test]
fn of_several_recipients_ours_counts() {
    let groups = |ours: &str, other: &str| {
        let text = sample("postfix-no-such-user").replace("Action: failed", &format!("Action: {ours}"));
        let more =
            format!("Action: {other}\nStatus: 5.7.1\nFinal-Recipient: rfc822; bob@example.net\n\nFinal-Recipient");
        read(text.replacen("Final-Recipient", &more, 1).as_bytes()).expect("a notification")
    };
    let suppressed = |later| matches!(later, Later::Failed { suppress: true, .. });
    assert!(suppressed(decide_later(&groups("failed", "delivered"), &ann())));
    assert!(suppressed(decide_later(&groups("failed", "failed"), &ann())), "the first group is not ours");
    assert_eq!(decide_later(&groups("delivered", "failed"), &ann()), Later::Nothing);
}

#[test]
fn the_status_counts_before_the_quoted_reply_and_a_status_for_now_never_suppresses() {
    for (status, diagnostic, suppress) in [
        ("5.7.1", "smtp; 550 5.1.1 no such user", false),
        ("5.0.0", "smtp; 550 5.1.1 no such user", true),
        ("5.0.0", "smtp; 550 5.7.1 no such user for you", false),
        ("5.0.0", "smtp; 550 blocked by our policy", false),
        ("5.0.0", "x-unix; no such user", false),
        ("4.1.1", "smtp; 450 4.1.1 no such user yet", false),
        ("4.0.0", "smtp; 550 5.1.1 no such user", false),
        ("5.1.1", "", true),
        ("", "smtp; 550 5.1.1 no such user", true),
        ("", "smtp; 550", false),
        ("nonsense", "nonsense", false),
        ("5.1.6 (moved)", "smtp; ü50 x", true),
    ] {
        let recipient = Recipient {
            address: Some(ann()),
            action: Action::Failed,
            status: status.to_owned(),
            diagnostic: diagnostic.to_owned(),
        };
        let notification = Notification { recipients: vec![recipient], ..Notification::default() };
        let Later::Failed { suppress: found, .. } = decide_later(&notification, &ann()) else { panic!("it failed") };
        assert_eq!(found, suppress, "{status} {diagnostic}");
    }
}

#[test]
fn what_is_no_notification_says_so() {
    assert_eq!(read(b""), Err(Unreadable::NotAMail));
    assert_eq!(read(sample("out-of-office").as_bytes()), Err(Unreadable::AutomaticAnswer));
    assert_eq!(read(sample("a-person-answers").as_bytes()), Err(Unreadable::NotANotification));
    let forwarded = format!("Subject: fwd\nContent-Type: message/rfc822\n\n{}", sample("postfix-no-such-user"));
    assert_eq!(read(forwarded.as_bytes()), Err(Unreadable::NotANotification), "it is about another mail");
    let nothing = sample("postfix-no-such-user").replace("Action:", "X-Action:");
    assert_eq!(read(nothing.as_bytes()), Err(Unreadable::NoRecipient));
    let unknown = sample("postfix-no-such-user").replace("Action: failed", "Action: exploded");
    assert_eq!(read(unknown.as_bytes()), Err(Unreadable::NoRecipient));
}

#[test]
fn a_message_id_that_is_not_ours_is_nobodys() {
    for id in ["abc@example.org", "019ab5f35c407e659b6fda1b104f4ab0@example.org", ID] {
        let text = sample("postfix-no-such-user").replace(&format!("{ID}@example.org"), id);
        assert_eq!(read(text.as_bytes()).expect("a notification").about, None, "{id}");
    }
}

/// Found by fuzzing: a debug build of the parser panics.
#[test]
fn a_mail_that_its_parser_gives_up_on_comes_to_an_end() {
    let read = read(include_bytes!("../../../tests/bounces/damaged.eml"));
    assert!(!cfg!(debug_assertions) || read == Err(Unreadable::Damaged), "{read:?}");
}

/// Whoever parses mails by descending into them runs out of stack.
#[test]
fn mails_within_mails_within_mails_come_to_an_end() {
    let most = usize::try_from(MAX_READ).expect("small");
    for layer in ["Content-Type: message/rfc822\n\n", "Content-Type: multipart/mixed; boundary=a\n\n--a\n"] {
        let deep = layer.repeat(most / layer.len());
        assert!(read(deep.as_bytes()).is_err());
    }
}

proptest! {
    #[test]
    fn any_bytes_come_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
        let _ = read(&bytes);
    }

    /// A sample with pieces cut out, doubled or overwritten.
    #[test]
    fn any_damage_comes_to_an_end(
        which in 0..SAMPLES.len(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), 0..80_usize, 0..3_u8, any::<u8>()), 1..8),
    ) {
        let mut bytes = sample(SAMPLES[which].0).into_bytes();
        for (at, length, kind, byte) in damage {
            let from = at.index(bytes.len().max(1)).min(bytes.len());
            let to = (from + length).min(bytes.len());
            match kind {
                0 => drop(bytes.drain(from..to)),
                1 => {
                    let piece = bytes[from..to].to_vec();
                    bytes.splice(from..from, piece);
                }
                _ => bytes[from..to].fill(byte),
            }
        }
        if let Ok(notification) = read(&bytes) {
            prop_assert!(!notification.recipients.is_empty());
            let _ = decide_later(&notification, &ann());
        }
    }

    #[test]
    fn any_report_is_read_to_its_end(text in "([A-Za-z-]{0,12}[:; ]{0,2}(failed|delayed|rfc822;|5\\.1\\.1|@|\\PC){0,4}[\n \r]{0,2}){0,12}") {
        let mail = format!("Content-Type: message/delivery-status\n\n{text}");
        if let Ok(notification) = read(mail.as_bytes()) {
            let _ = decide_later(&notification, &ann());
        }
    }
}
