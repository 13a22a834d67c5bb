//! A process dies at each statement of each job, and another one goes on.
//!
//! An act is one pass of a job. It is played once undisturbed, which counts its statements; then as many times again, and
//! each time the process dies at another statement. What follows is the same for all: a process with another name takes
//! over when the leases' time is up, and at the end the ledger and what everybody was told are as they were undisturbed.
//!
//! How one dies on PostgreSQL, through a proxy that knows where statements begin and end:
//!
//! - The *future is dropped* while it waits for the statement's answer: each await point of a job is one of these, or a wait
//!   for a connection, which comes before the statement that it is for. The statement is then executed all the same. The
//!   other one shares the pool, as tasks of one process do, and so finds what the dead one left in it.
//! - The *connection is cut* after the statement was executed, before the answer arrives: so nobody knows what became of a
//!   COMMIT. No new connection succeeds. (A cut before the statement reaches the server leaves what a cut after the one
//!   before it does: nothing happens in between.)
//!
//! On SQLite, which tells of its statements itself, there is no connection to cut, but a process that is killed. What it
//! leaves is what its files hold at that moment, for its locks end with it and what it wrote is the system's to keep. So
//! the files are copied before each statement, and the other one goes on from each copy: exactly what a kill would leave,
//! without a kill for each. A power cut is `synchronous = FULL`'s matter, and not shown here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::backend::{Backend, OnPostgres, OnSqlite};
use crate::support::deaths::{Counter, counts};
use crate::support::proxy::{Manner, Proxy};
use crate::support::trace;
use crate::support::world::{World, days, lead};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::clock::{Clock, ManualClock, Timestamp};
use lapsed::jobs::deliver::{self, Deliverer, Terms};
use lapsed::jobs::purge::{self, Retention};
use lapsed::jobs::{Rules, expire, remind};
use lapsed::mail::compose::{Composed, Composer};
use lapsed::mail::outcome::{Happened, Phase};
use lapsed::mail::transport::{Memory, Transport};
use lapsed::policy::Policy;
use lapsed::store::jobs::LEASE;
use lapsed::store::{Accounts, Postgres, Result, Store};
use lapsed::token::{MessageId, TokenId};
use mail_parser::MessageParser;
use tempfile::TempDir;
use uuid::Uuid;

/// What the process does that dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// `expire` revives a token, and expires three.
    Expire,
    /// `expire` expires three tokens in two pages: the second is read while the first is written.
    ExpirePages,
    /// `remind` plans a marked token, forgets a lead, and plans three tokens of one deadline in two steps.
    Remind,
    /// `remind` reads all windows again, and finds a row that was written by hand.
    Reconcile,
    /// `deliver` sends a message, and settles a reminder that is no longer true.
    Send,
    /// The mail server wants it later.
    Defer,
    /// The address is dead: the contact is suppressed, and the fallback is told.
    Bounce,
    /// The contact takes no mail any more: the fallback is told.
    Withhold,
    /// The contact's row cannot be read: the message is given up.
    GiveUp,
    /// `purge` removes what is old.
    Purge,
}

