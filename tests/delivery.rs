//! Delivery, as a story on each back end: one mail to a contact, true when it is sent, and none lost.

use std::sync::Arc;
use std::time::Duration;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, at, days};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::clock::{Clock, SystemClock};
use lapsed::config::Schedule;
use lapsed::jobs::deliver::{Delivered, LEASE, Terms};
use lapsed::jobs::purge::Retention;
use lapsed::mail::compose::Composer;
use lapsed::mail::outcome::{Happened, Phase};
use lapsed::mail::transport::{Memory, Transport};
use lapsed::schedule::Cron;
use lapsed::service::{self, Setup};
use lapsed::store::{Accounts, Outbox};
use lapsed::token::{ContactId, TokenId};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

on_every_back_end!(
    one_mail_speaks_of_all_tokens,
    a_rotation_cancels_what_is_pending,
    of_several_leads_only_the_tightest_speaks,
    a_retry_says_the_same_or_less,
    a_dead_address_is_suppressed,
    another_contact_is_enough,
    another_contact_that_was_not_told_is_not_enough,
    a_refused_message_is_escalated,
    a_server_out_of_reach_touches_no_message,
    a_process_that_died_is_taken_over_from,
    an_unknown_outcome_is_tried_again_under_the_same_id,
    any_answer_can_be_recorded,
    a_removed_contact_hears_nothing,
    the_fallback_hears_of_everything_in_one_mail,
    a_new_fallback_hears_what_the_old_one_did_not,
    nothing_starves_behind_what_fails,
    nothing_starves_behind_what_is_due_again_and_again,
    a_message_that_cannot_be_read_is_given_up_and_told_of,
    a_token_that_cannot_be_read_holds_nobody_up,
    what_fails_for_two_days_is_given_up,
);

const SENT: Delivered = Delivered { sent: 1, retried: 0, unknown: 0, failed: 0, put_off: 0, cancelled: 0, lost: 0 };

fn refused(phase: Phase, code: u16, text: &str) -> Happened {
    Happened::refused(phase, code, text)
}

async fn one_mail_speaks_of_all_tokens<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let bot = world.owner("bot", &["alice@example.org"]).await;
    let tokens = [world.token(alice, 90).await, world.token(alice, 88).await, world.token(bot, 89).await];
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT);
    assert_eq!(courier.delivered(), ["alice@example.org: 3 tokens expire soon, the first in 28 days"]);
    for token in tokens {
        assert_eq!(world.ledger(token).await, ["0: 30d sent to alice@example.org"]);
    }
    assert_eq!(world.deliver(&mut courier.deliverer).await, Delivered::default(), "once");
}

async fn a_rotation_cancels_what_is_pending<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    let now = world.on_day(60);
    world.remind().await;
    world.store.change_token(token, |token| change::rotate(token, days(1), None, now)).await.expect("a rotation");
    let mut courier = world.courier();
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { cancelled: 1, ..Delivered::default() });
    assert!(courier.delivered().is_empty());
    assert_eq!(world.ledger(token).await, ["0: 30d cancelled to alice@example.org"]);
}

async fn of_several_leads_only_the_tightest_speaks<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    let ended = world.token(alice, 85).await;
    for day in [60, 84, 86] {
        world.on_day(day);
        world.remind().await;
        world.expire().await;
    }
    let mut courier = world.courier();
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT);
    let to = "to alice@example.org";
    let expected = [format!("0: 30d superseded {to}"), format!("0: 7d sent {to}")];
    assert_eq!(world.ledger(token).await, expected);
    let expected = [
        format!("0: 30d superseded {to}"),
        format!("0: 7d superseded {to}"),
        format!("0: 1d superseded {to}"),
        format!("0: expired sent {to}"),
    ];
    assert_eq!(world.ledger(ended).await, expected);
}

async fn a_retry_says_the_same_or_less<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let (stays, goes) = (world.token(alice, 90).await, world.token(alice, 90).await);
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    courier.memory.answer(refused(Phase::Rcpt, 450, "4.2.0 greylisted"));
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { retried: 1, ..Delivered::default() });
    let (first, _) = only_message(&world).await;

    // Meanwhile something else falls due, and one of the two is revoked.
    let late = world.imported(alice, world.now() - days(100), world.now() + days(5)).await;
    let now = world.now();
    world.store.change_token(goes, |token| change::revoke(token, now)).await.expect("allowed");
    world.remind().await;
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT, "the new one goes at once, in a message of its own");
    world.clock.advance(TimeDelta::minutes(1));
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT, "then the retry");

    let mails = courier.memory.delivered();
    assert_eq!(mails.len(), 2);
    assert_ne!(mails[0].0, mails[1].0);
    assert_eq!(mails[1].0.uuid(), first, "the same message");
    let text = String::from_utf8_lossy(&mails[1].1.bytes).into_owned();
    assert!(text.contains(&format!("Message-ID: <{first}@example.org>")), "{text}");
    assert!(text.contains(&short_link(stays)) && !text.contains(&short_link(late)), "{text}");
    assert!(!text.contains(&short_link(goes)), "what was revoked meanwhile is not spoken of");
    assert_eq!(world.ledger(goes).await, ["0: 30d cancelled to alice@example.org"]);
}

