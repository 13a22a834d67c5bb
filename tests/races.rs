//! What happens at once: each race has a winner, the loser notices, and what is owed is neither lost nor said twice.
//!
//! Two connections each. On PostgreSQL a transaction of the test holds a row until the others are seen waiting, so each
//! story takes the same course every time; the last one is random. On SQLite, where one transaction writes at a time,
//! two processes are let loose on each other.

use crate::support::proxy::Proxy;
use std::cell::Cell;
use std::collections::HashSet;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::postgres::Database;
use crate::support::world::{World, at, dawn, days, lead, new_token, sent, tokens};
use chrono::TimeDelta;
use futures_util::FutureExt;
use lapsed::change::{self, Edit, Refused};
use lapsed::clock::Timestamp;
use lapsed::jobs::{expire, remind};
use lapsed::store::accounts::ReminderState;
use lapsed::store::outbox::{ClaimedMessage, Delivery, Record, Settled};
use lapsed::store::planning::NewReminder;
use lapsed::store::{Accounts, Error, Outbox, Postgres, Recipients, Store};
use lapsed::token::{Address, Bucket, Kind, Owner, OwnerId, Status, TokenId};
use rand::RngExt;
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::time::timeout;
use uuid::Uuid;

macro_rules! stories {
    ($name:ident on $backend:ident: $($story:ident),+ $(,)?) => {
        mod $name {
            $(#[tokio::test] async fn $story() { super::$story::<super::$backend>().await; })+
        }
    };
}

stories!(sqlite on OnSqlite:
    two_claimers_share_what_is_due,
    a_lost_lease_on_a_message,
    two_rotations_of_one_token,
    an_owner_has_one_primary,
    one_key_for_two_owners,
    whatever_happens_at_once,
);
stories!(postgres on OnPostgres:
    a_claim_leaves_what_a_planner_holds,
    a_planner_that_waits_for_a_claim_opens_another_message,
    what_is_written_within_a_claim_is_attached,
    two_that_open_a_message_for_one_contact,
    contacts_are_written_in_one_order,
    an_edit_comes_before_expire,
    expire_comes_before_an_edit,
    a_claim_waits_for_no_other,
    rotations_that_wait_for_each_other,
    two_claimers_share_what_is_due,
    a_lost_lease_on_a_message,
    two_rotations_of_one_token,
    an_owner_has_one_primary,
    one_key_for_two_owners,
    whatever_happens_at_once,
);
stories!(partitioned on OnPartitions:
    a_claim_leaves_what_a_planner_holds,
    a_planner_that_waits_for_a_claim_opens_another_message,
    what_is_written_within_a_claim_is_attached,
    two_that_open_a_message_for_one_contact,
    contacts_are_written_in_one_order,
    an_edit_comes_before_expire,
    expire_comes_before_an_edit,
    a_claim_waits_for_no_other,
    rotations_that_wait_for_each_other,
    two_claimers_share_what_is_due,
    a_lost_lease_on_a_message,
    two_rotations_of_one_token,
    an_owner_has_one_primary,
    one_key_for_two_owners,
    whatever_happens_at_once,
);

/// The stories tell the program from one with another statement in it. Each of these two rules of the outbox looks as if
/// it could be simpler.
mod mutated {
    use super::*;

    #[tokio::test]
    async fn a_message_that_is_opened_without_a_lock() {
        fails::<DoNothing>(a_claim_leaves_what_a_planner_holds::<Mutated<DoNothing>>()).await;
    }

    #[tokio::test]
    async fn a_claim_that_attaches_in_one_statement() {
        fails::<AttachAtOnce>(a_planner_is_done_while_a_claim_looks::<Mutated<AttachAtOnce>>()).await;
    }

    /// The pause that this story needs is not what it fails by.
    #[tokio::test]
    async fn a_claim_that_takes_its_time() {
        a_planner_is_done_while_a_claim_looks::<Mutated<Pause>>().await;
        assert!(Pause::changed().load(Ordering::Relaxed), "no statement was another");
    }

    /// The claim has begun, and looks for messages only when the planner has committed.
    async fn a_planner_is_done_while_a_claim_looks<B: Server>() {
        let world = World::<B>::new().await;
        let (told, to_plan) = one_told_and_one_to_plan(&world).await;
        let other = world.backend.open().await;
        let now = world.now();
        let held = hold(&world, &format!("SELECT pg_advisory_xact_lock({PAUSE})")).await;
        let (claimed, planned) = tokio::join!(claim(&other, 2, now, 10), async {
            waiting(&world, 1).await;
            let lease = world.lease(remind::NAME).await;
            let planned = remind::step(&world.store, &lease, &world.rules, now).await;
            held.let_go().await;
            planned
        });
        assert_eq!(planned.expect("a step").did.pending, 1);
        world.check().await;
        assert!(carry(&claimed, &[told, to_plan]), "{claimed:?}");
    }

    /// The story ends with what it is there to show.
    async fn fails<M: Mutation>(story: impl Future<Output = ()>) {
        let panic = AssertUnwindSafe(story).catch_unwind().await.expect_err("the story is not told apart");
        let why = panic.downcast_ref::<String>().expect("a failed assertion");
        assert!(why.contains("pending reminders that no message will carry"), "{why}");
        assert!(M::changed().load(Ordering::Relaxed), "no statement was another");
    }

    trait Mutation: 'static {
        fn rewrite(sql: &str) -> String;

        /// Whether a statement was rewritten.
        fn changed() -> &'static AtomicBool;
    }

    /// Does not lock the message that is open already.
    struct DoNothing;

    impl Mutation for DoNothing {
        fn rewrite(sql: &str) -> String {
            match sql.split_once("DO UPDATE SET not_before = LEAST(") {
                Some((insert, _)) => format!("{insert}DO NOTHING"),
                None => sql.to_owned(),
            }
        }

        fn changed() -> &'static AtomicBool {
            static CHANGED: AtomicBool = AtomicBool::new(false);
            &CHANGED
        }
    }

    /// The number of the lock that a claim waits for between its beginning and its look at the messages.
    const PAUSE: i64 = 4;

    /// The claim as it is, but for that wait.
    struct Pause;

    impl Mutation for Pause {
        fn rewrite(sql: &str) -> String {
            let Some(claim) = sql.strip_prefix("WITH claimed AS (") else { return sql.to_owned() };
            let looks = "SELECT id FROM messages WHERE bucket = $1";
            let claim = claim.replace(looks, &format!("{looks} AND (SELECT COUNT(*) FROM pause) = 1"));
            format!("WITH pause AS MATERIALIZED (SELECT pg_advisory_xact_lock({PAUSE})), claimed AS ({claim}")
        }

        fn changed() -> &'static AtomicBool {
            static CHANGED: AtomicBool = AtomicBool::new(false);
            &CHANGED
        }
    }

    /// Attaches with the snapshot of the statement that claims.
    struct AttachAtOnce;

    impl Mutation for AttachAtOnce {
        fn rewrite(sql: &str) -> String {
            if sql.starts_with("UPDATE reminders r SET message_id") {
                let (_, columns) = sql.split_once("RETURNING").expect("what was attached");
                return format!(
                    "SELECT {columns} FROM reminders r \
                     WHERE r.bucket = $1 AND r.message_id = ANY($2) AND r.contact_id = ANY($3)"
                );
            }
            match Pause::rewrite(sql).split_once(") SELECT m.id") {
                Some((claim, rest)) => format!(
                    "{claim}), \
                     attached AS ( \
                         UPDATE reminders r SET message_id = c.id \
                         FROM claimed c \
                         WHERE r.bucket = $1 AND r.contact_id = c.contact_id AND c.lease_epoch = 1 \
                           AND r.state = 'pending' AND r.message_id IS NULL \
                     ) \
                     SELECT m.id{rest}"
                ),
                None => sql.to_owned(),
            }
        }

        fn changed() -> &'static AtomicBool {
            static CHANGED: AtomicBool = AtomicBool::new(false);
            &CHANGED
        }
    }

    /// PostgreSQL as a mutated program speaks to it.
    struct Mutated<M> {
        plain: OnPostgres,
        proxy: Proxy,
        mutation: PhantomData<M>,
    }

    impl<M: Mutation> Backend for Mutated<M> {
        type Store = Postgres;

        async fn make() -> Self {
            let plain = OnPostgres::make().await;
            let rewrite = |sql: &str| {
                let rewritten = M::rewrite(sql);
                M::changed().fetch_or(rewritten != sql, Ordering::Relaxed);
                rewritten
            };
            let proxy = Proxy::rewriting(&plain.database.url, rewrite).await;
            Self { plain, proxy, mutation: PhantomData }
        }

        async fn open(&self) -> Postgres {
            Postgres::open(&self.proxy.url).await.expect("the store opens")
        }

        async fn count(&self, sql: &str) -> i64 {
            self.plain.count(sql).await
        }

        async fn message(&self) -> (Uuid, String) {
            self.plain.message().await
        }

        async fn execute(&self, sql: &str) {
            self.plain.execute(sql).await;
        }
    }

    impl<M: Mutation> Server for Mutated<M> {
        fn database(&self) -> &Database {
            &self.plain.database
        }
    }
}