impl Act {
    /// What must stand among the statements, or the act is not what it says.
    fn must_meet(self) -> &'static [&'static str] {
        match self {
            Self::Expire => &[
                "INSERT INTO jobs",
                "UPDATE jobs SET lease_until = $4 WHERE",
                "generation = t.generation + 1",
                "status = 'expired', ended_at",
                "INSERT INTO reminders",
                "INSERT INTO messages",
                "COMMIT",
                "UPDATE jobs SET lease_until = $4, finished_at",
            ],
            Self::ExpirePages => {
                &["AND (expires_at, id) > ($1, $2)", "status = 'expired', ended_at", "INSERT INTO messages"]
            }
            Self::Remind => {
                &["t SET unplanned", "DELETE FROM watermarks", "INSERT INTO watermarks", "INSERT INTO reminders"]
            }
            Self::Reconcile => &["DELETE FROM watermarks", "INSERT INTO watermarks", "INSERT INTO reminders"],
            Self::Send => &[
                "SET state = 'sending'",
                "SET message_id",
                "UPDATE messages SET not_before = $5",
                "attempts = m.attempts + ",
                "r SET state = s",
            ],
            Self::Defer => &["attempts = m.attempts + "],
            Self::Bounce => &["UPDATE contacts SET suppressed_at", "INSERT INTO reminders", "INSERT INTO messages"],
            Self::Withhold => &["r SET state = s", "INSERT INTO reminders", "INSERT INTO messages"],
            Self::GiveUp => &["UPDATE messages SET state = 'failed'", "UPDATE reminders SET state = 'failed'"],
            Self::Purge => &["DELETE FROM reminders", "DELETE FROM messages", "DELETE FROM tokens"],
        }
    }

    /// Whether some of its statements run at the same time, in no order.
    fn reads_ahead(self) -> bool {
        self == Self::ExpirePages
    }

    fn delivers(self) -> bool {
        matches!(self, Self::Send | Self::Defer | Self::Bounce | Self::Withhold | Self::GiveUp)
    }

    /// What the mail server says to the message of this act.
    fn answer(self) -> Option<Happened> {
        match self {
            Self::Defer => Some(Happened::refused(Phase::Rcpt, 451, "4.7.1 later")),
            Self::Bounce => Some(Happened::refused(Phase::Rcpt, 550, "5.1.1 no such user")),
            _ => None,
        }
    }
}

const KEEP: Retention =
    Retention { reminders: TimeDelta::days(30), messages: TimeDelta::days(30), ended_tokens: TimeDelta::days(30) };

/// Tells the story up to the moment at which the act begins. Returns the tokens that it is about.
async fn stage<B: Backend>(world: &mut World<B>, act: Act) -> Vec<TokenId> {
    world.fallback("ops@example.org").await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let team = world.owner("team", &["alice@example.org"]).await;
    let bot = world.owner("bot", &[]).await;
    world.rules.policy = Policy::new([lead(7), lead(1)], true, days(7));
    match act {
        Act::Expire => {
            let early = world.token(alice, 60).await;
            world.on_day(61);
            assert_eq!(world.expire().await.tokens, 1);
            world.on_day(0);
            let tokens = [world.token(alice, 10).await, world.token(team, 10).await, world.token(bot, 10).await];
            world.on_day(10);
            world.rules.batch = 10;
            [&[early], &tokens[..]].concat()
        }
        Act::ExpirePages => {
            let tokens = [world.token(alice, 10).await, world.token(team, 10).await, world.token(bot, 10).await];
            world.on_day(10);
            world.rules.batch = 2;
            tokens.to_vec()
        }
        Act::Remind => {
            let mut tokens = Vec::new();
            for owner in [alice, team, bot] {
                tokens.push(world.token(owner, 20).await);
            }
            world.rules.policy = Policy::new([lead(30), lead(7), lead(1)], true, days(7));
            world.remind().await;
            let now = world.on_day(13);
            world.rules.policy = Policy::new([lead(7), lead(1)], true, days(7));
            tokens.push(world.imported(alice, now - days(100), now + days(5)).await);
            world.rules.batch = 2;
            tokens
        }
        Act::Reconcile => {
            let tokens = vec![world.token(alice, 10).await, world.token(team, 60).await];
            world.on_day(4);
            assert_eq!(world.remind().await.pending, 1);
            let by_hand = "UPDATE tokens SET expires_at = (SELECT MIN(expires_at) FROM tokens)";
            world.backend.execute(by_hand).await;
            tokens
        }
        Act::Send | Act::Defer | Act::Bounce | Act::Withhold | Act::GiveUp => {
            let tokens = vec![world.token(alice, 10).await, world.token(alice, 10).await];
            world.on_day(4);
            assert_eq!(world.remind().await.pending, 2);
            let now = world.now();
            world.store.change_token(tokens[1], |token| change::revoke(token, now)).await.expect("allowed");
            let at_alice = |change: &str| format!("UPDATE contacts SET {change} WHERE address = 'alice@example.org'");
            match act {
                Act::Withhold => {
                    world.backend.execute(&at_alice("suppressed_at = created_at, suppressed_why = '550'")).await
                }
                Act::GiveUp => world.backend.execute(&at_alice("time_zone = 'Mars/Olympus'")).await,
                _ => {}
            }
            tokens
        }
        Act::Purge => {
            let tokens = vec![world.token(alice, 10).await, world.token(bot, 300).await];
            world.on_day(10);
            world.remind().await;
            world.expire().await;
            let mut courier = world.courier();
            assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
            world.on_day(100);
            tokens
        }
    }
}

