//! Guards: what is too much for an hour is held or waits, somebody is told, and an operator decides.

use std::ops::ControlFlow;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{Courier, World, at, dawn, days, lead, unguarded};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::config::Limit;
use lapsed::jobs::guard::{Guard, watch};
use lapsed::mail::outcome::{Happened, Phase};
use lapsed::store::messages::{MessageFilter, Which};
use lapsed::store::outbox::MessageState;
use lapsed::store::{Accounts, Guards, Messages};
use lapsed::token::{Bucket, TokenId};

on_every_back_end!(
    what_is_too_much_for_an_hour_is_held_and_told,
    a_second_wave_is_told_of_while_the_first_is_still_held,
    the_hour_rolls_and_counts_every_pass,
    what_joins_an_open_message_is_not_counted,
    a_held_message_that_comes_near_its_deadline_is_told_of_again,
    what_is_released_is_checked_once_more,
    what_is_released_joins_a_message_that_collects,
    what_is_cancelled_and_not_yet_due_becomes_due,
    any_waiting_message_can_be_cancelled,
    an_alert_that_is_no_longer_true_is_not_sent,
    tokens_expire_an_hours_share_at_a_time,
    the_default_is_a_tenth_of_what_there_is,
    escalations_are_one_digest_a_day,
    what_failed_can_be_tried_again,
);

/// So many owners, each with a token that expires in so many days. The fallback is there.
async fn crowd<B: Backend>(owners: usize, expires_in: i64) -> (World<B>, Vec<TokenId>) {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let mut tokens = Vec::new();
    for n in 0..owners {
        let owner = world.owner(&format!("o{n}"), &[&format!("o{n}@example.org")]).await;
        tokens.push(world.token(owner, expires_in).await);
    }
    (world, tokens)
}

fn at_most(messages: u64) -> Guard {
    Guard::new(Limit::PerHour(messages), Limit::None)
}

impl<B: Backend> World<B> {
    async fn states(&self) -> (i64, i64) {
        let count = async |state: &str| {
            let sql = format!("SELECT COUNT(*) FROM messages WHERE state = '{state}' AND kind = 'reminders'");
            self.backend.count(&sql).await
        };
        (count("open").await, count("held").await)
    }

    /// As every pass of `remind` ends.
    async fn watch(&self) -> bool {
        let held = watch(&self.store, &self.rules, self.now()).await.expect("a read");
        self.check().await;
        held
    }

    async fn in_every_bucket(&self, act: impl AsyncFn(Bucket) -> u64) -> u64 {
        let mut count = 0;
        for number in 0..=u8::MAX {
            count += act(Bucket::from_number(number)).await;
        }
        self.check().await;
        count
    }

    async fn release_all(&self) -> u64 {
        let now = self.now();
        self.in_every_bucket(async |bucket| self.store.release(bucket, Which::All, now).await.expect("a write")).await
    }

    async fn cancel_held(&self) -> u64 {
        let now = self.now();
        self.in_every_bucket(async |bucket| self.store.cancel(bucket, Which::All, now).await.expect("a write")).await
    }

    /// What a new courier delivers now.
    async fn delivered(&self) -> Vec<String> {
        let mut courier = self.courier();
        self.deliver(&mut courier.deliverer).await;
        courier.delivered()
    }
}

async fn what_is_too_much_for_an_hour_is_held_and_told<B: Backend>() {
    let (mut world, tokens) = crowd::<B>(5, 20).await;
    world.rules.guard = at_most(2);
    world.on_day(13);
    let written = world.remind().await;
    assert_eq!((written.pending, written.opened, written.held), (5, 2, 3));
    assert_eq!(world.states().await, (2, 3));
    assert!(world.watch().await);
    assert!(world.watch().await, "and again, which tells nobody anew");
    let delivered = world.delivered().await;
    assert_eq!(delivered.len(), 3, "{delivered:?}");
    assert_eq!(
        delivered.iter().filter(|line| line.starts_with("ops@")).collect::<Vec<_>>(),
        ["ops@example.org: 3 mails are held back: please look before owners are told"]
    );

    // Hours later nothing has changed, until somebody lets them go.
    world.clock.advance(TimeDelta::hours(3));
    world.remind().await;
    world.watch().await;
    assert_eq!(world.delivered().await, [""; 0]);
    assert_eq!(world.release_all().await, 3);
    assert_eq!(world.states().await, (3, 0));
    assert!(!world.watch().await);
    assert_eq!(world.delivered().await.len(), 3);
    for token in tokens {
        let ledger = world.ledger(token).await;
        assert!(ledger.len() == 1 && ledger[0].contains("7d sent"), "{ledger:?}");
    }
}

