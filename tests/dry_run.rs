//! What a run would do is what it then does, and asking changes nothing.

use std::future::Future;
use std::sync::Arc;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::cli::{PATIENCE, Place, eventually, fact};
use crate::support::world::{World, at, days, lead, unguarded};
use chrono::TimeDelta;
use lapsed::config::Limit;
use lapsed::digest::Digest;
use lapsed::jobs::deliver::Terms;
use lapsed::jobs::dry_run::{Counts, Orders, Would, dry_run};
use lapsed::jobs::guard::{Guard, watch};
use lapsed::jobs::purge::{self, Retention};
use lapsed::policies::{Group, Match, Pattern};
use lapsed::policy::Policy;
use lapsed::store::outbox::MessageKind;
use lapsed::store::planning::Written;
use lapsed::store::purging::Purged;
use lapsed::store::{Accounts, Error, Postgres, Sqlite, Store};
use lapsed::token::{Address, Bucket, ContactId, IdRef};

on_every_back_end!(what_is_foretold_is_what_happens, who_only_looks_cannot_write);

/// A back end that is looked at.
trait Watched: Backend {
    /// How many histories are tried: with a server, each takes its time.
    const HISTORIES: u64;

    /// Something that changes whenever anything is written, by whomever.
    fn fingerprint(&self) -> impl Future<Output = Vec<i64>>;

    /// Opens the store to look at it.
    fn look(&self) -> impl Future<Output = Self::Store>;
}

impl Watched for OnSqlite {
    const HISTORIES: u64 = 8;

    async fn fingerprint(&self) -> Vec<i64> {
        // As this connection never writes, it changes with the commits of others (SQLite's documentation of the pragma).
        vec![self.count("PRAGMA data_version").await]
    }

    async fn look(&self) -> Sqlite {
        Sqlite::look(&self.url()).await.expect("the store opens")
    }
}

impl Watched for OnPostgres {
    const HISTORIES: u64 = 3;

    async fn fingerprint(&self) -> Vec<i64> {
        let mut all = Vec::new();
        for table in [
            "owners",
            "contacts",
            "owner_contacts",
            "tokens",
            "token_contacts",
            "reminders",
            "messages",
            "jobs",
            "watermarks",
            "guard_counts",
        ] {
            // Each version of a row has the transaction that wrote it.
            all.push(self.count(&format!("SELECT COUNT(*) FROM {table}")).await);
            all.push(self.count(&format!("SELECT COALESCE(SUM(xmin::text::bigint), 0)::bigint FROM {table}")).await);
        }
        all
    }

    async fn look(&self) -> Postgres {
        Postgres::look(&self.database.url).await.expect("the store opens")
    }
}

impl Watched for OnPartitions {
    const HISTORIES: u64 = 1;

    async fn fingerprint(&self) -> Vec<i64> {
        self.0.fingerprint().await
    }

    async fn look(&self) -> Postgres {
        self.0.look().await
    }
}

/// Numbers that look random, and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn day(&mut self, least: i64, below: i64) -> i64 {
        least + i64::try_from(self.below((below - least).unsigned_abs())).expect("small")
    }
}

/// What is compared: tokens, reminders, rows that are settled, whether something is held.
fn numbers(written: &Written) -> [u64; 4] {
    // What is held twice is counted twice, which depends on where pages end.
    [written.tokens, written.pending, written.settled, u64::from(written.held > 0)]
}