/// A clock on which a minute passes whenever somebody looks at it: so a message's lease must be renewed.
#[derive(Clone)]
struct Creeping(Arc<ManualClock>);

impl Clock for Creeping {
    fn now(&self) -> Timestamp {
        self.0.advance(TimeDelta::minutes(1)) - TimeDelta::minutes(1)
    }
}

/// What the process does that dies: one pass, or the delivery of one message. Returns how many messages it lost sight of.
async fn play<S: Store>(act: Act, store: S, clock: Arc<ManualClock>, rules: Rules, memory: Memory) -> Result<u64> {
    let dying = Uuid::from_u128(2);
    let now = clock.now();
    if act.delivers() {
        if let Some(answer) = act.answer() {
            memory.answer(answer);
        }
        let terms = Terms {
            fallback: rules.fallback,
            give_up_after: days(2),
            // Where there is a rate nothing is claimed ahead, or the order would depend on how fast this machine is just now.
            every: Duration::from_micros(1),
            idle: Duration::MAX,
            groups: Arc::from([]),
            policy: lapsed::policy::Policy::new([], true, TimeDelta::days(7)),
            digest: lapsed::digest::Digest::holding(TimeDelta::zero()),
        };
        let transports = vec![Transport::Memory(memory)];
        let mut deliverer = Deliverer::new(store, Creeping(clock), composer(), transports, terms, dying);
        let mut lost = 0;
        loop {
            let outcome = deliverer.step().await?;
            lost += outcome.did.lost;
            if !outcome.more && !deliverer.wait().await {
                return Ok(lost);
            }
        }
    }
    let job = match act {
        Act::Expire | Act::ExpirePages => expire::NAME,
        Act::Purge => purge::NAME,
        _ => remind::NAME,
    };
    let lease = store.lease(job, dying, now).await?.expect("the lease is free");
    match act {
        Act::Expire | Act::ExpirePages => {
            expire::revive(&store, &lease, &rules, now).await?;
            while expire::step(&store, &lease, &rules, now).await?.more {}
        }
        Act::Purge => {
            purge::step(&store, &lease, KEEP, now).await?;
        }
        _ => {
            if act == Act::Reconcile {
                remind::reconcile(&store, &lease, now).await?;
            }
            while remind::step(&store, &lease, &rules, now).await?.more {}
        }
    }
    store.finish(&lease, now, Ok("done")).await?;
    Ok(0)
}

fn composer() -> Composer {
    let from = "Tokens <tokens@example.org>".parse().expect("a mailbox");
    Composer::new(from, None, Some("https://example.org/t/{token_id}".into())).expect("templates")
}

type Mails = Vec<(MessageId, Composed)>;

/// How a story ended: what must be the same however often somebody died in it.
#[derive(Debug, PartialEq, Eq)]
struct End {
    ledger: Vec<Vec<String>>,
    /// Which tokens each message spoke of, and to whom; a message that arrived twice counts once.
    told: BTreeMap<(String, BTreeSet<TokenId>), usize>,
    /// How many rows there are.
    rows: Vec<i64>,
}

