//! Who uses a token decides whether anybody is told of it, as a story on each back end.

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, days};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::clock::Timestamp;
use lapsed::store::Accounts;
use lapsed::token::{Secret, TokenId};
use lapsed::verify::{Verified, verify};

on_every_back_end!(
    a_replaced_token_that_is_silent_is_not_spoken_of,
    a_replaced_token_that_is_still_used_is,
    what_was_cancelled_by_a_rotation_is_owed_again,
    unused_tokens_are_skipped,
    who_uses_a_skipped_token_again_is_told,
    of_imported_tokens_nobody_knows,
);

/// A token that expires so many days from now, and its secret.
async fn issue<B: Backend>(world: &World<B>, expires_in: i64) -> (TokenId, Secret) {
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let now = world.now();
    let (token, secret) = crate::support::world::new_token(alice, now, Some(now + days(expires_in)), now);
    world.store.add_token(&token, Some(&secret.hash())).await.expect("a new token");
    (token.id, secret)
}

async fn uses<B: Backend>(world: &World<B>, secret: &Secret) {
    let verified = verify(&world.store, &*world.clock, secret).await.expect("a read");
    assert!(matches!(verified, Verified::Valid(..)), "{verified:?}");
}

async fn replace<B: Backend>(world: &World<B>, token: TokenId, grace: TimeDelta) -> Timestamp {
    let now = world.now();
    world.store.change_token(token, |token| change::rotate(token, grace, None, now)).await.expect("a rotation");
    world.check().await;
    now + grace
}

async fn a_replaced_token_that_is_silent_is_not_spoken_of<B: Backend>() {
    let world = World::<B>::new().await;
    let (token, secret) = issue(&world, 90).await;
    world.on_day(80);
    uses(&world, &secret).await;
    world.clock.advance(TimeDelta::minutes(5));
    let ends = replace(&world, token, days(2)).await;
    let mut written = 0;
    while world.now() < ends + days(1) {
        world.clock.advance(TimeDelta::hours(6));
        written += world.remind().await.pending + world.expire().await.pending;
    }
    assert_eq!(written, 0);
    assert!(world.ledger(token).await.is_empty());
}

async fn a_replaced_token_that_is_still_used_is<B: Backend>() {
    let world = World::<B>::new().await;
    let (token, secret) = issue(&world, 90).await;
    world.on_day(50);
    let ends = replace(&world, token, days(1)).await;
    assert_eq!(world.remind().await.pending, 0);
    world.clock.advance(TimeDelta::hours(3));
    uses(&world, &secret).await;
    assert_eq!(world.remind().await.pending, 1);
    uses(&world, &secret).await;
    assert_eq!(world.remind().await.pending, 0, "once");
    let mut courier = world.courier();
    world.clock.advance(TimeDelta::hours(2));
    world.deliver(&mut courier.deliverer).await;
    let (_, mail) = courier.memory.delivered().into_iter().next().expect("a mail");
    let text = String::from_utf8_lossy(&mail.bytes).replace("\r\n", "\n");
    assert!(text.contains("2 hours ago, although you replaced this token"), "{text}");
    world.clock.set(ends);
    assert_eq!(world.expire().await.pending, 1, "and what uses it is told that it broke");
    let expected = ["30d superseded", "7d superseded", "1d sent", "expired pending"];
    assert_eq!(world.ledger(token).await, expected.map(|state| format!("1: {state} to alice@example.org")));
}

async fn what_was_cancelled_by_a_rotation_is_owed_again<B: Backend>() {
    let world = World::<B>::new().await;
    let (token, secret) = issue(&world, 90).await;
    world.on_day(89);
    assert_eq!(world.remind().await.pending, 1);
    replace(&world, token, days(1)).await;
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert!(courier.delivered().is_empty());
    world.clock.advance(TimeDelta::hours(1));
    uses(&world, &secret).await;
    assert_eq!(world.remind().await.pending, 1);
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered().len(), 1);
}

async fn unused_tokens_are_skipped<B: Backend>() {
    let mut world = World::<B>::new().await;
    let (token, _) = issue(&world, 90).await;
    world.on_day(60);
    world.rules.skip_unused = true;
    assert_eq!(world.remind().await.pending, 0);
    world.on_day(90);
    let expired = world.expire().await;
    assert_eq!((expired.tokens, expired.pending), (1, 0));
    assert!(world.ledger(token).await.is_empty());
}

async fn who_uses_a_skipped_token_again_is_told<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.skip_unused = true;
    let (token, secret) = issue(&world, 200).await;
    world.on_day(1);
    uses(&world, &secret).await;
    world.on_day(195);
    assert_eq!(world.remind().await.pending, 0, "it was used 194 days ago");
    uses(&world, &secret).await;
    assert_eq!(world.remind().await.pending, 1);
    let ledger = ["30d superseded", "7d pending"].map(|state| format!("0: {state} to alice@example.org"));
    assert_eq!(world.ledger(token).await, ledger);
}

async fn of_imported_tokens_nobody_knows<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.skip_unused = true;
    let (token, _) = issue(&world, 90).await;
    world.backend.execute("UPDATE tokens SET secret_hash = NULL, external_id = 'elsewhere'").await;
    world.on_day(60);
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(world.ledger(token).await, ["0: 30d pending to alice@example.org"]);
}
