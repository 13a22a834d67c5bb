//! Twelve weeks of manual time through all jobs and a real SMTP conversation. What arrives is parsed back and compared
//! with a naive account of who is owed what, which shares no code with the policy.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::backend::{Backend, OnPostgres, OnSqlite};
use crate::support::smtp::Sink;
use crate::support::world::{World, dawn};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::config::Smtp;
use lapsed::mail::smtp;
use lapsed::mail::transport::Transport;
use lapsed::store::Accounts;
use lapsed::token::{OwnerId, TokenId};
use mail_parser::MessageParser;

const HOUR: i64 = 3_600;
const DAY: i64 = 24 * HOUR;

/// All that the naive account knows of a token, in seconds after dawn.
struct Known {
    id: TokenId,
    contacts: &'static [&'static str],
    made: i64,
    expires: i64,
    ended: i64,
}

/// How many reminders of a token are owed to each of its contacts: the rule in words, tick by tick.
fn owed(token: &Known, until: i64) -> usize {
    let life = token.expires - token.made;
    [30 * DAY, 7 * DAY, DAY, 0]
        .into_iter()
        .filter(|lead| {
            let due = token.expires - lead;
            *lead as f64 <= 0.8 * life as f64 && due <= until && due < token.ended
        })
        .count()
}

async fn twelve_weeks<B: Backend>() {
    let mut world = World::<B>::new().await;
    let sink = tokio::task::spawn_blocking(Sink::start).await.expect("smtp-sink starts");
    let server = Smtp { connections: 3, ..Smtp::plain("127.0.0.1", sink.port()) };
    let sessions = smtp::Smtp::sessions(server).into_iter();
    let mut deliverer = world.deliverer(sessions.map(|session| Transport::Smtp(Box::new(session))).collect());
    world.rules.batch = 4;

    let people: [(&str, &'static [&'static str]); 4] = [
        ("alice", &["alice@example.org"]),
        ("bob", &["bob@example.org"]),
        ("team", &["alice@example.org", "oncall@example.org"]),
        ("bot", &["oncall@example.org"]),
    ];
    let mut owners: Vec<(OwnerId, &'static [&'static str])> = Vec::new();
    for (key, contacts) in people {
        owners.push((world.owner(key, contacts).await, contacts));
    }
    let lives = [HOUR * 12, DAY, 2 * DAY, 8 * DAY, 9 * DAY, 30 * DAY, 37 * DAY, 38 * DAY, 60 * DAY, 80 * DAY];
    let mut known: Vec<Known> = Vec::new();
    let end = 84 * DAY;
    for now in (0..=end).step_by(6 * HOUR as usize) {
        world.clock.set(dawn() + TimeDelta::seconds(now));
        // A new token every day for eight weeks, each for another owner and another lifetime.
        if now % DAY == 0 && now < 56 * DAY {
            let day = (now / DAY) as usize;
            let ((owner, contacts), life) = (owners[day % owners.len()], lives[day % lives.len()]);
            let expires = now + life;
            let id = world.imported(owner, world.now(), dawn() + TimeDelta::seconds(expires)).await;
            known.push(Known { id, contacts, made: now, expires, ended: i64::MAX });
        }
        // Each fifth is revoked, an hour before it would have expired or after twenty days.
        for (n, token) in known.iter_mut().enumerate() {
            if n % 5 == 0 && token.ended == i64::MAX && now - token.made == 20 * DAY && now < token.expires {
                let instant = world.now();
                let revoke = world.store.change_token(token.id, |token| change::revoke(token, instant));
                revoke.await.expect("allowed");
                token.ended = now;
            }
        }
        world.expire().await;
        world.remind().await;
        let did = world.deliver(&mut deliverer).await;
        assert_eq!(did.retried + did.failed + did.lost, 0, "smtp-sink takes everything");
    }
    deliverer.close().await;

    let sent = world.backend.count("SELECT COUNT(*) FROM messages WHERE state = 'sent'").await;
    let stored = tokio::task::spawn_blocking(move || sink.wait_for(usize::try_from(sent).expect("a count")));
    let stored = stored.await.expect("smtp-sink stores");
    assert_eq!(stored.len() as i64, sent, "what was recorded as sent arrived, and nothing else");

    let mut arrived: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut ids = BTreeSet::new();
    for message in &stored {
        let mail = MessageParser::default().parse(&message.data).expect("a mail");
        assert!(ids.insert(mail.message_id().expect("a Message-ID").to_owned()), "each message once");
        let [to] = message.rcpt_to.as_slice() else { panic!("{:?}", message.rcpt_to) };
        assert!(mail.subject().is_some_and(|subject| subject.contains("expire")), "{:?}", mail.subject());
        assert_eq!(mail.header_raw("Auto-Submitted").map(str::trim), Some("auto-generated"));
        let text = mail.body_text(0).expect("a text part");
        let html = mail.body_html(0).expect("an HTML part");
        for token in &known {
            let link = format!("https://example.org/t/{}", token.id);
            // HTML writes the slashes of the link as references.
            assert_eq!(text.contains(&link), html.contains(&token.id.to_string()), "both parts say the same");
            if text.contains(&link) {
                *arrived.entry((to.clone(), token.id.to_string())).or_default() += 1;
            }
        }
    }
    let mut expected: BTreeMap<(String, String), usize> = BTreeMap::new();
    for token in &known {
        for contact in token.contacts {
            let count = owed(token, end);
            if count > 0 {
                expected.insert(((*contact).to_owned(), token.id.to_string()), count);
            }
        }
    }
    assert!(expected.len() > 50, "the story has something to tell: {}", expected.len());
    assert_eq!(arrived, expected);
}

#[tokio::test]
async fn twelve_weeks_on_sqlite() {
    twelve_weeks::<OnSqlite>().await;
}

#[tokio::test]
async fn twelve_weeks_on_postgres() {
    twelve_weeks::<OnPostgres>().await;
}