/// Another process goes on where the first has died, until nothing is left to do.
async fn another_goes_on<B: Backend>(world: &World<B>, act: Act, tokens: &[TokenId], before: Mails, at: &str) -> End {
    world.check().await;
    // Each lease ends when its time is up: `World` expects the job's to be free.
    world.clock.advance(LEASE);
    match act {
        Act::Expire | Act::ExpirePages => {
            world.expire().await;
        }
        Act::Remind => {
            world.remind().await;
        }
        Act::Reconcile => {
            world.reconcile().await;
        }
        Act::Purge => {
            let lease = world.lease(purge::NAME).await;
            purge::step(&world.store, &lease, KEEP, world.now()).await.expect("a step");
        }
        _ => {}
    }
    world.clock.advance(deliver::LEASE - LEASE);
    let mut courier = world.courier();
    let undecided = "SELECT COUNT(*) FROM messages m \
         JOIN contacts c ON c.bucket = m.bucket AND c.id = m.contact_id \
         WHERE c.address = 'alice@example.org' AND c.suppressed_at IS NULL AND m.state IN ('open', 'sending')";
    if let Some(answer) = act.answer()
        && world.backend.count(undecided).await > 0
    {
        courier.memory.answer(answer);
    }
    let mut passes = 0;
    loop {
        world.deliver(&mut courier.deliverer).await;
        let left = world.backend.count("SELECT COUNT(*) FROM messages WHERE state = 'sending'").await;
        assert_eq!(left, 0, "a lease outlives its term: {at}");
        passes += 1;
        assert!(passes < 10, "delivery comes to no end: {at}");
        let Some(next) = courier.deliverer.next_due().await.expect("a read") else { break };
        world.clock.set(next);
    }
    let waiting = world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'pending'").await;
    assert_eq!(waiting, 0, "reminders wait for ever: {at}");
    let mut end = End {
        ledger: Vec::new(),
        told: told(&[before, courier.memory.delivered()].concat(), tokens, at),
        rows: Vec::new(),
    };
    for token in tokens {
        let ledger = world.ledger(*token).await;
        // Whether a dead address was found out by this message or known when it was claimed again, the fallback is told.
        end.ledger.push(ledger.iter().map(|line| line.replace("unreachable to alice", "failed to alice")).collect());
    }
    for table in ["tokens", "reminders", "messages", "watermarks"] {
        end.rows.push(world.backend.count(&format!("SELECT COUNT(*) FROM {table}")).await);
    }
    end
}

/// What everybody was told. The message that was in flight may arrive twice, under one id, and says no more than before.
fn told(
    delivered: &[(MessageId, Composed)],
    tokens: &[TokenId],
    at: &str,
) -> BTreeMap<(String, BTreeSet<TokenId>), usize> {
    let mut messages: BTreeMap<MessageId, (String, String, BTreeSet<TokenId>)> = BTreeMap::new();
    let mut repeated = 0;
    for (id, composed) in delivered {
        let mail = MessageParser::default().parse(&composed.bytes).expect("a mail");
        let text = mail.body_text(0).expect("a text part");
        let said: BTreeSet<TokenId> = tokens.iter().filter(|token| text.contains(&short(**token))).copied().collect();
        assert!(!said.is_empty(), "it speaks of something: {text}");
        let header = mail.message_id().expect("a Message-ID").to_owned();
        match messages.get(id) {
            None => {
                messages.insert(*id, (composed.to.to_string(), header, said));
            }
            Some((to, first_header, first_said)) => {
                repeated += 1;
                assert_eq!((&composed.to.to_string(), &header), (to, first_header), "{at}");
                assert!(said.is_subset(first_said), "repeated with new content: {at}");
            }
        }
    }
    assert!(repeated <= 1, "{repeated} messages were repeated, and one was in flight: {at}");
    let mut told = BTreeMap::new();
    for (to, _, said) in messages.into_values() {
        *told.entry((to, said)).or_default() += 1;
    }
    told
}

/// How every mail names a token: the last digits of its id.
fn short(token: TokenId) -> String {
    token.uuid().simple().to_string().split_off(22)
}

/// The tables, each after those that it refers to.
const TABLES: [&str; 9] =
    ["owners", "contacts", "owner_contacts", "tokens", "token_contacts", "reminders", "messages", "jobs", "watermarks"];

/// Keeps what the tables hold, so that each repetition begins with it.
async fn keep<B: Backend>(backend: &B) {
    let copies: String =
        TABLES.iter().map(|table| format!("CREATE TABLE kept_{table} AS SELECT * FROM {table};")).collect();
    backend.execute(&copies).await;
}

async fn restore<B: Backend>(backend: &B) {
    let mut script = String::from("BEGIN;");
    script.extend(TABLES.iter().rev().map(|table| format!("DELETE FROM {table};")));
    script.extend(TABLES.iter().map(|table| format!("INSERT INTO {table} SELECT * FROM kept_{table};")));
    backend.execute(&(script + "COMMIT;")).await;
}

