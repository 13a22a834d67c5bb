//! The outbox as operators handle it: what is listed, what is refused and why, and what the guards make of a wrong import.

use crate::support::cli::{Place, cells, fact};

/// Mail into a directory, somebody who is told, and one message an hour.
const GUARDED: &str = r#"
    [mail]
    transport = "maildir"
    from = "Tokens <tokens@example.org>"
    fallback_to = "ops@example.org"
    [mail.maildir]
    path = "mail"
    [guard]
    messages_per_hour = 1
"#;

/// A place with three imported tokens that are due: one was mailed, two are held.
fn with_held() -> Place {
    let place = Place::new();
    place.configure(GUARDED);
    let list = "owner,emails,description,expires_at\n\
                alice,alice@example.org,deploy,2d\nbob,bob@example.org,mirror,3d\ncarol,carol@example.org,backup,4d\n";
    let now = chrono::DateTime::from_timestamp(
        std::time::SystemTime::UNIX_EPOCH.elapsed().expect("a time").as_secs().cast_signed(),
        0,
    )
    .expect("in range");
    let list = ["2d", "3d", "4d"].iter().zip(2..).fold(list.to_owned(), |list, (span, days)| {
        let at = now + chrono::TimeDelta::days(days);
        list.replace(&format!(",{span}\n"), &format!(",{}\n", at.format("%Y-%m-%dT%H:%M:%SZ")))
    });
    place.write("list.csv", &list);
    place.line("token import list.csv").ok();
    let ran = place.line("run --once");
    assert!(ran.status == Some(1) && ran.stderr.contains("a guard kept something back"), "{ran}");
    place
}

fn listed(place: &Place, arguments: &str) -> Vec<Vec<String>> {
    let table = place.line(&format!("outbox list {arguments}")).ok();
    table.lines().skip(1).map(|line| cells(line).into_iter().map(str::to_owned).collect()).collect()
}

#[test]
fn what_a_guard_holds_is_listed_shown_and_let_go() {
    let place = with_held();
    let held = listed(&place, "--state held");
    assert_eq!(held.len(), 2, "{held:?}");
    let first = &held[0];
    assert_eq!((&*first[1], &*first[3]), ("held", "1 reminder"), "{first:?}");
    assert!(first[2].ends_with("@example.org") && first[4].starts_with("first deadline in "), "{first:?}");
    let status = place.line("status").ok();
    assert!(fact(&status, "held").starts_with("2, by a guard: `lapsed outbox list --state held`"), "{status}");
    let shown = place.line(&format!("outbox show {}", first[0])).ok();
    assert_eq!((fact(&shown, "state"), fact(&shown, "to")), ("held".into(), first[2].clone()), "{shown}");
    assert!(shown.lines().last().is_some_and(|line| line.contains("7d") && line.contains("pending")), "{shown}");
    // The fallback was told at once, in its own words.
    let alerts = |place: &Place| {
        let mails = place.mails("mail");
        mails.iter().filter(|mail| String::from_utf8_lossy(mail).contains("mails are held back")).count()
    };
    assert_eq!(alerts(&place), 1);

    let released = place.line(&format!("outbox release {}", first[0])).ok();
    assert_eq!(fact(&released, "released"), "1 message");
    assert_eq!(listed(&place, "--state held").len(), 1);
    assert_eq!(fact(&place.line("outbox cancel --held").ok(), "cancelled"), "1 message");
    place.line("run --once").ok();
    assert_eq!(listed(&place, ""), Vec::<Vec<String>>::new());
    let all = listed(&place, "--all");
    let mut states: Vec<&str> = all.iter().map(|cells| &*cells[1]).collect();
    states.sort_unstable();
    assert_eq!(states, ["cancelled", "sent", "sent", "sent"], "{all:?}");
    assert_eq!(alerts(&place), 1, "nobody is told twice");
    let nothing = place.line("outbox release --all");
    assert!(nothing.stderr.contains("No message is held."), "{nothing}");
}

#[test]
fn what_cannot_be_done_says_why() {
    let place = with_held();
    let id = |state: &str| listed(&place, &format!("--state {state}"))[0][0].clone();
    let (held, sent) = (id("held"), id("sent"));
    for (arguments, why) in [
        (format!("release {sent}"), "only a message that a guard holds can be released"),
        (format!("cancel {sent}"), "it was sent already"),
        (format!("retry {sent}"), "it was sent already"),
        (format!("retry {held}"), "`lapsed outbox release` lets it go"),
        ("show nonsense!".to_owned(), "is not a message's id"),
        ("show 00000000".to_owned(), "there is no message 00000000"),
        ("list --to nobody@example.org".to_owned(), "nobody@example.org is not a contact"),
    ] {
        let complaint = place.line(&format!("outbox {arguments}")).fails(1);
        assert!(complaint.contains(why), "{arguments}: {complaint}");
    }
    for arguments in
        ["release", "cancel", "retry", "cancel --held x", "list --state nowhere", "list --all --state held"]
    {
        place.line(&format!("outbox {arguments}")).fails(2);
    }
    // A mistake among several changes nothing.
    place.line(&format!("outbox release {held} {sent}")).fails(1);
    assert_eq!(listed(&place, "--state held").len(), 2);
    let lines = place.line("outbox list --format json --state held").ok();
    let first: serde_json::Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    assert_eq!(
        (&first["state"], &first["kind"], &first["reminders"]),
        (&"held".into(), &"reminders".into(), &1.into())
    );
    let csv = place.line("outbox list --format csv --state open").ok();
    assert_eq!(csv.lines().count(), 1, "the header: {csv}");
}

#[test]
fn an_address_can_take_mail_again() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let not = place.line("owner contact unsuppress alice@example.org");
    assert!(not.stderr.contains("was not suppressed"), "{not}");
    place.line("owner contact unsuppress bob@example.org").fails(1);
}