/// Months of owners with and without contacts, watchers, policies, imports, edits, waits, dead addresses, guards and a fallback.
async fn what_is_foretold_is_what_happens<B: Watched>() {
    let mut sent_in_all = 0;
    for seed in 1..=B::HISTORIES {
        let mut dice = Dice(seed);
        let mut world = World::<B>::new().await;
        if seed % 2 == 0 {
            world.fallback("ops@example.org").await;
        }
        if seed % 3 == 0 {
            world.rules.digest = Digest {
                window: Some("mon-fri 08:00-18:00".parse().expect("a window")),
                min_interval: Some(days(3)),
                urgent_within: days(1),
                ..Digest::holding(TimeDelta::zero())
            };
        }
        let mut tokens = Vec::new();
        for n in 0..12 {
            let own = format!("o{n}@example.org");
            let addresses: &[&str] = match dice.below(5) {
                0 => &[],
                1 => &[&own, "team@example.org"],
                2 => &["team@example.org"],
                _ => &[&own],
            };
            let owner = world.owner(&format!("o{n}"), addresses).await;
            for _ in 0..1 + dice.below(4) {
                let token = world.token(owner, dice.day(2, 70)).await;
                if dice.below(4) == 0 {
                    world
                        .store
                        .watch_token(token, &[at("watch@example.org").into()], world.now())
                        .await
                        .expect("a write");
                }
                tokens.push(token);
            }
            let (made, expires) = (world.now() - days(dice.day(1, 90)), world.now() + days(dice.day(-12, 40)));
            world.imported(owner, made, expires).await;
        }
        let mut day = 0;
        while day < 80 {
            world.on_day(day);
            world.rules.guard = match dice.below(4) {
                0 => Guard::new(Limit::PerHour(dice.below(4)), Limit::None),
                1 => Guard::new(Limit::None, Limit::PerHour(1 + dice.below(4))),
                _ => unguarded(),
            };
            world.rules.groups = match dice.below(3) {
                0 => Arc::from([]),
                n => policy_for(&world, "o1*", &[20, i64::try_from(n).expect("small")]).await,
            };
            for _ in 0..dice.below(3) {
                let token = tokens[usize::try_from(dice.below(tokens.len() as u64)).expect("an index")];
                let found = world.store.find_tokens(&IdRef::Whole(token.uuid())).await.expect("a read");
                if found.first().and_then(|token| token.expires_at).is_some_and(|at| at > world.now()) {
                    world.move_deadline(token, world.now() + days(dice.day(1, 50))).await;
                }
            }
            if dice.below(3) == 0 {
                // Planned and not sent: when it is, some of it is no longer true.
                world.expire().await;
                world.remind().await;
                day += dice.day(1, 5);
                world.on_day(day);
            }
            if dice.below(6) == 0 {
                let dead = format!(
                    "UPDATE contacts SET suppressed_at = created_at WHERE address = 'o{}@example.org'",
                    dice.below(12)
                );
                world.backend.execute(&dead).await;
            }
            sent_in_all += a_run(&world, dice.below(4) == 0).await;
            day += dice.day(1, 9);
        }
    }
    assert!(sent_in_all > 25 * B::HISTORIES, "{sent_in_all} mails");
}

/// A policy for the tokens of some owners, with a contact of its own.
async fn policy_for<B: Backend>(world: &World<B>, owners: &str, leads: &[i64]) -> Arc<[Group]> {
    let address = at("security@example.org");
    let contact = world.store.make_contact(&address.clone().into(), world.now()).await.expect("a contact");
    Arc::from([Group {
        matches: Match { owner: Some(Pattern::parse(owners, false).expect("a pattern")), ..Match::default() },
        policy: Policy::new(leads.iter().copied().map(lead), true, days(7)),
        digest: world.rules.digest.clone(),
        contacts: vec![(contact, address)],
    }])
}

fn terms<B: Backend>(world: &World<B>) -> Terms {
    Terms {
        fallback: world.rules.fallback,
        give_up_after: days(2),
        every: std::time::Duration::ZERO,
        idle: std::time::Duration::ZERO,
        groups: world.rules.groups.clone(),
        policy: world.rules.policy.clone(),
        digest: world.rules.digest.clone(),
    }
}

/// Asks a store that cannot be written.
async fn ask<B: Watched>(
    world: &World<B>,
    retention: Retention,
    newcomers: &[(ContactId, Address)],
    reconciles: bool,
) -> (Counts, Vec<Would>) {
    let store = world.backend.look().await;
    let terms = terms(world);
    let orders = Orders { rules: &world.rules, terms: &terms, retention, newcomers, plans: true, reconciles };
    let mut would = Vec::new();
    let visit = async |what: Would| {
        would.push(what);
        Ok(())
    };
    let counts = dry_run(&store, orders, world.now(), visit).await.expect("a dry run");
    store.close().await;
    (counts, would)
}

