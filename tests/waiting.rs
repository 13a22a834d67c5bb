//! When messages go, as a story on each back end: a message waits for its reader's hours and for some time after the last,
//! and goes as soon as one of its reminders may.

use std::ops::ControlFlow;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, at, dawn, days};
use chrono::{TimeDelta, TimeZone, Utc};
use lapsed::clock::Timestamp;
use lapsed::digest::Digest;
use lapsed::jobs::guard::Guard;
use lapsed::store::messages::{MessageFilter, Which};
use lapsed::store::outbox::{ClaimedMessage, MessageState};
use lapsed::store::{Accounts, Messages, Outbox, Recipients};
use lapsed::token::Bucket;
use uuid::Uuid;

on_every_back_end!(
    a_message_waits_for_its_readers_hours,
    what_is_urgent_takes_along_what_waits,
    an_expired_notice_does_not_wait,
    a_contact_is_mailed_once_in_some_time,
    what_becomes_due_while_another_goes_waits_for_the_next,
    two_messages_that_go_at_once_are_one_and_one_later,
    what_is_released_waits_for_nothing_more,
);

fn office_hours() -> Digest {
    Digest {
        window: Some("mon-fri 08:00-18:00".parse().expect("a window")),
        urgent_within: TimeDelta::hours(24),
        ..Digest::holding(TimeDelta::minutes(10))
    }
}

/// An instant of March 2027; the first is a Monday, and 60 days after dawn it is the 2nd, 09:00.
fn march(day: u32, hour: u32, minute: u32) -> Timestamp {
    Utc.with_ymd_and_hms(2027, 3, day, hour, minute, 0).single().expect("an instant")
}

/// To whom messages are open, and from when on they may go.
async fn open<B: Backend>(world: &World<B>) -> Vec<(String, Timestamp)> {
    let mut found = Vec::new();
    let filter = MessageFilter { states: vec![MessageState::Open], contact: None };
    let visit = |message: lapsed::store::messages::MessageRecord| {
        found.push((message.address.expect("an address").to_string(), message.not_before));
        ControlFlow::Continue(())
    };
    world.store.each_message(&filter, visit).await.expect("a read");
    found.sort();
    found
}

async fn a_message_waits_for_its_readers_hours<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.digest = office_hours();
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let elsewhere = lapsed::store::accounts::NewContact {
        time_zone: Some(chrono_tz::Asia::Kolkata),
        ..at("ravi@example.org").into()
    };
    world.store.link_contact(alice, &elsewhere, world.now()).await.expect("a write");
    world.imported(alice, dawn(), march(31, 20, 0)).await;
    // A Monday evening; on Kolkata's clock it is early on Tuesday.
    world.clock.set(march(1, 20, 0));
    assert_eq!(world.remind().await.pending, 2);
    let expected = [("alice@example.org", march(2, 8, 0)), ("ravi@example.org", march(2, 2, 30))];
    assert_eq!(open(&world).await, expected.map(|(to, at)| (to.to_owned(), at)));

    let mut courier = world.courier();
    world.clock.set(march(2, 7, 59));
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered().len(), 1, "only Ravi's day has begun");
    world.clock.set(march(2, 8, 0));
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered().len(), 2);
}

async fn what_is_urgent_takes_along_what_waits<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.digest = office_hours();
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.imported(alice, dawn(), march(31, 20, 0)).await;
    world.clock.set(march(1, 20, 0));
    world.remind().await;
    assert_eq!(open(&world).await, [("alice@example.org".to_owned(), march(2, 8, 0))]);
    // A reminder a day ahead comes, and what waits for the morning goes with it.
    world.imported(alice, dawn(), march(2, 20, 30)).await;
    world.clock.set(march(1, 20, 30));
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(open(&world).await, [("alice@example.org".to_owned(), march(1, 20, 40))]);
    let mut courier = world.courier();
    world.clock.set(march(1, 20, 40));
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered(), ["alice@example.org: 2 tokens expire soon, the first tomorrow"]);
}

async fn an_expired_notice_does_not_wait<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.digest = office_hours();
    let alice = world.owner("alice", &["alice@example.org"]).await;
    // It lives too briefly for any reminder.
    world.imported(alice, march(5, 12, 0), march(6, 4, 0)).await;
    world.clock.set(march(6, 4, 0));
    assert_eq!(world.expire().await.pending, 1);
    assert_eq!(open(&world).await, [("alice@example.org".to_owned(), march(6, 4, 10))]);
}