/// A back end whose rows a transaction of the test can hold.
trait Server: Backend {
    fn database(&self) -> &Database;
}

impl Server for OnPostgres {
    fn database(&self) -> &Database {
        &self.database
    }
}

impl Server for OnPartitions {
    fn database(&self) -> &Database {
        &self.0.database
    }
}

/// A transaction that keeps what it locked until it is let go.
struct Held(PgConnection);

async fn hold<B: Server>(world: &World<B>, sql: &str) -> Held {
    let mut held = Held(world.backend.database().connect().await);
    held.run("BEGIN").await;
    held.run(sql).await;
    held
}

impl Held {
    async fn run(&mut self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.0).await.expect(sql);
    }

    async fn let_go(mut self) {
        self.run("COMMIT").await;
    }
}

/// Returns when so many sessions wait for a lock.
async fn waiting<B: Server>(world: &World<B>, sessions: i64) {
    let database = world.backend.database();
    let mut admin = database.admin().await;
    for _ in 0..1_000 {
        let count: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock'")
                .bind(&database.name)
                .fetch_one(&mut admin)
                .await
                .expect("a read");
        if count >= sessions {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{sessions} sessions never came to wait for a lock");
}

const ADDRESS: &str = "alice@example.org";

/// An owner with one reminder in an open message, and a token that is still to be planned.
async fn one_told_and_one_to_plan<B: Backend>(world: &World<B>) -> (TokenId, TokenId) {
    let alice = world.owner("alice", &[ADDRESS]).await;
    let told = world.imported(alice, dawn() - days(100), dawn() + days(20)).await;
    assert_eq!(world.remind().await.pending, 1);
    let to_plan = world.imported(alice, dawn() - days(100), dawn() + days(21)).await;
    (told, to_plan)
}

async fn claim<S: Store>(store: &S, holder: u128, now: Timestamp, limit: u32) -> Vec<ClaimedMessage> {
    let bucket = [at(ADDRESS).bucket()];
    let claim = store.claim(&bucket, Uuid::from_u128(holder), now, now + TimeDelta::minutes(5), limit);
    timeout(Duration::from_secs(5), claim).await.expect("a claim waits for nobody").expect("a claim")
}

/// Whether messages carry one reminder of each of these tokens, and no others.
fn carry(messages: &[ClaimedMessage], tokens: &[TokenId]) -> bool {
    let mut carried: Vec<TokenId> =
        messages.iter().flat_map(|message| &message.reminders).map(|reminder| reminder.token).collect();
    let mut tokens = tokens.to_vec();
    carried.sort_unstable();
    tokens.sort_unstable();
    carried == tokens
}

async fn a_claim_leaves_what_a_planner_holds<B: Server>() {
    let world = World::<B>::new().await;
    let (told, to_plan) = one_told_and_one_to_plan(&world).await;
    let other = world.backend.open().await;
    let now = world.now();
    // The planner has opened the message, and waits before its commit: taking the mark off is what it does last.
    let held = hold(&world, &format!("SELECT 1 FROM tokens WHERE id = '{to_plan}' FOR UPDATE")).await;
    let lease = world.lease(remind::NAME).await;
    let (planned, claimed) = tokio::join!(remind::step(&world.store, &lease, &world.rules, now), async {
        waiting(&world, 1).await;
        let claimed = claim(&other, 2, now, 10).await;
        world.check().await;
        held.let_go().await;
        claimed
    });
    assert_eq!(planned.expect("a step").did.pending, 1);
    world.check().await;
    assert!(claimed.is_empty(), "the message is the planner's until its commit");
    let claimed = claim(&other, 2, now, 10).await;
    assert!(claimed.len() == 1 && carry(&claimed, &[told, to_plan]), "one digest: {claimed:?}");
    world.check().await;
}

async fn a_planner_that_waits_for_a_claim_opens_another_message<B: Server>() {
    let world = World::<B>::new().await;
    let (told, to_plan) = one_told_and_one_to_plan(&world).await;
    let other = world.backend.open().await;
    let now = world.now();
    // The claim has taken the message, and waits for the reminder that it attaches.
    let held = hold(&world, &format!("SELECT 1 FROM reminders WHERE token_id = '{told}' FOR UPDATE")).await;
    let lease = world.lease(remind::NAME).await;
    let (claimed, planned, ()) = tokio::join!(
        claim(&other, 2, now, 10),
        async {
            waiting(&world, 1).await;
            remind::step(&world.store, &lease, &world.rules, now).await
        },
        async {
            waiting(&world, 2).await;
            held.let_go().await;
        }
    );
    assert_eq!(planned.expect("a step").did.pending, 1);
    world.check().await;
    assert!(carry(&claimed, &[told]), "{claimed:?}");
    let claimed = claim(&other, 2, now, 10).await;
    assert!(carry(&claimed, &[to_plan]), "{claimed:?}");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM messages").await, 2);
}

async fn what_is_written_within_a_claim_is_attached<B: Server>() {
    let world = World::<B>::new().await;
    let (told, to_plan) = one_told_and_one_to_plan(&world).await;
    let other = world.backend.open().await;
    let now = world.now();
    // Between the two statements of the claim, a reminder for the contact is committed.
    let mut held = hold(&world, "LOCK TABLE reminders IN SHARE ROW EXCLUSIVE MODE").await;
    let (claimed, ()) = tokio::join!(claim(&other, 2, now, 10), async {
        waiting(&world, 1).await;
        held.run(&format!(
            "INSERT INTO reminders \
                 (bucket, token_id, generation, lead, contact_id, deadline, state, escalation, created_at) \
             SELECT bucket, '{to_plan}', generation, lead, contact_id, deadline, state, escalation, created_at \
             FROM reminders WHERE token_id = '{told}'"
        ))
        .await;
        held.let_go().await;
    });
    world.check().await;
    assert!(carry(&claimed, &[told, to_plan]), "{claimed:?}");
}

async fn two_that_open_a_message_for_one_contact<B: Server>() {
    let mut world = World::<B>::new().await;
    let fallback = world.fallback("ops@example.org").await;
    let (told, _) = one_told_and_one_to_plan(&world).await;
    let other = world.backend.open().await;
    let now = world.now();
    let bot = world.owner("bot", &[]).await;
    let silent = world.imported(bot, dawn() - days(100), dawn() + days(22)).await;
    let claimed = claim(&other, 2, now, 1).await;
    // The planner has opened a message for the fallback and waits; a record that escalates wants to open one too.
    let held = hold(&world, &format!("SELECT 1 FROM tokens WHERE id = '{silent}' FOR UPDATE")).await;
    let lease = world.lease(remind::NAME).await;
    let escalation = escalation(told, fallback, now);
    let dead = Record { delivery: Delivery::Failed("550".into()), escalations: vec![escalation], ..sent(&claimed[0]) };
    let (planned, recorded, ()) = tokio::join!(
        remind::step(&world.store, &lease, &world.rules, now),
        async {
            waiting(&world, 1).await;
            other.record(&[(&claimed[0], &dead)], now).await
        },
        async {
            waiting(&world, 2).await;
            held.let_go().await;
        }
    );
    assert_eq!(recorded.expect("a record"), [true]);
    assert_eq!(planned.expect("a step").did.pending, 2);
    world.check().await;
    let open = format!("SELECT COUNT(*) FROM messages WHERE state = 'open' AND contact_id = '{fallback}'");
    assert_eq!(world.backend.count(&open).await, 1);
}

fn escalation(token: TokenId, to: lapsed::token::ContactId, now: Timestamp) -> NewReminder {
    NewReminder {
        token,
        generation: 0,
        lead: lead(30),
        contact: Some(to),
        expires_at: now + days(20),
        state: ReminderState::Pending,
        reason: None,
        escalation: true,
        not_before: None,
    }
}

async fn an_edit_comes_before_expire<B: Server>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &[ADDRESS]).await;
    let token = world.token(alice, 1).await;
    let now = world.on_day(1);
    let edit = format!(
        "UPDATE tokens SET expires_at = expires_at + INTERVAL '30 days', generation = generation + 1 WHERE id = '{token}'"
    );
    let held = hold(&world, &edit).await;
    let lease = world.lease(expire::NAME).await;
    let (expired, ()) = tokio::join!(expire::step(&world.store, &lease, &world.rules, now), async {
        waiting(&world, 1).await;
        held.let_go().await;
    });
    let did = expired.expect("a step").did;
    assert_eq!((did.tokens, did.pending), (0, 0));
    assert_eq!(world.get(token).await.status, Status::Active);
    assert!(world.ledger(token).await.is_empty());
}