async fn a_second_wave_is_told_of_while_the_first_is_still_held<B: Backend>() {
    let (mut world, _) = crowd::<B>(2, 90).await;
    world.rules.guard = at_most(1);
    world.on_day(60);
    world.remind().await;
    world.watch().await;
    assert_eq!(world.states().await, (1, 1));
    assert_eq!(world.delivered().await.len(), 2, "one owner, and the fallback");
    let import = async |world: &World<B>, wave: &str| {
        for n in 0..3 {
            let key = format!("{wave}{n}");
            let owner = world.owner(&key, &[&format!("{key}@example.org")]).await;
            world.imported(owner, dawn() - days(90), world.now() + days(6)).await;
        }
        world.remind().await;
        world.watch().await;
        world.delivered().await.into_iter().filter(|line| line.starts_with("ops@")).collect::<Vec<_>>()
    };
    world.clock.advance(TimeDelta::minutes(30));
    assert_eq!(import(&world, "same").await, [""; 0], "within the hour it is the same wave");
    world.clock.advance(TimeDelta::days(3));
    assert_eq!(
        import(&world, "next").await,
        ["ops@example.org: 6 mails are held back: please look before owners are told"]
    );
}

async fn the_hour_rolls_and_counts_every_pass<B: Backend>() {
    let (mut world, _) = crowd::<B>(0, 0).await;
    world.rules.guard = at_most(2);
    let mut owners = 0;
    let mut written = async |world: &World<B>, more: usize| {
        for _ in 0..more {
            let key = format!("o{owners}");
            owners += 1;
            let owner = world.owner(&key, &[&format!("{key}@example.org")]).await;
            world.imported(owner, dawn() - days(90), world.now() + days(6)).await;
        }
        let written = world.remind().await;
        (written.opened, written.held)
    };
    assert_eq!(written(&world, 1).await, (1, 0));
    world.clock.advance(TimeDelta::minutes(30));
    assert_eq!(written(&world, 2).await, (1, 1));
    world.clock.advance(TimeDelta::minutes(29));
    assert_eq!(written(&world, 1).await, (0, 1));
    // The first one is an hour ago.
    world.clock.advance(TimeDelta::minutes(1));
    assert_eq!(written(&world, 2).await, (1, 1));
    world.clock.advance(TimeDelta::minutes(30));
    assert_eq!(written(&world, 3).await, (1, 2));
    assert_eq!(world.states().await, (4, 5));
}

async fn what_joins_an_open_message_is_not_counted<B: Backend>() {
    let (mut world, _) = crowd::<B>(1, 20).await;
    let other = world.owner("team", &["o0@example.org"]).await;
    world.rules.guard = at_most(1);
    world.on_day(13);
    world.remind().await;
    for _ in 0..3 {
        world.imported(other, dawn() - days(90), world.now() + days(6)).await;
    }
    let written = world.remind().await;
    assert_eq!((written.pending, written.opened, written.held), (3, 0, 0));
    assert_eq!(world.states().await, (1, 0));
}

async fn a_held_message_that_comes_near_its_deadline_is_told_of_again<B: Backend>() {
    let (mut world, _) = crowd::<B>(2, 20).await;
    world.rules.guard = at_most(1);
    world.on_day(13);
    world.remind().await;
    world.watch().await;
    assert_eq!(world.delivered().await.len(), 2);
    world.clock.advance(days(6) - TimeDelta::minutes(1));
    world.watch().await;
    assert_eq!(world.delivered().await, [""; 0], "more than a day is left");
    world.clock.advance(TimeDelta::minutes(1));
    for _ in 0..3 {
        world.watch().await;
    }
    let near = "ops@example.org: 1 mail is held back, and a deadline is near";
    assert_eq!(world.delivered().await, [near]);
}

async fn what_is_released_is_checked_once_more<B: Backend>() {
    let (mut world, tokens) = crowd::<B>(3, 20).await;
    world.rules.guard = at_most(1);
    world.on_day(13);
    world.remind().await;
    let mut messages = Vec::new();
    let filter = MessageFilter { states: vec![MessageState::Held], contact: None };
    let visit = |message| {
        messages.push(message);
        ControlFlow::Continue(())
    };
    world.store.each_message(&filter, visit).await.expect("a read");
    let mut held = Vec::new();
    for message in &messages {
        assert_eq!(message.pending, 1);
        held.extend(world.store.carried(message).await.expect("a read").iter().map(|carried| carried.token));
    }
    assert!(held.iter().all(|token| tokens.contains(token)));
    assert_eq!(held.len(), 2);
    let now = world.now();
    world.store.change_token(held[0], |token| change::revoke(token, now)).await.expect("allowed");
    world.release_all().await;
    let delivered = world.delivered().await;
    assert_eq!(delivered.len(), 2, "the one that was not held, and the one that is still true: {delivered:?}");
    assert!(world.ledger(held[0]).await[0].contains("7d cancelled"));
}