async fn a_contact_is_mailed_once_in_some_time<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.digest =
        Digest { min_interval: Some(days(1)), urgent_within: days(1), ..Digest::holding(TimeDelta::zero()) };
    let alice = world.owner("alice", &["alice@example.org"]).await;
    for hours in [0, 1, 2, 4] {
        world.imported(alice, dawn(), march(31, 10, 0) + TimeDelta::hours(hours)).await;
    }
    let soon = world.imported(alice, dawn(), march(2, 11, 30)).await;
    let mut courier = world.courier();
    let mut mailed = Vec::new();
    for hour in 0..30 {
        world.clock.set(march(1, 10, 0) + TimeDelta::hours(hour));
        world.remind().await;
        if world.deliver(&mut courier.deliverer).await.sent > 0 {
            mailed.push(world.now());
        }
    }
    // The second and the third wait until the first mail is a day ago, and join what is urgent before that; then the fourth
    // waits for a day.
    assert_eq!(mailed, [march(1, 10, 0), march(1, 12, 0), march(2, 12, 0)]);
    assert_eq!(world.ledger(soon).await.last().map(String::as_str), Some("0: 1d sent to alice@example.org"));
}

async fn what_is_released_waits_for_nothing_more<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.digest = office_hours();
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.imported(alice, dawn(), march(31, 20, 0)).await;
    world.clock.set(march(1, 20, 0));
    world.rules.guard = Guard::new(lapsed::config::Limit::PerHour(0), lapsed::config::Limit::None);
    // Nothing may be opened, so it is held; what falls due an hour later may, and waits for the morning.
    assert_eq!(world.remind().await.held, 1);
    world.rules.guard = crate::support::world::unguarded();
    world.imported(alice, dawn(), march(31, 21, 0)).await;
    world.clock.set(march(1, 21, 0));
    world.remind().await;
    assert_eq!(open(&world).await, [("alice@example.org".to_owned(), march(2, 8, 0))]);
    let bucket = Bucket::of("alice@example.org");
    assert_eq!(world.store.release(bucket, Which::All, world.now()).await.expect("a write"), 1);
    world.check().await;
    assert_eq!(open(&world).await, [("alice@example.org".to_owned(), march(1, 21, 0))]);
}

/// A day between two mails, and what a day ahead is urgent.
fn daily() -> Digest {
    Digest { min_interval: Some(days(1)), urgent_within: days(1), ..Digest::holding(TimeDelta::zero()) }
}

/// Claims what is due for alice, as another process does.
async fn claimed_elsewhere<B: Backend>(world: &World<B>) -> ClaimedMessage {
    let bucket = at("alice@example.org").bucket();
    let (now, until) = (world.now(), world.now() + TimeDelta::minutes(5));
    let claimed = world.store.claim(&[bucket], Uuid::from_u128(7), now, until, 1).await.expect("a claim");
    claimed.into_iter().next().expect("a message")
}

async fn what_becomes_due_while_another_goes_waits_for_the_next<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.digest = daily();
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let first = world.imported(alice, dawn(), march(31, 10, 0)).await;
    let second = world.imported(alice, dawn(), march(31, 10, 30)).await;
    world.clock.set(march(1, 10, 0));
    world.remind().await;
    let elsewhere = claimed_elsewhere(&world).await;
    // The pass does not know of the mail that is about to go.
    world.clock.set(march(1, 10, 30));
    world.remind().await;
    world.store.mailed(&[elsewhere.contact.id], march(1, 10, 30)).await.expect("a write");
    let sent = crate::support::world::sent(&elsewhere);
    world.store.record(&[(&elsewhere, &sent)], world.now()).await.expect("a record");
    let mut courier = world.courier();
    let delivered = world.deliver(&mut courier.deliverer).await;
    assert_eq!((delivered.sent, delivered.put_off), (0, 1));
    assert_eq!(open(&world).await, [("alice@example.org".to_owned(), march(2, 10, 30))]);
    assert_eq!(world.ledger(second).await, ["0: 30d pending to alice@example.org"]);
    // What comes meanwhile goes with it.
    world.imported(alice, dawn(), march(31, 20, 0)).await;
    world.clock.set(march(1, 20, 0));
    world.remind().await;
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 0);
    world.clock.set(march(2, 10, 30));
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    assert_eq!(courier.delivered(), ["alice@example.org: 2 tokens expire in 29 days"]);
    assert_eq!(world.ledger(first).await, ["0: 30d sent to alice@example.org"]);
    // What is urgent waits for nothing.
    let third = world.imported(alice, dawn(), march(3, 11, 0)).await;
    world.clock.set(march(2, 11, 0));
    world.remind().await;
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    assert!(world.ledger(third).await.contains(&"0: 1d sent to alice@example.org".to_owned()));
}

async fn two_messages_that_go_at_once_are_one_and_one_later<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.digest = daily();
    let alice = world.owner("alice", &["alice@example.org"]).await;
    for minute in [0, 30] {
        world.imported(alice, dawn(), march(31, 10, minute)).await;
    }
    world.clock.set(march(1, 10, 0));
    world.remind().await;
    // Its process dies before it says anything; when the lease is over there are two.
    claimed_elsewhere(&world).await;
    world.clock.set(march(1, 10, 30));
    world.remind().await;
    let mut courier = world.courier();
    let delivered = world.deliver(&mut courier.deliverer).await;
    assert_eq!((delivered.sent, delivered.put_off), (1, 1), "{delivered:?}");
    world.clock.set(march(2, 10, 30));
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    assert_eq!(courier.delivered().len(), 2);
}