async fn expire_comes_before_an_edit<B: Server>() {
    let world = World::<B>::new().await;
    let (_, _) = one_told_and_one_to_plan(&world).await;
    let other = world.backend.open().await;
    let alice = world.get(claimable(&world).await).await.owner;
    let token = world.token(alice, 1).await;
    let now = world.on_day(1);
    // `expire` has marked the token, and waits for the message that its notice goes to.
    let held = hold(&world, "SELECT 1 FROM messages WHERE state = 'open' FOR UPDATE").await;
    let lease = world.lease(expire::NAME).await;
    let edit = Edit { expires_at: Some(Some(now + days(30))), ..Edit::default() };
    let a_second_early = now - TimeDelta::seconds(1);
    let (expired, edited, ()) = tokio::join!(
        expire::step(&world.store, &lease, &world.rules, now),
        async {
            waiting(&world, 1).await;
            other.change_token(token, |token| change::edit(token, &edit, a_second_early)).await
        },
        async {
            waiting(&world, 2).await;
            held.let_go().await;
        }
    );
    assert_eq!(expired.expect("a step").did.tokens, 1);
    assert!(matches!(edited, Err(Error::Refused(Refused::Expired { .. }))), "{edited:?}");
    assert_eq!(world.get(token).await.status, Status::Expired);
    world.check().await;
}