async fn what_is_released_joins_a_message_that_collects<B: Backend>() {
    let (mut world, _) = crowd::<B>(1, 20).await;
    let owner = world.owner("team", &["o0@example.org"]).await;
    world.rules.guard = Guard::new(Limit::PerHour(1), Limit::None);
    // Somebody else takes this hour's share.
    let first = world.owner("first", &["first@example.org"]).await;
    world.imported(first, dawn() - days(90), dawn() + days(6)).await;
    world.remind().await;
    world.imported(owner, dawn() - days(90), dawn() + days(6)).await;
    assert_eq!(world.remind().await.held, 1);
    world.rules.guard = unguarded();
    world.imported(owner, dawn() - days(90), dawn() + days(5)).await;
    assert_eq!(world.remind().await.opened, 1, "what comes later is not held with the rest");
    assert_eq!(world.release_all().await, 1);
    assert_eq!(world.states().await, (2, 0));
    let delivered = world.delivered().await;
    assert!(
        delivered.contains(&"o0@example.org: 2 tokens expire soon, the first in 5 days".to_owned()),
        "{delivered:?}"
    );
}

async fn what_is_cancelled_and_not_yet_due_becomes_due<B: Backend>() {
    let (mut world, tokens) = crowd::<B>(3, 40).await;
    world.rules.guard = at_most(1);
    // The clock runs two weeks ahead, and somebody sets it right.
    world.on_day(14);
    world.remind().await;
    assert_eq!(world.states().await, (1, 2));
    world.on_day(0);
    assert_eq!(world.cancel_held().await, 2);
    assert_eq!(world.states().await, (1, 0));
    let forgotten: Vec<_> = {
        let mut forgotten = Vec::new();
        for token in &tokens {
            forgotten.extend(world.ledger(*token).await.is_empty().then_some(*token));
        }
        forgotten
    };
    assert_eq!(forgotten.len(), 2);
    world.remind().await;
    world.on_day(10);
    world.rules.guard = unguarded();
    assert_eq!(world.remind().await.pending, 2);
    // What is due stays dropped.
    let (mut world, tokens) = crowd::<B>(2, 20).await;
    world.rules.guard = at_most(1);
    world.on_day(13);
    world.remind().await;
    assert_eq!(world.cancel_held().await, 1);
    assert_eq!(world.reconcile().await.pending, 0);
    let mut dropped = 0;
    for token in tokens {
        dropped += world.ledger(token).await.iter().filter(|line| line.contains("7d cancelled")).count();
    }
    assert_eq!(dropped, 1);
}

async fn any_waiting_message_can_be_cancelled<B: Backend>() {
    let (world, tokens) = crowd::<B>(1, 20).await;
    world.on_day(13);
    world.remind().await;
    let (id, _) = world.backend.message().await;
    let (bucket, which) = (at("o0@example.org").bucket(), Which::One(id.into()));
    assert_eq!(world.store.cancel(bucket, which, world.now()).await.expect("a write"), 1);
    world.check().await;
    assert_eq!(world.delivered().await, [""; 0]);
    assert!(world.ledger(tokens[0]).await[0].contains("7d cancelled"));
    assert_eq!(world.store.cancel(bucket, which, world.now()).await.expect("a write"), 0, "it is finished");
}

async fn an_alert_that_is_no_longer_true_is_not_sent<B: Backend>() {
    let (mut world, _) = crowd::<B>(2, 20).await;
    world.rules.guard = at_most(1);
    world.on_day(13);
    world.remind().await;
    world.watch().await;
    world.release_all().await;
    let delivered = world.delivered().await;
    assert!(delivered.iter().all(|line| !line.starts_with("ops@")), "{delivered:?}");
    assert_eq!(delivered.len(), 2);
    // A guard that is set off once more tells of it once more.
    let owner = world.owner("late", &["late@example.org"]).await;
    world.imported(owner, dawn() - days(90), world.now() + days(6)).await;
    world.clock.advance(TimeDelta::minutes(5));
    assert_eq!(world.remind().await.held, 1);
    world.watch().await;
    assert_eq!(world.delivered().await.len(), 1);
}