async fn a_dead_address_is_suppressed<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let alice = world.owner("alice", &["gone@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    courier.memory.answer(refused(Phase::Rcpt, 550, "5.1.1 no such user"));
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { sent: 1, failed: 1, ..Delivered::default() });
    assert_eq!(courier.delivered().len(), 1);
    assert!(courier.delivered()[0].starts_with("ops@example.org: "), "{:?}", courier.delivered());
    let contacts = world.store.contacts_of(alice).await.expect("a read");
    let why = contacts[0].suppressed.as_ref().map(|suppressed| suppressed.why.as_str());
    assert!(why.is_some_and(|why| why.contains("5.1.1")), "{why:?}");
    let mut ledger = world.ledger(token).await;
    ledger.sort();
    assert_eq!(ledger, ["0: 30d failed to gone@example.org", "0: 30d sent to ops@example.org escalated"]);
    // From now on the owner has nobody who takes mail.
    world.on_day(83);
    world.remind().await;
    let ledger = world.ledger(token).await;
    assert!(ledger.contains(&"0: 7d unreachable to nobody".to_owned()), "{ledger:?}");
}

async fn another_contact_is_enough<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let team = world.owner("team", &["here@example.org", "left@example.org"]).await;
    world.token(team, 90).await;
    world.on_day(60);
    world.remind().await;
    world.backend.execute("UPDATE contacts SET suppressed_at = created_at WHERE address = 'left@example.org'").await;
    let mut courier = world.courier();
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { sent: 1, cancelled: 1, ..Delivered::default() });
    assert_eq!(courier.delivered().len(), 1, "here was told; the fallback need not be");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM reminders WHERE escalation").await, 0);
}

async fn another_contact_that_was_not_told_is_not_enough<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let team = world.owner("team", &["left@example.org"]).await;
    world.token(team, 90).await;
    world.on_day(60);
    world.remind().await;
    // Whoever joins now hears of the next lead, and not of this one.
    world.store.link_contact(team, &at("here@example.org").into(), world.now()).await.expect("a write");
    let mut courier = world.courier();
    courier.memory.answer(Happened::refused(Phase::Rcpt, 550, "5.1.1 no such user"));
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { sent: 1, failed: 1, ..Delivered::default() });
    assert_eq!(courier.delivered(), ["ops@example.org: 1 owner could not be told about 1 token"]);
}

async fn a_refused_message_is_escalated<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    courier.memory.answer(refused(Phase::Dot, 554, "5.7.1 looks like spam"));
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { sent: 1, failed: 1, ..Delivered::default() });
    let contacts = world.store.contacts_of(alice).await.expect("a read");
    assert_eq!(contacts[0].suppressed, None, "the address is not at fault");
}

async fn a_server_out_of_reach_touches_no_message<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    courier.memory.set_down(Some(Happened::Broken { phase: Phase::Connect, error: "refused".into() }));
    for _ in 0..20 {
        assert_eq!(world.deliver(&mut courier.deliverer).await, Delivered::default());
        assert!(courier.deliverer.is_paused());
        world.clock.advance(TimeDelta::minutes(7));
    }
    let untouched = "SELECT COUNT(*) FROM messages WHERE state = 'open' AND attempts = 0 AND lease_epoch = 0";
    assert_eq!(world.backend.count(untouched).await, 1);
    courier.memory.set_down(None);
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT);
    assert!(!courier.deliverer.is_paused());
}

async fn a_process_that_died_is_taken_over_from<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    let bucket = world.store.queue(world.now()).await.expect("a read").due[0];
    let until = world.now() + LEASE;
    let claimed = world.store.claim(&[bucket], Uuid::from_u128(7), world.now(), until, 5).await.expect("a claim");
    world.check().await;
    assert_eq!(claimed.len(), 1);
    // It is handed over, and the process dies before it can say so.
    let mut courier = world.courier();
    assert_eq!(world.deliver(&mut courier.deliverer).await, Delivered::default(), "the lease still holds");
    assert_eq!(courier.deliverer.next_due().await.expect("a read"), Some(until));
    world.clock.set(until);
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT);
    assert_eq!(courier.memory.delivered()[0].0, claimed[0].id, "the same Message-ID");
    assert_eq!(world.ledger(token).await, ["0: 30d sent to alice@example.org"]);
}