/// The token of a reminder that waits.
async fn claimable<B: Backend>(world: &World<B>) -> TokenId {
    tokens(&world.store, None).await.first().expect("a token").id
}

/// Owners whose contacts share the bucket of [`ADDRESS`], each with a reminder in an open message.
async fn many_open_messages<B: Backend>(world: &World<B>, count: usize) {
    let bucket = at(ADDRESS).bucket();
    let addresses = (0..).map(|i| format!("contact-{i}@example.org"));
    for address in addresses.filter(|address| Address::parse(address).expect("one").bucket() == bucket).take(count) {
        let owner = world.owner(&address, &[&address]).await;
        world.imported(owner, dawn() - days(100), dawn() + days(20)).await;
    }
    assert_eq!(world.remind().await.pending, count as u64);
}

async fn a_claim_waits_for_no_other<B: Server>() {
    let world = World::<B>::new().await;
    many_open_messages(&world, 5).await;
    let now = world.now();
    let held = hold(&world, "SELECT 1 FROM messages ORDER BY id LIMIT 2 FOR UPDATE").await;
    let claimed = claim(&world.store, 1, now, 10).await;
    assert_eq!(claimed.len(), 3, "all that another does not hold");
    held.let_go().await;
    assert_eq!(claim(&world.store, 1, now, 10).await.len(), 2);
    world.check().await;
}