async fn tokens_expire_an_hours_share_at_a_time<B: Backend>() {
    let (mut world, _) = crowd::<B>(8, 20).await;
    world.rules.guard = Guard::new(Limit::None, Limit::PerHour(4));
    world.on_day(21);
    let mut expired = Vec::new();
    for _ in 0..4 {
        expired.push(world.expire().await.tokens);
        world.clock.advance(TimeDelta::minutes(30));
    }
    assert_eq!(expired, [4, 0, 4, 0]);
    let delivered = world.delivered().await;
    assert_eq!(delivered.len(), 8, "the alert is no longer true: {delivered:?}");

    let (mut world, _) = crowd::<B>(3, 20).await;
    world.rules.guard = Guard::new(Limit::None, Limit::PerHour(2));
    world.on_day(21);
    assert_eq!(world.expire().await.tokens, 2);
    let told = "ops@example.org: 1 token past its deadline waits to be marked";
    assert!(world.delivered().await.contains(&told.to_owned()));
}

async fn the_default_is_a_tenth_of_what_there_is<B: Backend>() {
    let (mut world, _) = crowd::<B>(3, 20).await;
    world.rules.guard = Guard::new(Limit::Auto, Limit::Auto);
    world.on_day(13);
    assert_eq!(world.remind().await.opened, 3, "10,000 at least");
    let minute = world.backend.count("SELECT MAX(amount) FROM guard_counts").await;
    assert_eq!(minute, 3);
    world.backend.execute("UPDATE guard_counts SET amount = 9999").await;
    let owner = world.owner("more", &["more@example.org", "another@example.org"]).await;
    world.imported(owner, dawn() - days(90), world.now() + days(6)).await;
    let written = world.remind().await;
    assert_eq!((written.opened, written.held), (1, 1));
    assert_eq!(world.store.contact_count().await.expect("a read"), 6);
}

async fn escalations_are_one_digest_a_day<B: Backend>() {
    let (mut world, _) = crowd::<B>(0, 0).await;
    let nobody = world.owner("bot", &[]).await;
    let ops = world.owner("ops", &["ops@example.org"]).await;
    world.rules.policy = lapsed::policy::Policy::new([lead(7)], true, days(7));
    let owed = async |world: &World<B>, owner| {
        world.imported(owner, dawn() - days(90), world.now() + days(6)).await;
        world.remind().await;
        world.delivered().await
    };
    let told = |tokens: &str| format!("ops@example.org: 1 owner could not be told about {tokens}");
    assert_eq!(owed(&world, nobody).await, [told("1 token")], "the first one at once");
    world.clock.advance(TimeDelta::hours(1));
    assert_eq!(owed(&world, nobody).await, [""; 0]);
    world.clock.advance(TimeDelta::hours(22));
    assert_eq!(owed(&world, nobody).await, [""; 0]);
    // What the fallback is told for itself does not wait.
    let own = "ops@example.org: \"deploy key (CI)\" expires in 6 days";
    assert_eq!(owed(&world, ops).await, [own]);
    world.clock.advance(TimeDelta::hours(1));
    assert_eq!(world.delivered().await, [told("2 tokens")]);
}

async fn what_failed_can_be_tried_again<B: Backend>() {
    let (world, tokens) = crowd::<B>(2, 20).await;
    world.on_day(13);
    world.remind().await;
    let Courier { mut deliverer, memory } = world.courier();
    memory.answer(Happened::refused(Phase::Rcpt, 550, "5.7.1 not from you"));
    memory.answer(Happened::refused(Phase::Rcpt, 550, "5.1.1 no such user"));
    assert_eq!(world.deliver(&mut deliverer).await.failed, 2);
    let suppressed = world.backend.count("SELECT COUNT(*) FROM contacts WHERE suppressed_at IS NOT NULL").await;
    assert_eq!(suppressed, 1);
    let now = world.clock.advance(days(1));
    let retry = async || {
        world.in_every_bucket(async |bucket| world.store.retry(bucket, Which::All, now).await.expect("a write")).await
    };
    assert_eq!(retry().await, 1, "not the one whose contact takes no mail");
    for address in ["o0@example.org", "o1@example.org"] {
        let contact = world.store.find_contact(&at(address)).await.expect("a read").expect("a contact");
        world.store.unsuppress(contact.id).await.expect("a write");
    }
    assert_eq!(retry().await, 1);
    let delivered = world.delivered().await;
    let (own, escalated): (Vec<_>, Vec<_>) = delivered.iter().partition(|line| !line.starts_with("ops@"));
    assert_eq!(own.len(), 2, "{delivered:?}");
    assert!(escalated.iter().all(|line| line.contains("could not be told")), "{delivered:?}");
    for token in tokens {
        let ledger = world.ledger(token).await;
        assert!(ledger.iter().any(|line| line.starts_with("0: 7d sent to o")), "{ledger:?}");
    }
    let open = MessageState::Sent.as_str();
    assert_eq!(
        world
            .backend
            .count(&format!("SELECT COUNT(*) FROM messages WHERE state = '{open}' AND kind = 'reminders'"))
            .await,
        2
    );
}
