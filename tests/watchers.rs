//! Contacts that watch one token, as a story on each back end: they are told besides the owner's, and for as long as they
//! watch.

use std::collections::BTreeSet;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, at, dawn, days};
use lapsed::change;
use lapsed::clock::Timestamp;
use lapsed::expires::Expires;
use lapsed::forecast::Ahead;
use lapsed::policies::Traits;
use lapsed::store::imports::{ImportRow, ImportRun, RowOutcome};
use lapsed::store::{Accounts, Bounces, Imports, Messages, Reports};
use lapsed::token::{ContactId, TokenId};
use uuid::Uuid;

on_every_back_end!(
    who_watches_a_token_is_told_of_it,
    who_comes_late_is_told_of_what_is_due,
    who_no_longer_watches_hears_nothing,
    who_watches_the_one_watches_its_successor,
    an_owner_without_contact_is_not_alone,
    a_dead_watcher_is_passed_over,
    a_watcher_that_was_told_is_enough,
    a_list_names_who_watches,
    what_lies_ahead_comes_with_all_who_are_told,
);

async fn watch<B: Backend>(world: &World<B>, token: TokenId, address: &str) {
    world.store.watch_token(token, &[at(address).into()], world.now()).await.expect("a write");
}

async fn who_watches_a_token_is_told_of_it<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let watched = world.token(alice, 90).await;
    let other = world.token(alice, 90).await;
    watch(&world, watched, "security@example.org").await;
    watch(&world, watched, "alice@example.org").await;
    watch(&world, watched, "security@example.org").await;
    assert!(!world.get(watched).await.unplanned, "nothing is due yet");
    world.on_day(60);
    assert_eq!(world.remind().await.pending, 3);
    let expected = ["0: 30d pending to alice@example.org", "0: 30d pending to security@example.org"];
    assert_eq!(world.ledger(watched).await, expected);
    assert_eq!(world.ledger(other).await, expected[..1]);
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    let expected = [
        "alice@example.org: 2 tokens expire in 30 days",
        "security@example.org: \"deploy key (CI)\" expires in 30 days",
    ];
    assert_eq!(courier.delivered(), expected);
    world.on_day(90);
    assert_eq!(world.expire().await.pending, 3);
}

async fn who_comes_late_is_told_of_what_is_due<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(85);
    world.remind().await;
    watch(&world, token, "security@example.org").await;
    assert_eq!(world.remind().await.pending, 1, "Alice has been told");
    let expected = ["0: 30d superseded to security@example.org", "0: 7d pending to security@example.org"];
    let ledger = world.ledger(token).await;
    assert_eq!(
        ledger.iter().filter(|line| line.contains("security")).collect::<Vec<_>>(),
        expected.iter().collect::<Vec<_>>()
    );
}

async fn who_no_longer_watches_hears_nothing<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    watch(&world, token, "security@example.org").await;
    world.on_day(60);
    world.remind().await;
    let contact = world.store.find_contact(&at("security@example.org")).await.expect("a read").expect("a contact");
    assert!(world.store.unwatch_token(token, contact.id).await.expect("a write"));
    assert!(!world.store.unwatch_token(token, contact.id).await.expect("a write"), "once");
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered(), ["alice@example.org: \"deploy key (CI)\" expires in 30 days"]);
    let expected = ["0: 30d sent to alice@example.org", "0: 30d cancelled to security@example.org"];
    assert_eq!(world.ledger(token).await, expected);
}

async fn who_watches_the_one_watches_its_successor<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    watch(&world, token, "security@example.org").await;
    let now = world.on_day(10);
    let changed =
        world.store.change_token(token, |token| change::rotate(token, days(0), None, now)).await.expect("a rotation");
    let (successor, _) = changed.successor.expect("a successor");
    let watchers = world.store.watchers_of(successor.id).await.expect("a read");
    assert_eq!(watchers.iter().map(|contact| contact.address.as_str()).collect::<Vec<_>>(), ["security@example.org"]);
}

async fn an_owner_without_contact_is_not_alone<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let bot = world.owner("bot", &[]).await;
    let token = world.token(bot, 90).await;
    watch(&world, token, "security@example.org").await;
    world.on_day(60);
    world.remind().await;
    assert_eq!(world.ledger(token).await, ["0: 30d pending to security@example.org"]);
}

async fn a_dead_watcher_is_passed_over<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    watch(&world, token, "left@example.org").await;
    world.backend.execute("UPDATE contacts SET suppressed_at = created_at WHERE address = 'left@example.org'").await;
    world.on_day(60);
    world.remind().await;
    assert_eq!(world.ledger(token).await, ["0: 30d pending to alice@example.org"]);
}