async fn an_unknown_outcome_is_tried_again_under_the_same_id<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    courier.memory.answer(Happened::Unknown { error: "connection reset".into() });
    assert_eq!(world.deliver(&mut courier.deliverer).await.retried, 1);
    let (id, _) = only_message(&world).await;
    world.clock.advance(TimeDelta::minutes(1));
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT);
    assert!(courier.memory.delivered().iter().all(|(message, _)| message.uuid() == id));
}

async fn any_answer_can_be_recorded<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    // PostgreSQL keeps no NUL in a text.
    courier.memory.answer(Happened::Unknown { error: "unexpected reply 354 \0".into() });
    courier.memory.answer(Happened::Broken { phase: Phase::Data, error: "unexpected reply 250 \0".into() });
    for _ in 0..2 {
        assert_eq!(world.deliver(&mut courier.deliverer).await.retried, 1);
        world.clock.advance(TimeDelta::minutes(2));
    }
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT);
}

async fn a_removed_contact_hears_nothing<B: Backend>() {
    let world = World::<B>::new().await;
    let team = world.owner("team", &["here@example.org", "left@example.org"]).await;
    let token = world.token(team, 90).await;
    world.on_day(60);
    world.remind().await;
    let left = contact(&world, team, "left@example.org").await;
    world.store.unlink_contact(team, left).await.expect("a write");
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered().len(), 1);
    let expected = ["0: 30d sent to here@example.org", "0: 30d cancelled to left@example.org"];
    assert_eq!(world.ledger(token).await, expected);
}

async fn the_fallback_hears_of_everything_in_one_mail<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    for key in ["one", "two", "three"] {
        let owner = world.owner(key, &[]).await;
        world.token(owner, 90).await;
    }
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    assert_eq!(world.deliver(&mut courier.deliverer).await, SENT);
    let text = String::from_utf8_lossy(&courier.memory.delivered()[0].1.bytes).into_owned();
    for key in ["one", "two", "three"] {
        assert!(text.contains(&format!("({key})")), "{text}");
    }
}

async fn a_new_fallback_hears_what_the_old_one_did_not<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("mistyped@example.org").await;
    let bot = world.owner("bot", &[]).await;
    let token = world.token(bot, 90).await;
    world.on_day(60);
    world.remind().await;
    world.fallback("ops@example.org").await;
    let mut courier = world.courier();
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { sent: 1, cancelled: 1, ..Delivered::default() });
    assert!(courier.delivered()[0].starts_with("ops@example.org: "), "{:?}", courier.delivered());
    let mut ledger = world.ledger(token).await;
    ledger.sort();
    let expected = [
        "0: 30d cancelled to mistyped@example.org escalated",
        "0: 30d sent to ops@example.org escalated",
        "0: 30d unreachable to nobody",
    ];
    assert_eq!(ledger, expected);
}

async fn nothing_starves_behind_what_fails<B: Backend>() {
    let world = World::<B>::new().await;
    for n in 0..20 {
        let owner = world.owner(&format!("owner-{n}"), &[&format!("owner-{n}@example.org")]).await;
        world.token(owner, 90).await;
    }
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    for _ in 0..10 {
        courier.memory.answer(refused(Phase::Data, 451, "try later"));
    }
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!((did.sent, did.retried), (10, 10));
    world.clock.advance(TimeDelta::minutes(1));
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 10);
}

/// With one session, and a mail server that takes longer than a message waits to be tried again.
async fn nothing_starves_behind_what_is_due_again_and_again<B: Backend>() {
    let world = World::<B>::new().await;
    for n in 0..4 {
        let owner = world.owner(&format!("owner-{n}"), &[&format!("owner-{n}@example.org")]).await;
        world.token(owner, 90).await;
    }
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    let mut did = Delivered::default();
    for _ in 0..20 {
        courier.memory.answer(refused(Phase::Data, 451, "try later"));
    }
    while did.retried < 6 {
        did += courier.deliverer.step().await.expect("a step").did;
        // What is being recorded is due again before anything is claimed.
        world.clock.advance(TimeDelta::minutes(90));
        courier.deliverer.wait().await;
    }
    let tried = "SELECT COUNT(*) FROM messages WHERE attempts > 0";
    assert_eq!(world.backend.count(tried).await, 4, "each has had its turn");
}