/// Delivery remembers that contacts were sent mail, and a command that links the same contacts goes by their addresses: so does
/// delivery, whatever their ids, or each would wait for what the other has.
async fn contacts_are_written_in_one_order<B: Server>() {
    let world = World::<B>::new().await;
    let bucket = at(ADDRESS).bucket();
    let addresses = (0..).map(|i| at(&format!("contact-{i}@example.org")));
    let mut addresses: Vec<Address> = addresses.filter(|address| address.bucket() == bucket).take(2).collect();
    addresses.sort();
    // The one that comes first is made last.
    let mut ids = Vec::new();
    for address in addresses.iter().rev() {
        world.clock.advance(TimeDelta::seconds(1));
        ids.push(world.store.make_contact(&address.clone().into(), world.now()).await.expect("a write"));
    }
    assert!(ids.is_sorted());
    let first = format!("SELECT 1 FROM contacts WHERE address = '{}' FOR UPDATE", addresses[0]);
    let other = world.backend.open().await;
    for with_interval in [false, true] {
        let held = hold(&world, &first).await;
        let now = world.now();
        let (marked, ()) = tokio::join!(
            async {
                if with_interval {
                    other.mailed_before(&ids, now - TimeDelta::days(1), now).await.map(|_| ())
                } else {
                    other.mailed(&ids, now).await
                }
            },
            async {
                waiting(&world, 1).await;
                // The second is free for as long as the first is waited for.
                let second = addresses[1].clone().into();
                let linked = world.store.make_contact(&second, now);
                timeout(Duration::from_secs(8), linked).await.expect("nobody has it").expect("a write");
                held.let_go().await;
            }
        );
        marked.expect("a write");
    }
}