fn assert_is_the_act(act: Act, statements: &[String]) {
    for part in act.must_meet() {
        assert!(statements.iter().any(|sql| sql.contains(part)), "{act:?} has no {part:?}: {statements:#?}");
    }
}

/// Up to the statement at which it died, it did what it did undisturbed.
fn assert_came_the_same_way(act: Act, mut met: Vec<String>, statements: &[String], n: usize) {
    if !act.reads_ahead() {
        assert_eq!(met, statements[..=n], "the same way each time");
        return;
    }
    assert_eq!(met.len(), n + 1, "one after the other is counted");
    for sql in statements {
        if let Some(at) = met.iter().position(|met| met == sql) {
            met.swap_remove(at);
        }
    }
    assert!(met.is_empty(), "not met undisturbed: {met:#?}");
}

/// How long a process whose connection was cut may go on before it is dropped as well: one that has sent a message tries for
/// minutes to record it.
const LAST_BREATH: Duration = Duration::from_millis(20);

async fn on_postgres(act: Act, manner: Manner) {
    let mut world = World::<OnPostgres>::new().await;
    let tokens = stage(&mut world, act).await;
    let begins = world.now();
    keep(&world.backend).await;
    let proxy = Proxy::start(&world.backend.database.url).await;
    let mut mortal = Postgres::open(&proxy.url).await.expect("the store opens");
    if manner == Manner::Dropped {
        world.store = mortal.clone();
    }

    let memory = Memory::new();
    proxy.arm(manner, None);
    play(act, mortal.clone(), world.clock.clone(), world.rules.clone(), memory.clone()).await.expect("undisturbed");
    let statements = proxy.disarm();
    assert_is_the_act(act, &statements);
    let expected = another_goes_on(&world, act, &tokens, memory.delivered(), "undisturbed").await;

    for (n, sql) in statements.iter().enumerate() {
        let at = format!("{act:?}, {manner:?} at statement {n}: {sql}");
        restore(&world.backend).await;
        world.clock.set(begins);
        let memory = Memory::new();
        if manner == Manner::Cut {
            // The process that died took its pool with it.
            proxy.arm(manner, None);
            mortal = Postgres::open(&proxy.url).await.expect("the store opens");
        }
        proxy.arm(manner, Some(n));
        {
            let dying = play(act, mortal.clone(), world.clock.clone(), world.rules.clone(), memory.clone());
            tokio::pin!(dying);
            tokio::select! {
                biased;
                () = proxy.reached() => {}
                done = &mut dying => panic!("ended without it ({done:?}): {at}"),
            }
            if manner != Manner::Dropped
                && let Ok(done) = tokio::time::timeout(LAST_BREATH, &mut dying).await
            {
                let noticed = done.as_ref().map_or_else(|error| error.is_transient(), |lost| *lost == 1);
                assert!(noticed, "{done:?}: {at}");
            }
        }
        assert_came_the_same_way(act, proxy.disarm(), &statements, n);
        if manner == Manner::Dropped {
            proxy.release();
        }
        quiet(&world).await;
        assert_eq!(another_goes_on(&world, act, &tokens, memory.delivered(), &at).await, expected, "{at}");
    }
}

