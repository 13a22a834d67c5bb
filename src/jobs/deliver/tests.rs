//! What a killed process would send again, while the mail server is fast and the store cannot be written; and that delivery does
//! not wait for itself.
//!
//! How far ahead messages are claimed follows the mail server, and depends on the machine: here it is as much as there can be.

use chrono::{DateTime, Days};
use sqlx::{Connection, SqliteConnection};

use super::*;
use crate::change;
use crate::clock::ManualClock;
use crate::config::Limit;
use crate::jobs::guard::Guard;
use crate::jobs::{Rules, remind};
use crate::mail::outcome::Phase;
use crate::mail::transport::Memory;
use crate::policy::Lead;
use crate::store::accounts::NewContact;
use crate::store::{Accounts, Jobs, Outbox, Sqlite};
use crate::token::{Address, Kind, Owner, OwnerId, Token};

/// More than a process may claim.
const MESSAGES: usize = 3 * ahead::MOST;

const SESSIONS: usize = 4;

/// How long a test waits for what is to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// And for what must not happen, when all that could bring it about has.
const LISTENS: Duration = Duration::from_millis(500);

const CLAIMED: &str = "SELECT COUNT(*) FROM messages WHERE state = 'sending'";
const SUPPRESSED: &str = "SELECT COUNT(*) FROM contacts WHERE suppressed_at IS NOT NULL";
const SENT: &str = "SELECT COUNT(*) FROM messages WHERE state = 'sent'";

fn rules() -> Rules {
    Rules {
        policy: Policy::new([Lead::new(TimeDelta::days(30))], true, TimeDelta::days(7)),
        groups: Arc::from([]),
        fallback: None,
        digest: Digest::holding(TimeDelta::zero()),
        skip_unused: false,
        batch: 1_000,
        guard: Guard::new(Limit::None, Limit::None),
    }
}

/// A token of so many contacts, each with a message that is due, all in one bucket: one claim brings as many as there is
/// room for.
async fn due(url: &str, clock: &ManualClock) -> Sqlite {
    let store = Sqlite::open(url).await.expect("a store");
    let made_at = clock.now();
    let owner = Owner {
        id: OwnerId::new(Bucket::of("team"), made_at),
        key: "team".into(),
        name: "Team".into(),
        time_zone: chrono_tz::UTC,
        locale: "en".into(),
    };
    let addresses = (0..).map(|n| Address::parse(&format!("ann-{n}@example.org")).expect("an address"));
    let contacts: Vec<NewContact> = addresses
        .filter(|address| address.bucket() == owner.id.bucket())
        .take(MESSAGES)
        .map(NewContact::from)
        .collect();
    store.add_owner(&owner, &contacts, None, made_at).await.expect("an owner");
    let deadline = made_at + Days::new(90);
    let mut token = Token {
        expires_at: Some(deadline),
        deadline_set_at: made_at,
        ..Token::new(owner.id, Kind::Additional, "deploy key", made_at)
    };
    change::mark_unplanned(&mut token, made_at);
    store.add_token(&token, None).await.expect("a token");

    clock.set(deadline - Days::new(30));
    let now = clock.now();
    let lease = store.lease(remind::NAME, Uuid::new_v4(), now).await.expect("a read").expect("the lease");
    let rules = rules();
    remind::adopt(&store, &lease, &rules, now).await.expect("a write");
    while remind::step(&store, &lease, &rules, now).await.expect("a step").more {}
    store
}

fn deliverer(store: &Sqlite, clock: &Arc<ManualClock>, memory: &Memory) -> Deliverer<Sqlite, Arc<ManualClock>> {
    let from = "Tokens <tokens@example.org>".parse().expect("a mailbox");
    let composer = Composer::new(from, None, None).expect("templates");
    let transports = (0..SESSIONS).map(|_| Transport::Memory(memory.clone())).collect();
    let Rules { policy, digest, groups, .. } = rules();
    let terms = Terms {
        fallback: None,
        give_up_after: TimeDelta::days(2),
        every: Duration::ZERO,
        idle: Duration::from_secs(60),
        groups,
        policy,
        digest,
    };
    let mut deliverer = Deliverer::new(store.clone(), clock.clone(), composer, transports, terms, Uuid::new_v4());
    deliverer.ahead = Ahead::at_its_most(Instant::now());
    deliverer
}

async fn count(connection: &mut SqliteConnection, sql: &'static str) -> usize {
    let count: i64 = sqlx::query_scalar(sql).fetch_one(connection).await.expect(sql);
    count.try_into().expect("a count")
}