/// Asks, and then does it; returns how many mails were sent.
async fn a_run<B: Watched>(world: &World<B>, reconcile: bool) -> u64 {
    let keep = Retention { reminders: days(45), messages: days(20), ended_tokens: days(40) };
    let before = world.backend.fingerprint().await;
    let (counts, would) = ask(world, keep, &[], reconcile).await;
    assert_eq!(world.backend.fingerprint().await, before, "nothing is written");
    let (mut expired, mut sent, mut said) = (0, Vec::new(), 0);
    for what in would {
        match what {
            Would::Expire(tokens) => expired += tokens.len() as u64,
            Would::Write(_) => {}
            Would::Send(kind, contact, reminders) => {
                assert_eq!(reminders > 0, kind.carries(), "{kind}: {contact:?}");
                said += reminders;
                sent.push((kind, contact.address, reminders));
            }
        }
    }
    let (foretold_expire, foretold_remind) =
        (counts.expire.clone().expect("planned"), counts.remind.clone().expect("planned"));
    assert_eq!(expired, foretold_expire.tokens);
    assert_eq!(sent.len() as u64, counts.deliver.sent);

    let now = world.now();
    let did_expire = world.expire().await;
    watch(&world.store, &world.rules, now).await.expect("a read");
    let did_remind = if reconcile { world.reconcile().await } else { world.remind().await };
    watch(&world.store, &world.rules, now).await.expect("a read");
    let sent_so_far = world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'sent'").await;
    let mut courier = world.courier();
    let did_deliver = world.deliver(&mut courier.deliverer).await;
    let delivered = courier.delivered();
    let context = || format!("{counts:?} on {now}, reconcile: {reconcile}; {sent:?}; delivered {delivered:?}");
    assert_eq!(numbers(&foretold_expire), numbers(&did_expire), "expire: {}", context());
    assert_eq!(numbers(&foretold_remind)[1..], numbers(&did_remind)[1..], "remind: {}", context());
    assert_eq!(counts.deliver, did_deliver, "deliver: {}", context());
    let mut to: Vec<&str> = sent.iter().map(|(_, address, _)| address.as_str()).collect();
    to.sort_unstable();
    let addresses: Vec<&str> = delivered.iter().filter_map(|line| line.split(':').next()).collect();
    assert_eq!(to, addresses, "{}", context());
    let now_sent = world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'sent'").await;
    assert_eq!(said, (now_sent - sent_so_far).unsigned_abs(), "what mails say: {}", context());
    let lease = world.lease(purge::NAME).await;
    let mut purged = Purged::default();
    loop {
        let outcome = purge::step(&world.store, &lease, keep, now).await.expect("a step");
        purged.reminders += outcome.did.reminders;
        purged.messages += outcome.did.messages;
        purged.tokens += outcome.did.tokens;
        if !outcome.more {
            break;
        }
    }
    assert_eq!(counts.purge, purged, "purge: {}", context());
    did_deliver.sent
}

async fn who_only_looks_cannot_write<B: Watched>() {
    let world = World::<B>::new().await;
    let store = world.backend.look().await;
    let refused = store.set_fallback(Some(&at("ops@example.org")), world.now()).await;
    assert!(matches!(refused, Err(Error::ReadOnly | Error::Unavailable(_))), "{refused:?}");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM contacts").await, 0);
}