async fn two_claimers_share_what_is_due<B: Backend>() {
    let world = World::<B>::new().await;
    many_open_messages(&world, 24).await;
    let other = world.backend.open().await;
    let now = world.now();
    let claims = async |store: &B::Store, holder| {
        let mut claimed = Vec::new();
        for _ in 0..24 {
            claimed.extend(claim(store, holder, now, 2).await);
        }
        claimed
    };
    let (one, two) = tokio::join!(claims(&world.store, 1), claims(&other, 2));
    let ids: HashSet<_> = one.iter().chain(&two).map(|message| message.id).collect();
    assert_eq!((one.len() + two.len(), ids.len()), (24, 24), "each message once");
    assert!(one.iter().chain(&two).all(|message| message.reminders.len() == 1));
    world.check().await;
    let (one_recorded, two_recorded) = tokio::join!(record_all(&world.store, &one, now), record_all(&other, &two, now));
    assert_eq!(one_recorded + two_recorded, 24);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'sent'").await, 24);
}

async fn record_all<S: Store>(store: &S, messages: &[ClaimedMessage], now: Timestamp) -> usize {
    let mut recorded = 0;
    for message in messages {
        recorded += usize::from(store.record(&[(message, &sent(message))], now).await.expect("a record")[0]);
    }
    recorded
}

async fn a_lost_lease_on_a_message<B: Backend>() {
    for by in [1, 2] {
        let mut world = World::<B>::new().await;
        let fallback = world.fallback("ops@example.org").await;
        let (told, _) = one_told_and_one_to_plan(&world).await;
        let other = world.backend.open().await;
        let stalled = claim(&world.store, 1, world.now(), 1).await;
        assert!(claim(&other, by, world.now(), 1).await.is_empty(), "the lease holds");
        // Five minutes later it does not: this process or another takes over.
        let now = world.clock.advance(TimeDelta::minutes(5));
        let taken = claim(&other, by, now, 1).await;
        assert_eq!((taken[0].id, taken[0].epoch), (stalled[0].id, stalled[0].epoch + 1));
        assert!(carry(&taken, &[told]), "{taken:?}");

        let before = (world.store.message_counts().await.expect("a read"), world.ledger(told).await);
        let record = Record {
            delivery: Delivery::Failed("550 unknown".into()),
            escalations: vec![escalation(told, fallback, now)],
            ..sent(&stalled[0])
        };
        world.store.suppress(&stalled[0], "550 unknown", now).await.expect("an answer");
        assert!(!world.store.record(&[(&stalled[0], &record)], now).await.expect("an answer")[0], "taken by {by}");
        assert!(!world.store.renew(&stalled[0], now + days(1)).await.expect("an answer"), "taken by {by}");
        assert_eq!((world.store.message_counts().await.expect("a read"), world.ledger(told).await), before);
        assert_eq!(world.backend.count("SELECT COUNT(*) FROM contacts WHERE suppressed_at IS NOT NULL").await, 0);
        world.check().await;

        assert!(other.renew(&taken[0], now + TimeDelta::minutes(9)).await.expect("an answer"));
        assert!(other.record(&[(&taken[0], &sent(&taken[0]))], now).await.expect("an answer")[0]);
        assert!(!other.record(&[(&taken[0], &sent(&taken[0]))], now).await.expect("an answer")[0], "once");
        assert_eq!(world.ledger(told).await, [format!("0: 30d sent to {ADDRESS}")]);
    }
}

async fn two_rotations_of_one_token<B: Backend>() {
    let world = World::<B>::new().await;
    let owner = owner_with_primary(&world).await;
    let primary = claimable(&world).await;
    let other = world.backend.open().await;
    let now = world.now();
    let (one, two) = tokio::join!(
        world.store.change_token(primary, |token| change::rotate(token, days(1), None, now)),
        other.change_token(primary, |token| change::rotate(token, days(1), None, now)),
    );
    one_wins(&world, owner, [one, two]).await;
}

async fn rotations_that_wait_for_each_other<B: Server>() {
    let world = World::<B>::new().await;
    let owner = owner_with_primary(&world).await;
    let primary = claimable(&world).await;
    let other = world.backend.open().await;
    let now = world.now();
    let held = hold(&world, &format!("SELECT 1 FROM tokens WHERE id = '{primary}' FOR UPDATE")).await;
    let (one, two, ()) = tokio::join!(
        world.store.change_token(primary, |token| change::rotate(token, days(1), None, now)),
        other.change_token(primary, |token| change::rotate(token, days(1), None, now)),
        async {
            waiting(&world, 2).await;
            held.let_go().await;
        }
    );
    one_wins(&world, owner, [one, two]).await;
}