async fn a_message_that_cannot_be_read_is_given_up_and_told_of<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let broken = world.owner("broken", &["broken@example.org"]).await;
    world.token(broken, 90).await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    world.backend.execute("DELETE FROM contacts WHERE address = 'broken@example.org'").await;
    let mut courier = world.courier();
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 2);
    assert_eq!(
        courier.delivered(),
        [
            "alice@example.org: \"deploy key (CI)\" expires in 30 days",
            "ops@example.org: 1 owner could not be told about 1 token"
        ]
    );
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM messages WHERE state = 'failed'").await, 1);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'failed'").await, 1);
}

async fn a_token_that_cannot_be_read_holds_nobody_up<B: Backend>() {
    let world = World::<B>::new().await;
    let (broken, team) =
        (world.owner("broken", &["ann@example.org"]).await, world.owner("team", &["ann@example.org"]).await);
    let (unread, told) = (world.token(broken, 90).await, world.token(team, 90).await);
    let alone = world.owner("alone", &["bob@example.org"]).await;
    world.token(alone, 90).await;
    world.on_day(60);
    world.remind().await;
    world.backend.execute("UPDATE owners SET time_zone = 'Mars/Base' WHERE key <> 'team'").await;
    let mut courier = world.courier();
    let did = world.deliver(&mut courier.deliverer).await;
    assert_eq!(did, Delivered { sent: 1, cancelled: 1, ..Delivered::default() });
    assert_eq!(courier.delivered().len(), 1, "{:?}", courier.delivered());
    assert_eq!(world.ledger(told).await, ["0: 30d sent to ann@example.org"]);
    assert_eq!(world.ledger(unread).await, ["0: 30d failed to ann@example.org"]);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM messages WHERE state IN ('sending', 'retry')").await, 0);
}

async fn what_fails_for_two_days_is_given_up<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    let mut attempts = 0;
    for _ in 0..200 {
        courier.memory.answer(refused(Phase::Mail, 451, "4.3.0 try later"));
        let did = world.deliver(&mut courier.deliverer).await;
        attempts += did.retried;
        if did.failed > 0 {
            break;
        }
        let next = courier.deliverer.next_due().await.expect("a read").expect("a retry");
        world.clock.set(next);
    }
    assert!((12..60).contains(&attempts), "doubling from a minute to four hours: {attempts}");
    assert_eq!(courier.delivered().len(), 1, "the fallback is told: {:?}", courier.delivered());
    let ledger = world.ledger(token).await;
    assert!(ledger.contains(&"0: 30d failed to alice@example.org".to_owned()), "{ledger:?}");
}

/// A panic must not leave a daemon behind that looks alive and delivers nothing.
#[tokio::test]
async fn a_job_that_panics_ends_the_daemon() {
    let world = World::<OnPostgres>::new().await;
    let clock = Arc::new(SystemClock::default());
    world.clock.set(clock.now());
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.imported(alice, world.now() - days(80), world.now() + days(5)).await;
    world.remind().await;
    // sqlx panics at an instant that chrono cannot count to.
    world.backend.execute("UPDATE messages SET created_at = 'infinity'").await;
    let yearly = || Cron::parse("0 0 0 1 1 *", chrono_tz::UTC).expect("a schedule");
    let setup = Setup {
        schedule: Schedule {
            expire: yearly(),
            remind: yearly(),
            deliver: yearly(),
            purge: yearly(),
            reconcile: yearly(),
        },
        rules: world.rules.clone(),
        retention: Retention { reminders: days(100), messages: days(100), ended_tokens: days(100) },
        composer: Composer::new("tokens@example.org".parse().expect("a mailbox"), None, None).expect("templates"),
        transports: vec![Transport::Memory(Memory::new())],
        terms: Terms {
            fallback: None,
            give_up_after: days(2),
            every: Duration::ZERO,
            idle: Duration::from_secs(60),
            groups: Arc::from([]),
            policy: lapsed::policy::Policy::new([], true, TimeDelta::days(7)),
            digest: lapsed::digest::Digest::holding(TimeDelta::zero()),
        },
        http: None,
    };
    let running = service::run(world.store.clone(), clock, setup, None, CancellationToken::new());
    let ended = tokio::time::timeout(Duration::from_secs(60), running).await.expect("it does not go on without a job");
    assert!(ended.is_err_and(|error| error.to_string().contains("panicked")));
}

/// The id and state of the only message.
async fn only_message<B: Backend>(world: &World<B>) -> (Uuid, String) {
    let message = world.backend.message().await;
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM messages").await, 1);
    message
}

async fn contact<B: Backend>(world: &World<B>, owner: lapsed::token::OwnerId, address: &str) -> ContactId {
    let contacts = world.store.contacts_of(owner).await.expect("a read");
    contacts.iter().find(|contact| contact.address.as_str() == address).expect(address).id
}

/// The end of the link to a token, as quoted-printable may leave it on one line.
fn short_link(token: TokenId) -> String {
    token.to_string()[24..].to_owned()
}