/// Whom the configuration names and the store does not know yet is told all the same, and not written.
#[tokio::test]
async fn newcomers_need_not_be_stored() {
    let mut world = World::<OnSqlite>::new().await;
    let owner = world.owner("orphan", &[]).await;
    let token = world.token(owner, 0).await;
    let other = world.owner("o1", &["o1@example.org"]).await;
    world.token(other, 0).await;
    let stranger = |address: &str| (ContactId::new(Bucket::of(address), world.now()), at(address));
    let [ops, security] = [stranger("ops@example.org"), stranger("security@example.org")];
    world.rules.fallback = Some(ops.0);
    world.rules.groups = Arc::from([Group {
        matches: Match { owner: Some(Pattern::parse("o1", false).expect("a pattern")), ..Match::default() },
        policy: Policy::new([lead(3)], true, days(7)),
        digest: Digest::holding(TimeDelta::zero()),
        contacts: vec![security.clone()],
    }]);
    world.clock.advance(TimeDelta::seconds(1));
    let keep = Retention { reminders: days(400), messages: days(90), ended_tokens: days(400) };
    let (_, would) = ask(&world, keep, &[ops.clone(), security], false).await;
    let mut told: Vec<_> = would
        .into_iter()
        .filter_map(|what| match what {
            Would::Send(kind, contact, reminders) => Some((kind, contact.address.to_string(), reminders)),
            _ => None,
        })
        .collect();
    told.sort_unstable_by(|a, b| a.1.cmp(&b.1));
    let expected = [
        (MessageKind::Reminders, "o1@example.org".to_owned(), 1),
        (MessageKind::Escalations, "ops@example.org".to_owned(), 1),
        (MessageKind::Reminders, "security@example.org".to_owned(), 1),
    ];
    assert_eq!(told, expected);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM contacts").await, 1);
    assert!(world.ledger(token).await.is_empty());
}

const CONFIGURATION: &str = r#"
    [mail]
    transport = "maildir"
    from = "Tokens <tokens@example.org>"
    fallback_to = "ops@example.org"
    [mail.maildir]
    path = "mail"
    [[reminders.policy]]
    match = { owner = "carol" }
    contacts = ["security@example.org"]
"#;

#[test]
fn a_command_tells_what_the_next_one_does() {
    let place = Place::new();
    place.configure(CONFIGURATION);
    assert!(place.line("run --once --dry-run").fails(1).contains("there is no store"));
    assert!(!place.path("lapsed.db").exists());
    place.owner("alice", "alice@example.org");
    place.write(
        "tokens.csv",
        "owner,emails,description,expires_at\n\
         alice,,deploy key,2026-01-01T00:00:00Z\n\
         bob,,nobody knows,2026-01-02T00:00:00Z\n",
    );
    place.line("token import tokens.csv").ok();
    place.owner("carol", "carol@example.org");
    place.token("carol", "watched", "1s");
    let (id, secret) = place.token("alice", "CI", "1s");
    eventually("the deadline", PATIENCE, || (place.verify(&secret).status == Some(1)).then_some(()));

    let store = || std::fs::read(place.path("lapsed.db")).expect("the store");
    let before = store();
    let told = place.line("run --once --dry-run");
    assert_eq!(told.status, Some(0), "{told}");
    assert!(told.stdout.contains("a mail to alice@example.org with 1 reminder"), "{told}");
    assert!(told.stdout.contains("a mail to security@example.org with 1 reminder"), "{told}");
    assert!(told.stdout.contains("expired notice stale: the deadline had passed too long ago"), "{told}");
    assert!(!place.path("mail").exists());
    let rows = place.line("run --once --dry-run --format json").ok();
    let expire = rows.lines().find(|line| line.contains(&id)).expect(&rows);
    assert!(expire.contains(r#""action":"expire""#) && expire.contains(r#""owner":"alice""#), "{expire}");
    assert!(place.line("run --once --dry-run --format csv").ok().starts_with("action,token,owner,description,"));
    assert!(store() == before, "the file is the same, byte for byte");

    let did = place.line("run --once").ok();
    for job in ["expire", "remind", "deliver", "purge"] {
        assert_eq!(fact(&told.stderr, job), fact(&did, job), "{job}:\n{told}\n{did}");
    }
    assert_eq!(place.mails("mail").len(), 3);
    let again = place.line("run --once --dry-run");
    assert!(again.stderr.contains("Nothing would be expired, written or sent."), "{again}");
    assert!(place.line("run --dry-run").fails(2).contains("--once"));
    assert!(place.line("run --once --format json").fails(2).contains("--dry-run"));
}