async fn a_watcher_that_was_told_is_enough<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let alice = world.owner("alice", &["gone@example.org"]).await;
    let (watched, other) = (world.token(alice, 90).await, world.token(alice, 90).await);
    watch(&world, watched, "security@example.org").await;
    world.on_day(60);
    world.remind().await;
    world.backend.execute("UPDATE contacts SET suppressed_at = created_at WHERE address = 'gone@example.org'").await;
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    let escalated = |ledger: Vec<String>| ledger.iter().filter(|line| line.ends_with("escalated")).count();
    assert_eq!((escalated(world.ledger(watched).await), escalated(world.ledger(other).await)), (0, 1));
}

async fn a_list_names_who_watches<B: Backend>() {
    let world = World::<B>::new().await;
    world.owner("alice", &["alice@example.org"]).await;
    let row = |watchers: &[&str]| ImportRow {
        owner_key: "alice".into(),
        time_zone: None,
        addresses: Vec::new(),
        watchers: watchers.iter().map(|address| at(address)).collect(),
        external_id: "1".into(),
        description: "elsewhere".into(),
        created_at: Some(world.now()),
        expires: Expires::At(dawn() + days(90)),
        last_used_at: None,
        revoked_at: None,
    };
    let import = async |watchers: &[&str]| {
        let run = ImportRun {
            id: Uuid::now_v7(),
            source: "elsewhere".into(),
            now: world.now(),
            ended_before: Timestamp::UNIX_EPOCH,
        };
        // A row that stands twice does nothing.
        let rows = [row(watchers), row(&["second@example.org"])];
        let outcomes = world.store.import(&run, &rows).await.expect("an import");
        assert!(matches!(outcomes[1], RowOutcome::Refused(_)), "{outcomes:?}");
    };
    import(&["security@example.org", "alice@example.org"]).await;
    world.on_day(60);
    assert_eq!(world.remind().await.pending, 2);
    // Who comes with a later list is told of what is due; who is not in it any more watches on.
    import(&["audit@example.org"]).await;
    assert_eq!(world.remind().await.pending, 1);
    import(&["audit@example.org"]).await;
    assert_eq!(world.remind().await.pending, 0);
    let token = crate::support::world::tokens(&world.store, None).await.pop().expect("a token");
    let watchers = world.store.watchers_of(token.id).await.expect("a read");
    let watchers: Vec<&str> = watchers.iter().map(|contact| contact.address.as_str()).collect();
    assert_eq!(watchers, ["alice@example.org", "audit@example.org", "security@example.org"]);
    assert_eq!(world.store.contacts_of(token.owner).await.expect("a read").len(), 1, "they do not speak for the owner");
}

async fn what_lies_ahead_comes_with_all_who_are_told<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org", "team@example.org"]).await;
    let bot = world.owner("bot", &[]).await;
    let late = world.token(alice, 30).await;
    let soon = world.token(alice, 20).await;
    let silent = world.token(bot, 25).await;
    let revoked = world.token(alice, 22).await;
    let now = world.now();
    world.store.change_token(revoked, |token| change::revoke(token, now)).await.expect("allowed");
    world.token(alice, 20).await;
    world.token(alice, 40).await;
    for address in ["security@example.org", "team@example.org", "ravi@example.org"] {
        watch(&world, soon, address).await;
    }
    let (from, until) = (world.now() + days(19), world.now() + days(30));
    let mut ahead = Vec::new();
    let visit = |token: Ahead, traits: Option<Traits>, contacts: &[ContactId]| {
        let contacts: BTreeSet<ContactId> = contacts.iter().copied().collect();
        ahead.push((token.token, traits.map(|traits| traits.owner_key), contacts.len()));
    };
    world.store.each_ahead(from, until, true, visit).await.expect("a read");
    ahead[..2].sort_by_key(|(.., contacts)| std::cmp::Reverse(*contacts));
    let of = |key: &str| Some(key.to_owned());
    let (same_day, rest) = ahead.split_at(2);
    assert_eq!(same_day[0], (soon, of("alice"), 4), "her two, one of whom watches too, and the two others");
    assert_eq!((&same_day[1].1, same_day[1].2), (&of("alice"), 2));
    assert_eq!(rest, [(silent, of("bot"), 0), (late, of("alice"), 2)], "by their deadlines, the last one included");

    let mut undescribed = 0;
    let count = |_: Ahead, traits: Option<Traits>, _: &[ContactId]| undescribed += usize::from(traits.is_none());
    world.store.each_ahead(from, until - days(1), false, count).await.expect("a read");
    assert_eq!(undescribed, 3);

    assert_eq!(world.store.suppressed().await.expect("a read").len(), 0);
    let contact = world.store.find_contact(&at("team@example.org")).await.expect("a read").expect("a contact");
    world.store.suppress_contact(contact.id, "550 5.1.1 no such address", world.now()).await.expect("a write");
    let suppressed = world.store.suppressed().await.expect("a read");
    assert_eq!(suppressed.into_iter().collect::<Vec<_>>(), [contact.id]);
}
