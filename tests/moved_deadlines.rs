//! Somebody else than the owner moves a deadline, as a story on each back end: the owner is told, once, unless a reminder says
//! the same.

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, days};
use chrono::TimeDelta;
use lapsed::change::{self, Edit};
use lapsed::clock::Timestamp;
use lapsed::expires::Expires;
use lapsed::store::imports::{ImportRow, ImportRun};
use lapsed::store::{Accounts, Imports};
use lapsed::token::TokenId;
use uuid::Uuid;

on_every_back_end!(
    an_owner_is_told_of_a_deadline_that_somebody_moved,
    a_reminder_that_is_due_says_it,
    a_small_move_is_not_told,
    a_list_that_cuts_a_token_short_is_told,
    what_is_moved_again_is_told_as_it_is,
);

/// An operator moves a deadline to so many days from now.
async fn moves<B: Backend>(world: &World<B>, token: TokenId, to: Timestamp) {
    let now = world.now();
    let edit = Edit { expires_at: Some(Some(to)), by_another: true, ..Edit::default() };
    world.store.change_token(token, |token| change::edit(token, &edit, now)).await.expect("an edit");
    world.check().await;
}

async fn an_owner_is_told_of_a_deadline_that_somebody_moved<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 200).await;
    let now = world.on_day(10);
    moves(&world, token, now + days(90)).await;
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(world.remind().await.pending, 0, "once");
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered(), ["alice@example.org: \"deploy key (CI)\" now expires in 90 days"]);
    let (_, mail) = courier.memory.delivered().into_iter().next().expect("a mail");
    let text = String::from_utf8_lossy(&mail.bytes).replace("\r\n", "\n");
    assert!(text.contains("  before    on 20 July 2027 at 09:00\n"), "{text}");
    assert!(text.contains("Somebody changed the deadline of this token."), "{text}");
    // Reminders come as ever.
    world.on_day(70);
    assert_eq!(world.remind().await.pending, 1);
    let expected = ["1: changed sent to alice@example.org", "1: 30d pending to alice@example.org"];
    assert_eq!(world.ledger(token).await, expected);
}

async fn a_reminder_that_is_due_says_it<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    // It was said already that it expires in 30 days; the new deadline is due at once by no lead, or by one.
    let token = world.token(alice, 40).await;
    let now = world.on_day(10);
    world.remind().await;
    moves(&world, token, now + days(9)).await;
    assert_eq!(world.remind().await.pending, 1);
    world.clock.advance(days(2));
    assert_eq!(world.remind().await.pending, 1, "7 days");
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered(), ["alice@example.org: \"deploy key (CI)\" expires in 7 days"]);
    let ledger = world.ledger(token).await;
    let expected = ["1: changed superseded to alice@example.org", "1: 7d sent to alice@example.org"];
    assert_eq!(
        ledger.iter().filter(|line| line.starts_with('1')).collect::<Vec<_>>(),
        expected.iter().collect::<Vec<_>>()
    );
}

async fn a_small_move_is_not_told<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    let ends = world.now() + days(90);
    moves(&world, token, ends + TimeDelta::hours(24)).await;
    assert_eq!(world.remind().await.pending, 0, "the shortest lead is a day");
    moves(&world, token, ends + TimeDelta::hours(49)).await;
    assert_eq!(world.remind().await.pending, 1);
    // Whoever owns it did that.
    world.move_deadline(token, ends).await;
    assert_eq!(world.remind().await.pending, 0);
    assert_eq!(world.get(token).await.moved_from, None);
}

/// A list says that the token ends then.
async fn listed<B: Backend>(world: &World<B>, expires: Expires) {
    let run = ImportRun {
        id: Uuid::now_v7(),
        source: "elsewhere".into(),
        now: world.now(),
        ended_before: Timestamp::UNIX_EPOCH,
    };
    let row = ImportRow {
        owner_key: "alice".into(),
        time_zone: None,
        addresses: Vec::new(),
        watchers: Vec::new(),
        external_id: "1".into(),
        description: "elsewhere".into(),
        created_at: Some(world.now() - days(1)),
        expires,
        last_used_at: None,
        revoked_at: None,
    };
    world.store.import(&run, &[row]).await.expect("an import");
}

async fn a_list_that_cuts_a_token_short_is_told<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let in_days = |n| Expires::At(world.now() + days(n));
    listed(&world, in_days(90)).await;
    listed(&world, in_days(180)).await;
    assert_eq!(world.remind().await.pending, 0, "its owner renewed it");
    listed(&world, in_days(60)).await;
    assert_eq!(world.remind().await.pending, 1, "that was somebody else");
    listed(&world, Expires::Never).await;
    assert_eq!(world.remind().await.pending, 0);
    listed(&world, in_days(60)).await;
    assert_eq!(world.remind().await.pending, 1, "it had no deadline");
    let token = crate::support::world::tokens(&world.store, Some(alice)).await.pop().expect("a token");
    assert_eq!(token.moved_from, Some(lapsed::token::NEVER));
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered(), ["alice@example.org: \"elsewhere\" now expires in 60 days"]);
}

async fn what_is_moved_again_is_told_as_it_is<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 200).await;
    let now = world.on_day(10);
    moves(&world, token, now + days(90)).await;
    world.remind().await;
    moves(&world, token, now + days(60)).await;
    world.remind().await;
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered(), ["alice@example.org: \"deploy key (CI)\" now expires in 60 days"]);
    let expected = ["1: changed cancelled to alice@example.org", "2: changed sent to alice@example.org"];
    assert_eq!(world.ledger(token).await, expected);
}
