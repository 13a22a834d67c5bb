//! Policies for groups of tokens, as a story on each back end: a token follows the first that fits it, and nothing is lost when
//! a policy changes or a token moves to another.

use std::sync::Arc;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, at, days, lead};
use chrono::TimeDelta;
use lapsed::change::{self, Edit};
use lapsed::digest::Digest;
use lapsed::jobs::remind;
use lapsed::policies::{Group, Match, Pattern};
use lapsed::policy::Policy;
use lapsed::store::planning::{Decided, Progress};
use lapsed::store::{Accounts, Jobs, Messages, Planning, Recipients};
use lapsed::token::{ContactId, TokenId};
use uuid::Uuid;

on_every_back_end!(
    a_token_follows_the_first_policy_that_fits,
    a_changed_policy_is_noticed_and_nobody_is_told_twice,
    an_edit_moves_a_token_to_another_policy,
    marks_are_taken_off_in_any_order_of_deadlines,
    an_edit_in_between_keeps_its_mark,
    a_policy_names_further_contacts,
    a_contact_that_a_policy_names_is_enough,
    daemons_with_other_policies_lose_nothing,
);

/// A policy for the tokens of these owners.
fn owned_by(pattern: &str, leads: &[i64]) -> Group {
    matching(Match { owner: Some(Pattern::parse(pattern, false).expect(pattern)), ..Match::default() }, leads)
}

fn matching(matches: Match, leads: &[i64]) -> Group {
    Group {
        matches,
        policy: Policy::new(leads.iter().map(|days| lead(*days)), true, days(7)),
        digest: Digest::holding(TimeDelta::zero()),
        contacts: Vec::new(),
    }
}

fn described(pattern: &str, leads: &[i64]) -> Group {
    matching(Match { description: Some(Pattern::parse(pattern, true).expect(pattern)), ..Match::default() }, leads)
}

/// The leads that a token's ledger has in this state.
async fn leads<B: Backend>(world: &World<B>, token: TokenId, state: &str) -> Vec<String> {
    let ledger = world.ledger(token).await;
    let lines = ledger.iter().filter(|line| line.contains(&format!(" {state} ")));
    lines.map(|line| line.split(' ').nth(1).expect("a lead").to_owned()).collect()
}

async fn rename<B: Backend>(world: &World<B>, token: TokenId, description: &str) {
    let now = world.now();
    let edit = Edit { description: Some(description.into()), ..Edit::default() };
    world.store.change_token(token, |token| change::edit(token, &edit, now)).await.expect("an edit");
}

async fn a_token_follows_the_first_policy_that_fits<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.groups = Arc::from([owned_by("ci-*", &[14, 3]), owned_by("*-bot", &[20])]);
    let mut tokens = Vec::new();
    for key in ["ci-bot", "bug-bot", "alice"] {
        let owner = world.owner(key, &[&format!("{key}@example.org")]).await;
        tokens.push(world.token(owner, 90).await);
    }
    for day in 0..=90 {
        world.on_day(day);
        world.expire().await;
        world.remind().await;
    }
    let expected = [vec!["14d", "3d", "expired"], vec!["20d", "expired"], vec!["30d", "7d", "1d", "expired"]];
    for (token, expected) in tokens.into_iter().zip(expected) {
        assert_eq!(leads(&world, token, "pending").await, expected);
    }
}

async fn a_changed_policy_is_noticed_and_nobody_is_told_twice<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.groups = Arc::from([owned_by("ci-*", &[14])]);
    let (ci, alice) =
        (world.owner("ci-bot", &["ci@example.org"]).await, world.owner("alice", &["alice@example.org"]).await);
    let (theirs, hers) = (world.token(ci, 90).await, world.token(alice, 90).await);
    world.on_day(85);
    assert_eq!(world.remind().await.pending, 2, "14 days of the one, 7 days of the other");
    // The lead of 7 days has been dealt with, for those that had it.
    world.rules.groups = Arc::from([owned_by("ci-*", &[14, 7])]);
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(leads(&world, theirs, "pending").await, ["14d", "7d"]);
    assert_eq!(leads(&world, hers, "pending").await, ["7d"]);
    assert_eq!(world.remind().await.pending, 0);
    // Without any, the token follows the policy for all: 30 days were not said, and are too late.
    world.rules.groups = Arc::from([]);
    assert_eq!(world.remind().await.pending, 0);
    assert_eq!(leads(&world, theirs, "superseded").await, ["30d"]);
}

/// A mark goes with the description that was read, and each description with its own token.
async fn marks_are_taken_off_in_any_order_of_deadlines<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.groups = Arc::from([described("*production*", &[60, 20])]);
    let now = world.now();
    for n in 0..12 {
        let owner = world.owner(&format!("o{n}"), &[&format!("o{n}@example.org")]).await;
        let token = world.imported(owner, now - days(100), now + days(5 + n * 7 % 12)).await;
        rename(&world, token, &format!("key {n} of {}", if n % 2 == 0 { "production" } else { "staging" })).await;
    }
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM tokens WHERE unplanned").await, 12);
    assert_eq!(world.remind().await.pending, 12);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM tokens WHERE unplanned").await, 0);
}

