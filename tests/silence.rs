//! A database that is gone without a word: no answer, and no connection that ends.

use std::time::Duration;

use crate::support::backend::OnPostgres;
use crate::support::proxy::{Manner, Proxy};
use crate::support::world::{World, dawn, days};
use chrono::TimeDelta;
use lapsed::jobs::deliver::LEASE;
use lapsed::jobs::remind;
use lapsed::store::{Error, Jobs, Postgres};
use tokio::time::timeout;

/// A world whose store is behind a proxy, and gives up on an answer after a second.
async fn behind_a_proxy() -> (World<OnPostgres>, Proxy) {
    let mut world = World::<OnPostgres>::new().await;
    let proxy = Proxy::start(&world.backend.database.url).await;
    proxy.arm(Manner::Cut, None);
    world.store = Postgres::open(&proxy.url).await.expect("the store opens").with_patience(Duration::from_secs(1));
    (world, proxy)
}

#[tokio::test]
async fn a_pass_ends_and_the_next_one_goes_on() {
    let (world, proxy) = behind_a_proxy().await;
    let owner = world.owner("alice", &["alice@example.org"]).await;
    world.imported(owner, dawn() - days(90), dawn() + days(6)).await;
    let lease = world.lease(remind::NAME).await;
    proxy.fall_silent();
    for _ in 0..3 {
        let step =
            timeout(Duration::from_secs(60), remind::step(&world.store, &lease, &world.rules, world.now())).await;
        let error = step.expect("it does not wait for ever").expect_err("nobody answers");
        assert!(matches!(&error, Error::Unavailable(_)) && error.to_string().contains("no answer"), "{error}");
    }
    proxy.speak_again();
    assert_eq!(world.remind().await.pending, 1);
    assert!(world.store.job_records().await.expect("a read")[0].error.is_none());
}

#[tokio::test]
async fn what_was_sent_meanwhile_is_recorded_and_not_sent_again() {
    sent_into_silence(TimeDelta::zero()).await;
}

/// The lease's epoch keeps a late record out where another process has taken the message over; here none has.
#[tokio::test]
async fn what_was_sent_is_recorded_after_a_silence_longer_than_its_lease() {
    sent_into_silence(LEASE * 3).await;
}

async fn sent_into_silence(lasts: TimeDelta) {
    let (world, proxy) = behind_a_proxy().await;
    let owner = world.owner("alice", &["alice@example.org"]).await;
    let token = world.imported(owner, dawn() - days(90), dawn() + days(6)).await;
    world.remind().await;
    let mut courier = world.courier();
    // The first step opens a session, and the second claims and sends.
    while courier.delivered().is_empty() {
        courier.deliverer.step().await.expect("a step");
        courier.deliverer.wait().await;
    }
    proxy.fall_silent();
    world.clock.advance(lasts);
    let recording = async {
        loop {
            match courier.deliverer.step().await {
                Ok(outcome) if outcome.did.sent == 1 => break,
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    };
    let speaking = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        proxy.speak_again();
    };
    let both = async { tokio::join!(recording, speaking) };
    timeout(Duration::from_secs(60), both).await.expect("it is recorded when the database is back");
    assert_eq!(
        world.ledger(token).await,
        ["0: 30d superseded to alice@example.org", "0: 7d sent to alice@example.org"]
    );
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 0);
    assert_eq!(courier.delivered().len(), 1);
}