async fn one_wins<B: Backend>(world: &World<B>, owner: OwnerId, outcomes: [lapsed::store::Result<change::Changed>; 2]) {
    let won: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
    let lost: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert_eq!((won.len(), lost.len()), (1, 1), "{outcomes:?}");
    let successor = won[0].successor.as_ref().expect("a successor").0.id;
    assert!(matches!(lost[0], Error::Refused(Refused::Replaced { by, .. }) if *by == successor), "{lost:?}");
    let tokens = tokens(&world.store, Some(owner)).await;
    assert_eq!(tokens.len(), 2, "one successor");
    let current: Vec<_> = tokens.iter().filter(|token| token.replaced_by.is_none()).collect();
    assert_eq!((current.len(), current[0].id), (1, successor));
}

fn owner_of(key: &str) -> Owner {
    Owner {
        id: OwnerId::new(Bucket::of(key), dawn()),
        key: key.into(),
        name: key.into(),
        time_zone: chrono_tz::UTC,
        locale: "en".into(),
    }
}

async fn owner_with_primary<B: Backend>(world: &World<B>) -> OwnerId {
    let owner = owner_of("alice");
    let (mut token, secret) = new_token(owner.id, dawn(), Some(dawn() + days(90)), dawn());
    token.kind = Kind::Primary;
    world.store.add_owner(&owner, &[], Some((&token, &secret.hash())), dawn()).await.expect("a new owner");
    owner.id
}

async fn an_owner_has_one_primary<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &[ADDRESS]).await;
    let other = world.backend.open().await;
    let primary = || {
        let (mut token, secret) = new_token(alice, dawn(), None, dawn());
        token.kind = Kind::Primary;
        (token, secret.hash())
    };
    let (one, two) = (primary(), primary());
    let outcomes = tokio::join!(world.store.add_token(&one.0, Some(&one.1)), other.add_token(&two.0, Some(&two.1)));
    let exists = |outcome: &lapsed::store::Result<()>| matches!(outcome, Err(Error::Exists { .. }));
    assert!((outcomes.0.is_ok() && exists(&outcomes.1)) || (exists(&outcomes.0) && outcomes.1.is_ok()), "{outcomes:?}");
    let primaries = "SELECT COUNT(*) FROM tokens WHERE kind = 'primary'";
    assert_eq!(world.backend.count(primaries).await, 1);
    // A rotation in between does not let a second one in.
    let third = primary();
    let current = claimable(&world).await;
    world.store.change_token(current, |token| change::rotate(token, days(1), None, dawn())).await.expect("a rotation");
    assert!(exists(&other.add_token(&third.0, Some(&third.1)).await));
}

async fn one_key_for_two_owners<B: Backend>() {
    let world = World::<B>::new().await;
    let other = world.backend.open().await;
    let contacts = [at(ADDRESS).into()];
    let (one, two) = (owner_of("alice"), owner_of("alice"));
    let outcomes = tokio::join!(
        world.store.add_owner(&one, &contacts, None, dawn()),
        other.add_owner(&two, &contacts, None, dawn())
    );
    assert!(outcomes.0.is_ok() != outcomes.1.is_ok(), "{outcomes:?}");
    let refused = outcomes.0.and(outcomes.1);
    assert!(matches!(refused, Err(Error::Exists { what: "owner", .. })), "{refused:?}");
    // Two owners with one contact, at once.
    let (bob, carol) = (owner_of("bob"), owner_of("carol"));
    let outcomes = tokio::join!(
        world.store.add_owner(&bob, &contacts, None, dawn()),
        other.add_owner(&carol, &contacts, None, dawn())
    );
    assert!(outcomes.0.is_ok() && outcomes.1.is_ok(), "{outcomes:?}");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM contacts").await, 1);
}