async fn an_edit_moves_a_token_to_another_policy<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.groups = Arc::from([described("*production*", &[60, 20])]);
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(75);
    assert_eq!(world.remind().await.pending, 1, "30 days");
    rename(&world, token, "deploy key, Production").await;
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(leads(&world, token, "pending").await, ["30d", "20d"]);
    assert_eq!(leads(&world, token, "superseded").await, ["60d"]);
    world.on_day(83);
    assert_eq!(world.remind().await.pending, 0, "7 days are not owed any more");
}

async fn an_edit_in_between_keeps_its_mark<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.rules.groups = Arc::from([described("*production*", &[20])]);
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let now = world.on_day(80);
    let token = world.imported(alice, now - days(80), now + days(10)).await;
    let lease = world.lease(remind::NAME).await;
    let mut page = world.store.unplanned(now, 10).await.expect("a page");
    let mut traits = world.store.traits(&[token]).await.expect("a read");
    page[0].traits = traits.remove(&token);
    // What is decided now goes by the description that was read.
    rename(&world, token, "production").await;
    let decided = Decided { now, looked_at: &page, reminders: Vec::new(), may_open: None };
    world.store.plan(&lease, decided, Progress::Planned).await.expect("a write");
    assert!(world.get(token).await.unplanned);
    world.store.finish(&lease, now, Ok("done")).await.expect("a write");
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(leads(&world, token, "pending").await, ["20d"]);
    assert!(!world.get(token).await.unplanned);
}

async fn contact<B: Backend>(world: &World<B>, address: &str) -> ContactId {
    world.store.make_contact(&at(address).into(), world.now()).await.expect("a write")
}

async fn a_policy_names_further_contacts<B: Backend>() {
    let mut world = World::<B>::new().await;
    let security = contact(&world, "security@example.org").await;
    assert_eq!(contact(&world, "security@example.org").await, security, "it is made once");
    let group = Group { contacts: vec![(security, at("security@example.org"))], ..owned_by("ci-*", &[14, 3]) };
    world.rules.groups = Arc::from([group]);
    let ci = world.owner("ci-bot", &["ci@example.org"]).await;
    let bot = world.owner("ci-lonely", &[]).await;
    let (token, lonely) = (world.token(ci, 90).await, world.token(bot, 90).await);
    world.on_day(76);
    assert_eq!(world.remind().await.pending, 3);
    assert_eq!(world.ledger(lonely).await, ["0: 14d pending to security@example.org"]);
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    let expected =
        ["ci@example.org: \"deploy key (CI)\" expires in 14 days", "security@example.org: 2 tokens expire in 14 days"];
    assert_eq!(courier.delivered(), expected);
    // The next reminder waits when the policy names them no more.
    world.on_day(87);
    world.remind().await;
    world.rules.groups = Arc::from([owned_by("ci-*", &[14, 3])]);
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered(), ["ci@example.org: \"deploy key (CI)\" expires in 3 days"]);
    let ledger = world.ledger(token).await;
    assert!(ledger.contains(&"0: 3d cancelled to security@example.org".to_owned()), "{ledger:?}");
    assert!(world.store.find_contact(&at("security@example.org")).await.expect("a read").is_some());
}

async fn a_contact_that_a_policy_names_is_enough<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let security = contact(&world, "security@example.org").await;
    let group = Group { contacts: vec![(security, at("security@example.org"))], ..owned_by("ci-*", &[14, 3]) };
    world.rules.groups = Arc::from([group]);
    let ci = world.owner("ci-bot", &["gone@example.org"]).await;
    let other = world.owner("bug-bot", &["gone@example.org"]).await;
    let (named, alone) = (world.token(ci, 90).await, world.token(other, 90).await);
    world.on_day(76);
    world.remind().await;
    world.backend.execute("UPDATE contacts SET suppressed_at = created_at WHERE address = 'gone@example.org'").await;
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    let escalated = |ledger: Vec<String>| ledger.iter().filter(|line| line.ends_with("escalated")).count();
    assert_eq!((escalated(world.ledger(named).await), escalated(world.ledger(alone).await)), (0, 1));
}

async fn daemons_with_other_policies_lose_nothing<B: Backend>() {
    let mut world = World::<B>::new().await;
    let ci = world.owner("ci-bot", &["ci@example.org"]).await;
    let token = world.token(ci, 90).await;
    let (old, new) = (Arc::from([owned_by("ci-*", &[14])]), Arc::from([owned_by("ci-*", &[14, 5])]));
    world.rules.groups = Arc::clone(&old);
    world.on_day(80);
    world.remind().await;
    // The new daemon plans once, then the old one goes on for some days before it is stopped.
    world.rules.groups = Arc::clone(&new);
    world.remind().await;
    world.rules.groups = Arc::clone(&old);
    world.on_day(86);
    assert_eq!(world.remind().await.pending, 0);
    world.rules.groups = new;
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(leads(&world, token, "pending").await, ["14d", "5d"]);

    // A pass whose lease was lost changes nothing.
    let stalled = world.lease(remind::NAME).await;
    let later = world.clock.advance(TimeDelta::minutes(3));
    world.store.lease(remind::NAME, Uuid::from_u128(2), later).await.expect("a read").expect("it has ended");
    world.rules.groups = old;
    let lost = remind::adopt(&world.store, &stalled, &world.rules, later).await;
    assert!(matches!(lost, Err(lapsed::store::Error::LostLease("remind"))), "{lost:?}");
    assert!(world.backend.count("SELECT COUNT(*) FROM watermarks WHERE lead > 0").await > 0);
}