/// Returns when nobody has a transaction open: the server takes a moment to notice that a connection was cut.
async fn quiet(world: &World<OnPostgres>) {
    const OPEN: &str = "SELECT COUNT(*) FROM pg_stat_activity \
         WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'";
    for _ in 0..5_000 {
        if world.backend.count(OPEN).await == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("a transaction of the dead stays open");
}

async fn dropped_on_sqlite(act: Act) {
    trace::prepare();
    let mut world = World::on(OnSqlite::fresh()).await;
    let tokens = stage(&mut world, act).await;
    let begins = world.now();
    keep(&world.backend).await;
    let counter = Arc::new(Counter::default());
    let (release, released) = mpsc::channel();
    let (released, watching) = (Mutex::new(released), Arc::clone(&counter));
    // SQLite's own thread tells, and stands still while the process dies.
    let _watching = trace::watch(&world.backend.file(), move |sql| {
        if watching.meet(sql) {
            watching.tell();
            let _ = released.lock().expect("nobody panics here").recv();
        }
    });
    let playing =
        |memory: &Memory| play(act, world.store.clone(), world.clock.clone(), world.rules.clone(), memory.clone());

    let memory = Memory::new();
    counter.start(None);
    playing(&memory).await.expect("undisturbed");
    let statements = counter.stop();
    assert_is_the_act(act, &statements);
    let expected = another_goes_on(&world, act, &tokens, memory.delivered(), "undisturbed").await;

    for (n, sql) in statements.iter().enumerate() {
        let at = format!("{act:?}, dropped at statement {n}: {sql}");
        restore(&world.backend).await;
        world.clock.set(begins);
        let memory = Memory::new();
        counter.start(Some(n));
        tokio::select! {
            biased;
            () = counter.reached() => {}
            done = playing(&memory) => panic!("ended without it ({done:?}): {at}"),
        }
        assert_came_the_same_way(act, counter.stop(), &statements, n);
        release.send(()).expect("the watcher waits");
        assert_eq!(another_goes_on(&world, act, &tokens, memory.delivered(), &at).await, expected, "{at}");
    }
}

/// What a process leaves that is killed at this moment.
struct Left {
    at: String,
    files: TempDir,
    now: Timestamp,
    delivered: Mails,
}

async fn killed_on_sqlite(act: Act) {
    trace::prepare();
    let mut world = World::on(OnSqlite::fresh()).await;
    let tokens = stage(&mut world, act).await;
    let (counter, memory) = (Arc::new(Counter::default()), Memory::new());
    let left = Arc::new(Mutex::new(Vec::new()));
    let watching = {
        let (file, counter, memory) = (world.backend.file(), Arc::clone(&counter), memory.clone());
        let (left, clock) = (Arc::clone(&left), world.clock.clone());
        trace::watch(&file.clone(), move |sql| {
            if !counts(sql) {
                return;
            }
            counter.meet(sql);
            let at = format!("{act:?}, killed before {sql}");
            let left_now = Left { at, files: copy(&file), now: clock.now(), delivered: memory.delivered() };
            left.lock().expect("nobody panics here").push(left_now);
        })
    };
    counter.start(None);
    play(act, world.store.clone(), world.clock.clone(), world.rules.clone(), memory.clone())
        .await
        .expect("undisturbed");
    let statements = counter.stop();
    drop(watching);
    assert_is_the_act(act, &statements);
    let expected = another_goes_on(&world, act, &tokens, memory.delivered(), "undisturbed").await;

    let left = std::mem::take(&mut *left.lock().expect("nobody panics here"));
    assert_eq!(left.len(), statements.len());
    for Left { at, files, now, delivered } in left {
        let backend = OnSqlite::within(files);
        let store = backend.open().await;
        let world = World {
            backend,
            store,
            clock: Arc::new(ManualClock::at(now)),
            rules: world.rules.clone(),
            process: world.process,
        };
        assert_eq!(another_goes_on(&world, act, &tokens, delivered, &at).await, expected, "{at}");
    }
}

fn copy(file: &Path) -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    for suffix in ["", "-wal"] {
        let name = format!("{}{suffix}", file.file_name().expect("a name").display());
        std::fs::copy(file.with_file_name(&name), directory.path().join(&name)).expect("a copy");
    }
    directory
}

macro_rules! deaths {
    ($($name:ident: $act:ident),+ $(,)?) => {
        mod dropped_on_postgres {
            use super::*;
            $(#[tokio::test] async fn $name() { on_postgres(Act::$act, Manner::Dropped).await; })+
        }
        mod cut_on_postgres {
            use super::*;
            $(#[tokio::test] async fn $name() { on_postgres(Act::$act, Manner::Cut).await; })+
        }
        mod dropped_on_sqlite {
            use super::*;
            $(#[tokio::test] async fn $name() { super::dropped_on_sqlite(Act::$act).await; })+
        }
        mod killed_on_sqlite {
            use super::*;
            $(#[tokio::test] async fn $name() { super::killed_on_sqlite(Act::$act).await; })+
        }
    };
}

deaths!(
    expire: Expire,
    expire_pages: ExpirePages,
    remind: Remind,
    reconcile: Reconcile,
    send: Send,
    defer: Defer,
    bounce: Bounce,
    withhold: Withhold,
    give_up: GiveUp,
    purge: Purge,
);
