//! A store that refuses one thing and takes others: delivery loses nothing of what it had in hand.

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::World;
use lapsed::mail::outcome::{Happened, Phase};
use lapsed::mail::transport::{Memory, Transport};

on_every_back_end!(
    a_message_that_was_taken_is_recorded_beside_one_that_cannot_be_decided,
    what_was_claimed_is_given_back_when_nothing_can_be_read,
    a_pause_that_an_earlier_process_told_of_is_taken_back,
);

/// Two owners, each with a reminder that is due, a process with two sessions, and what it delivers.
async fn two<B: Backend>() -> World<B> {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    for name in ["ann", "bob"] {
        let owner = world.owner(name, &[&format!("{name}@example.org")]).await;
        world.token(owner, 90).await;
    }
    world.on_day(60);
    world.remind().await;
    world
}

async fn messages<B: Backend>(world: &World<B>, which: &str) -> i64 {
    world.backend.count(&format!("SELECT COUNT(*) FROM messages WHERE {which}")).await
}

/// What one message could not be decided about keeps no other from being sent and recorded, also where there is but one session.
async fn a_message_that_was_taken_is_recorded_beside_one_that_cannot_be_decided<B: Backend>() {
    for sessions in [1, 2] {
        taken_beside_one_that_cannot_be_decided::<B>(sessions).await;
    }
}

async fn taken_beside_one_that_cannot_be_decided<B: Backend>(sessions: usize) {
    let world = two::<B>().await;
    let memory = Memory::new();
    memory.answer(Happened::refused(Phase::Rcpt, 550, "5.1.1 no such user"));
    let transports = (0..sessions).map(|_| Transport::Memory(memory.clone())).collect();
    let mut deliverer = world.deliverer(transports);
    let [refuse, allow] = B::NO_SUPPRESSION;
    world.backend.execute(refuse).await;
    let mut failures = 0;
    for _ in 0..1_000 {
        failures += usize::from(deliverer.step().await.is_err());
        if failures > 0 && messages(&world, "state = 'sent'").await == 1 {
            break;
        }
        deliverer.wait().await;
    }
    assert!(failures > 0, "the store refuses to suppress the contact");
    assert_eq!(memory.delivered().len(), 1);
    assert_eq!((messages(&world, "state = 'sent'").await, messages(&world, "state = 'sending'").await), (1, 1));

    world.backend.execute(allow).await;
    let more = world.deliver(&mut deliverer).await;
    assert_eq!((more.failed, more.sent), (1, 2), "it is decided now, and the fallback is told");
    assert_eq!(memory.delivered().len(), 2, "nobody is told twice");
    assert_eq!(messages(&world, "state = 'sending'").await, 0);
}

/// A claim is worth nothing while the store does not say what is true: it is given back, and not held until its lease ends.
async fn what_was_claimed_is_given_back_when_nothing_can_be_read<B: Backend>() {
    let world = two::<B>().await;
    let memory = Memory::new();
    let mut deliverer = world.deliverer(vec![Transport::Memory(memory.clone())]);
    world.backend.execute("ALTER TABLE tokens RENAME COLUMN description TO hidden").await;
    let mut failures = 0;
    for _ in 0..1_000 {
        failures += usize::from(deliverer.step().await.is_err());
        // What the step gave back is recorded when this returns.
        deliverer.wait().await;
        if failures > 0 && messages(&world, "state = 'sending'").await == 0 {
            break;
        }
    }
    assert!(failures > 0);
    let given_back = messages(&world, "state = 'retry' AND attempts = 0 AND lost_claims = 0").await;
    assert_eq!((given_back, messages(&world, "state = 'open'").await), (given_back.clamp(1, 2), 2 - given_back));
    world.backend.execute("ALTER TABLE tokens RENAME COLUMN hidden TO description").await;
    assert_eq!(world.deliver(&mut deliverer).await.sent, 2);
    assert_eq!(memory.delivered().len(), 2);
}

/// Whatever an earlier process wrote of a mail server that refused everybody, its answer now counts.
async fn a_pause_that_an_earlier_process_told_of_is_taken_back<B: Backend>() {
    let world = two::<B>().await;
    let mut first = world.courier();
    first.memory.set_down(Some(Happened::Broken { phase: Phase::Connect, error: "refused".into() }));
    world.deliver(&mut first.deliverer).await;
    let pauses = "SELECT COUNT(*) FROM jobs WHERE name = 'deliver' AND error LIKE '%delivery pauses%'";
    assert_eq!(world.backend.count(pauses).await, 1);
    drop(first);
    let mut second = world.courier();
    assert_eq!(world.deliver(&mut second.deliverer).await.sent, 2);
    assert_eq!(world.backend.count(pauses).await, 0, "status tells what is true");
}