/// A planner, two that claim and record every kind of outcome while it plans, and one that checks, on a few contacts.
async fn whatever_happens_at_once<B: Backend>() {
    let mut world = World::<B>::new().await;
    let fallback = world.fallback("ops@example.org").await;
    let owners = [
        world.owner("alice", &[ADDRESS, "team@example.org"]).await,
        world.owner("bob", &["bob@example.org", "team@example.org"]).await,
        world.owner("bot", &[]).await,
    ];
    let buckets: HashSet<Bucket> =
        [ADDRESS, "team@example.org", "bob@example.org", "ops@example.org"].map(|a| at(a).bucket()).into();
    let others = [world.backend.open().await, world.backend.open().await];
    for round in 0..20 {
        let now = world.clock.advance(TimeDelta::minutes(1));
        let planned = Cell::new(false);
        let planning = async {
            for n in 0..6 {
                world.imported(owners[n % 3], dawn() - days(100), now + days(20)).await;
                let lease = world.lease(remind::NAME).await;
                while remind::step(&world.store, &lease, &world.rules, now).await.expect("a step").more {}
            }
            planned.set(true);
        };
        let delivering = async |store: &B::Store, holder: u128| {
            while !planned.get() {
                for bucket in &buckets {
                    let until = now + TimeDelta::minutes(if rand::random() { 5 } else { 1 });
                    let claimed = store.claim(&[*bucket], Uuid::from_u128(holder), now, until, 2).await;
                    for message in claimed.expect("a claim") {
                        if let Some(record) = any_outcome(&message, fallback, now) {
                            store.record(&[(&message, &record)], now).await.expect("a record");
                        }
                    }
                }
            }
        };
        // The invariant is one statement, so each check sees one commit.
        let checking = async {
            while !planned.get() {
                world.check().await;
            }
        };
        let all = async { tokio::join!(planning, delivering(&others[0], 2), delivering(&others[1], 3), checking) };
        timeout(Duration::from_secs(60), all).await.unwrap_or_else(|_| panic!("round {round} does not end"));
        world.check().await;
    }
    // Whatever was going on when the processes stopped, one that comes later says all that is left.
    // A day later, so that the digest of escalations is due.
    let later = world.clock.advance(days(2));
    for bucket in &buckets {
        loop {
            let claimed = world.store.claim(&[*bucket], Uuid::from_u128(4), later, later + days(1), 100).await;
            let claimed = claimed.expect("a claim");
            if claimed.is_empty() {
                break;
            }
            assert_eq!(record_all(&world.store, &claimed, later).await, claimed.len());
        }
    }
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'pending'").await, 0);
    let unfinished = "SELECT COUNT(*) FROM messages WHERE state NOT IN ('sent', 'failed')";
    assert_eq!(world.backend.count(unfinished).await, 0);
}

/// What may become of a message; `None`: the process died, and the lease ends by itself.
fn any_outcome(message: &ClaimedMessage, fallback: lapsed::token::ContactId, now: Timestamp) -> Option<Record> {
    match rand::rng().random_range(0..6) {
        0 => None,
        1 | 2 => {
            let at = now + TimeDelta::seconds(rand::rng().random_range(0..90));
            let delivery = Delivery::Retry { at, reply: "451 later".into(), counts: true, unknown: false };
            Some(Record { delivery, settled: Vec::new(), ..sent(message) })
        }
        3 => {
            let fail = |settled: Settled| Settled { state: ReminderState::Failed, ..settled };
            let record = sent(message);
            let escalations = message.reminders.iter().filter(|reminder| !reminder.escalation);
            Some(Record {
                delivery: Delivery::Failed("550 no".into()),
                settled: record.settled.into_iter().map(fail).collect(),
                escalations: escalations.map(|reminder| escalation(reminder.token, fallback, now)).collect(),
            })
        }
        _ => Some(sent(message)),
    }
}

/// Several processes that start on an empty store: all find it ready.
async fn several_start_at_once<B: Backend>(backend: &B) {
    let starts = async { tokio::join!(backend.open(), backend.open(), backend.open(), backend.open(), backend.open()) };
    let stores = timeout(Duration::from_secs(60), starts).await.expect("none waits for ever");
    for store in [stores.0, stores.1, stores.2, stores.3, stores.4] {
        assert!(tokens(&store, None).await.is_empty());
        store.set_fallback(Some(&at("ops@example.org")), dawn()).await.expect("a write");
        store.close().await;
    }
    assert_eq!(backend.count("SELECT COUNT(*) FROM contacts").await, 1);
}

#[tokio::test]
async fn several_start_at_once_on_sqlite() {
    several_start_at_once(&OnSqlite::make().await).await;
}

#[tokio::test]
async fn several_start_at_once_on_postgres() {
    several_start_at_once(&OnPostgres::make().await).await;
}