/// Waits until so many were delivered, for so long at most; returns how many were.
async fn delivered(memory: &Memory, messages: usize, within: Duration) -> usize {
    let until = Instant::now() + within;
    loop {
        let delivered = memory.delivered().len();
        if delivered >= messages || Instant::now() >= until {
            return delivered;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Keeps the store from being written as soon as more messages are claimed than may be handed over.
async fn hold_up(url: &str, memory: &Memory) {
    let mut connection = SqliteConnection::connect(url).await.expect("a connection");
    sqlx::raw_sql("PRAGMA busy_timeout = 30000").execute(&mut connection).await.expect("a setting");
    let claimed = loop {
        sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut connection).await.expect("a lock");
        let claimed = count(&mut connection, CLAIMED).await;
        if claimed > UNRECORDED {
            break claimed;
        }
        sqlx::raw_sql("ROLLBACK").execute(&mut connection).await.expect("an end");
        assert!(memory.delivered().len() < MESSAGES, "never claimed: more than {UNRECORDED} messages");
        // Lets others write.
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let most = count(&mut connection, SENT).await + UNRECORDED;
    assert_eq!(delivered(memory, most, PATIENCE).await, most, "they are handed over while nothing is recorded");
    let more = delivered(memory, most + 1, LISTENS).await - most;
    assert_eq!(more, 0, "beyond {UNRECORDED} of {claimed} messages");
    sqlx::raw_sql("ROLLBACK").execute(&mut connection).await.expect("an end");
    connection.close().await.expect("a goodbye");
}

#[tokio::test]
async fn no_more_is_handed_over_than_a_killed_process_may_repeat() {
    let directory = tempfile::tempdir().expect("a directory");
    let url = format!("sqlite:{}", directory.path().join("lapsed.db").display());
    let clock = Arc::new(ManualClock::at(DateTime::from_timestamp(1_800_000_000, 0).expect("an instant")));
    let store = due(&url, &clock).await;
    let memory = Memory::new();
    let mut deliverer = deliverer(&store, &clock, &memory);
    let delivering = async {
        let mut did = Delivered::default();
        loop {
            let outcome = deliverer.step().await.expect("a step");
            did += outcome.did;
            if !outcome.more && !deliverer.wait().await {
                return did;
            }
        }
    };
    let (did, ()) = tokio::join!(delivering, hold_up(&url, &memory));

    assert_eq!(did.sent, u64::try_from(MESSAGES).expect("few"), "{did}");
    let mut ids: Vec<MessageId> = memory.delivered().into_iter().map(|(id, _)| id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((ids.len(), memory.delivered().len()), (MESSAGES, MESSAGES), "each arrived, once");
}

/// A claim has the one connection that writes while it is decided about a message whose contact is to be suppressed: that waits for
/// the connection, and the claim goes on until it gives it back.
#[tokio::test]
async fn what_is_decided_meanwhile_keeps_no_claim_from_going_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let url = format!("sqlite:{}", directory.path().join("lapsed.db").display());
    let clock = Arc::new(ManualClock::at(DateTime::from_timestamp(1_800_000_000, 0).expect("an instant")));
    let store = due(&url, &clock).await;
    let mut deliverer = deliverer(&store, &clock, &Memory::new());
    let now = clock.now();
    let bucket = store.queue(now).await.expect("a read").due.first().copied().expect("a bucket");
    let claimed = store.claim(&[bucket], deliverer.holder, now, now + LEASE, 1).await.expect("a claim");
    let message = claimed.into_iter().next().expect("a message");
    deliverer.ended.push(Attempt {
        message,
        speaking: Vec::new(),
        settled: Vec::new(),
        passed_on: Vec::new(),
        put_off: None,
        lease_until: now + LEASE,
        happened: Some(Happened::refused(Phase::Rcpt, 550, "5.1.1 no such user")),
    });
    // Something has been recorded: the next thing that is done is to look at what has ended.
    deliverer.recording.begin(store.clone(), clock.clone(), Vec::new(), 0);
    deliverer.recording.done().await;
    let buckets = [bucket];
    for _ in 0..20 {
        let claim = store.claim(&buckets, Uuid::new_v4(), now, now + LEASE, 1);
        let (claimed, recorded) = deliverer.meanwhile(claim).await;
        assert_eq!(claimed.expect("a claim").len(), 1);
        recorded.expect("it is decided as soon as the connection is free");
        // A claim that never had to wait left no time for anything else.
        if deliverer.ended.is_empty() {
            break;
        }
    }
    let mut connection = SqliteConnection::connect(&url).await.expect("a connection");
    assert_eq!(count(&mut connection, SUPPRESSED).await, 1);
}
