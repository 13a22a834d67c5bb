//! Cost follows what is due, not what exists: each statement that runs often is served by the index that it names, in a
//! store of 100,000 analysed tokens, with the planners' default settings.
//!
//! The store's own methods run, and the databases tell how they carried out what these asked. Each runs eight times,
//! because after the fifth time PostgreSQL may choose a plan for any values. A batch is 50 rows: for thousands of 100,000
//! rows, or for hundreds of a table that is narrow, a planner rightly reads all of it.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use lapsed::change::{self, Edit};
use lapsed::config::Limit;
use lapsed::digest::Digest;
use lapsed::jobs::guard::Guard;
use lapsed::jobs::{Rules, expire, purge, remind};
use lapsed::policy::{Policy, Reason};
use lapsed::store::accounts::{OwnerRef, ReminderState};
use lapsed::store::corrections::Corrected;
use lapsed::store::outbox::{ClaimedMessage, Record};
use lapsed::store::planning::{Decided, NewReminder, Progress, Watermark};
use lapsed::store::purging::{Cutoffs, Purged};
use lapsed::store::{Accounts, Outbox, Store};
use lapsed::token::{Bucket, IdRef};
use support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use support::many;
use support::plans::{self, Access, Capture, Explains, Plan};
use support::world::{days, lead, sent};
use uuid::Uuid;

/// How often each method is called.
const ROUNDS: u32 = 8;

/// How many rows a step looks at.
const BATCH: u32 = 50;

/// A statement, by words that no other has, the index that serves it, and what is looked up in that.
struct Expected {
    words: &'static str,
    index: &'static str,
    columns: &'static [&'static str],
}

const fn by(words: &'static str, index: &'static str, columns: &'static [&'static str]) -> Expected {
    Expected { words, index, columns }
}

/// Whichever index these columns are looked up in: several would do.
const ANY: &str = "";

/// What each statement promises. The primary key of a table is `TABLE_pkey`, as PostgreSQL calls it.
const PROMISES: &[Expected] = &[
    // expire
    by("WHERE unplanned AND status = 'active' AND expires_at <= $1", "tokens_unplanned", &["expires_at"]),
    by("SET status = 'expired'", ANY, &["id"]),
    by("ended_at > ", "tokens_ended", &["ended_at"]),
    by("SET status = 'active'", "tokens_pkey", &["bucket", "id"]),
    // remind
    by("WHERE unplanned AND status = 'active' AND expires_at > $1", "tokens_unplanned", &["expires_at"]),
    by("WHERE t.status = 'active' AND t.generation", ANY, &["id"]),
    by("SET unplanned = ", "tokens_pkey", &["bucket", "id"]),
    // both
    by("AND (expires_at, id) > ($1, $2)", "tokens_deadline", &["expires_at"]),
    by("AS too_early", "tokens_unplanned", &["expires_at"]),
    by("AS held", "tokens_unplanned", &["expires_at"]),
    by("AS uncorrected", "tokens_uncorrected", &[]),
    by("WHERE t.uncorrected AND t.id > $1", "tokens_uncorrected", &["id"]),
    by("r.settled_at, r.message_id FROM", "reminders_pkey", &["bucket", "token_id"]),
    by("SET uncorrected = ", "tokens_pkey", &["bucket", "id"]),
    by("WHERE state = 'held' ORDER BY not_before LIMIT 1", "messages_held_deadline", &[]),
    by("FROM guard_counts WHERE bucket = 0 AND minute < $4", "reminders_deadline", &["deadline"]),
    by("JOIN owner_contacts oc ON", "owner_contacts_pkey", &["bucket", "owner_id"]),
    by("JOIN token_contacts tc ON", "token_contacts_pkey", &["bucket", "token_id"]),
    by("JOIN owners w ON", "owners_pkey", &["bucket", "id"]),
    by("WHERE c.suppressed_at IS NULL", "contacts_pkey", &["bucket", "id"]),
    by("t.scopes, t.description, w.key", "tokens_pkey", &["bucket", "id"]),
    by("t.scopes, t.description, w.key", "owners_pkey", &["bucket", "id"]),
    // deliver
    by("SELECT MIN(m.not_before)", "messages_queue", &["bucket"]),
    by("'sending') AND not_before <= $2", "messages_queue", &["bucket", "not_before"]),
    by("SET state = 'sending'", "messages_pkey", &["bucket", "id"]),
    by("SET message_id = ", "reminders_pending", &["bucket", "contact_id"]),
    by("AS tightest", "reminders_pending", &["bucket", "contact_id"]),
    by("AS tightest", "reminders_pkey", &["bucket", "token_id", "generation"]),
    by("suppressed_why FROM contacts WHERE bucket = $1 AND id", "contacts_pkey", &["bucket", "id"]),
    by("AS speaks_for", "tokens_pkey", &["bucket", "id"]),
    by("AS speaks_for", "owners_pkey", &["bucket", "id"]),
    by("SELECT 1 FROM owner_contacts oc", "owner_contacts_pkey", &["bucket", "owner_id", "contact_id"]),
    by("SELECT 1 FROM token_contacts tc", "token_contacts_pkey", &["bucket", "token_id", "contact_id"]),
    by("SET mailed_at = ", "contacts_pkey", &["bucket", "id"]),
    by("mailed_at FROM", "contacts_pkey", &["bucket", "id"]),
    by("WHERE s.bucket", "owners_key", &["bucket", "key"]),
    by("UPDATE messages SET not_before = $5 WHERE", "messages_pkey", &["bucket", "id"]),
    by("attempts = m.attempts + ", "messages_pkey", &["bucket", "id"]),
    by("SET suppressed_at = ", "contacts_pkey", &["bucket", "id"]),
    // purge
    by("DELETE FROM reminders", "reminders_deadline", &["deadline"]),
    by("DELETE FROM reminders", "reminders_pkey", &["bucket", "token_id"]),
    by("DELETE FROM messages", "messages_finished", &["finished_at"]),
    by("DELETE FROM messages", "messages_pkey", &["bucket", "id"]),
    by("DELETE FROM tokens", "tokens_ended", &["ended_at"]),
    by("DELETE FROM tokens", "tokens_pkey", &["bucket", "id"]),
    // the supervisor's status
    by("SELECT MIN(expires_at)", "tokens_deadline", &["expires_at"]),
    // people
    by("WHERE t.bucket = $1 AND t.secret_hash = $2", "tokens_secret", &["bucket", "secret_hash"]),
    by("UPDATE tokens SET last_used_at", "tokens_pkey", &["bucket", "id"]),
    by("FROM tokens t WHERE t.bucket = $1 AND t.id = $2", "tokens_pkey", &["bucket", "id"]),
    by("UPDATE tokens SET description", "tokens_pkey", &["bucket", "id"]),
    by("LIKE '%' || $2 ORDER BY t.id", ANY, &["bucket"]),
    by("FROM buckets b JOIN reminders r ON", "reminders_pkey", &["bucket", "token_id"]),
    by("FROM buckets b JOIN reminders r ON", "contacts_pkey", &["bucket", "id"]),
    by("WHERE bucket = $1 AND owner_id = $2", "owner_contacts_pkey", &["bucket", "owner_id"]),
    by("WHERE TRUE AND t.bucket = ", "tokens_owner", &["bucket", "owner_id"]),
    by("(SELECT id FROM contacts WHERE bucket = $1 AND address = $2)", "contacts_address", &["bucket", "address"]),
    by("SELECT MAX(o.key)", "owners_key", &["bucket", "key"]),
    // All that waits, and nothing else: the whole of a partial index.
    by("SELECT state, COUNT(*), MIN(CASE", "messages_queue", &["bucket"]),
    by("t.status = 'expired' AND t.replaced_by IS NULL", "tokens_ended", &["ended_at"]),
    by("AND t.expires_at > $1 AND t.expires_at <= $2 AND t.replaced_by IS NULL", "tokens_deadline", &["expires_at"]),
    by("SELECT token_id, generation, lead, state, reason, escalation, settled_at", "reminders_deadline", &["deadline"]),
    by("WHERE o.bucket = $1 AND o.key = $2", "owners_key", &["bucket", "key"]),
];

/// What only SQLite says so.
const ON_SQLITE: Expected = by(
    "UPDATE reminders AS r SET state = s.value",
    "reminders_pkey",
    &["bucket", "token_id", "generation", "lead", "contact_id"],
);

/// What only PostgreSQL says so.
const ON_POSTGRES: Expected = by("UPDATE reminders r SET state = s.state", ANY, &["bucket", "contact_id"]);

#[tokio::test]
async fn sqlite_serves_each_statement_by_its_index() {
    statements_are_served_by_their_indexes::<OnSqlite>(ON_SQLITE, None).await;
}

/// By what it was told then, it would read all that waits for each row that is bound.
#[tokio::test]
async fn sqlite_does_so_where_little_waited_when_it_was_analysed() {
    const LITTLE: &str = "ANALYZE; UPDATE sqlite_stat1 SET stat = CASE tbl WHEN 'messages' THEN '0 0 0 0' ELSE '10 1 1' END \
         WHERE idx IN ('tokens_unplanned', 'tokens_uncorrected', 'reminders_pending', 'messages_open', 'messages_queue', \
                       'messages_held', 'messages_held_deadline')";
    // Samples of the tables, and no arguments to hold against them: then SQLite says of other statements what it would not do.
    let of_what_waits = &["SET message_id = ", "SET state = 'sending'", "SET status = 'expired'"];
    statements_are_served_by_their_indexes::<OnSqlite>(ON_SQLITE, Some((LITTLE, of_what_waits))).await;
}

#[tokio::test]
async fn postgres_serves_each_statement_by_its_index() {
    statements_are_served_by_their_indexes::<OnPostgres>(ON_POSTGRES, None).await;
}

/// What several processes do at once is one shard's statement, also when its plan is made for any values.
#[tokio::test]
async fn what_names_a_bucket_touches_one_partition() {
    let backend = OnPartitions::make().await;
    plans::unheard(many::fill(&backend)).await;
    let capture = Capture::start().await;
    backend.explain_from_now_on().await;
    let store = backend.open().await;
    let reads = |families: &[&str], told: &[Plan]| {
        let touched: Vec<&Access> = told.iter().flat_map(|plan| &plan.accesses).filter(|a| a.is_large()).collect();
        for family in families {
            let parts: BTreeSet<&str> =
                touched.iter().filter(|a| a.family() == *family).map(|a| a.table.as_str()).collect();
            assert_eq!(parts.len(), 1, "{family}: {parts:?}\n{}", told.iter().map(|p| &*p.text).collect::<String>());
        }
        let strangers: Vec<_> = touched.iter().filter(|a| !families.contains(&a.family())).collect();
        assert!(strangers.is_empty(), "{strangers:?}");
    };
    capture.take();
    for round in 0..ROUNDS {
        let now = many::now();
        let bucket = Bucket::from_number(40 + u8::try_from(round).expect("few"));
        let claimed = store.claim(&[bucket], Uuid::from_u128(1), now, now + TimeDelta::minutes(5), 16).await;
        let claimed = claimed.expect("a claim");
        reads(&["messages", "reminders", "contacts"], &told(&backend, &capture, "suppressed_why").await);
        let message = carrying(&claimed);
        assert!(store.renew(message, now + TimeDelta::minutes(6)).await.expect("a renewal"));
        reads(&["messages"], &told(&backend, &capture, "UPDATE messages").await);
        store.suppress(message, "550 unknown", now).await.expect("a write");
        let record = sent(message);
        assert!(store.record(&[(message, &record)], now).await.expect("a record")[0]);
        reads(&["messages", "reminders", "contacts"], &told(&backend, &capture, "UPDATE contacts").await);

        let n = active(round);
        let token = many::token(n);
        let found = store.token_by_secret(token.bucket(), &many::secret(n)).await.expect("a read");
        assert_eq!(found.expect("a token").id, token);
        reads(&["tokens"], &told(&backend, &capture, "secret_hash = $2").await);
        store.record_use(token, now, now, true).await.expect("a write");
        reads(&["tokens"], &told(&backend, &capture, "last_used_at").await);
        let edit = Edit { description: Some("renamed".into()), ..Edit::default() };
        store.change_token(token, |token| change::edit(token, &edit, now)).await.expect("an edit");
        reads(&["tokens"], &told(&backend, &capture, "UPDATE tokens").await);
        store.change_token(token, |token| change::rotate(token, days(1), None, now)).await.expect("a rotation");
        reads(&["tokens", "token_contacts"], &told(&backend, &capture, "INSERT INTO token_contacts").await);
    }
}

/// `before`: what is done to the store before it is opened again and asked for its plans, and which of them count.
async fn statements_are_served_by_their_indexes<B: Explains + many::Bulk>(
    and: Expected,
    before: Option<(&str, &[&str])>,
) {
    let counts = |promise: &&Expected| before.is_none_or(|(_, words)| words.contains(&promise.words));
    let promises = || PROMISES.iter().chain([&and]).filter(counts);
    let backend = B::make().await;
    plans::unheard(many::fill(&backend)).await;
    let capture = Capture::start().await;
    backend.explain_from_now_on().await;
    let store = backend.open().await;
    capture.take();
    for round in 0..ROUNDS {
        plan_and_purge(&store).await;
        deliver(&store, round).await;
        ask(&store, round).await;
    }
    // What is told last may arrive a little later than the answer.
    let mut told = capture.take();
    if let Some((before, _)) = before {
        backend.execute(before).await;
        backend.open().await.close().await;
        capture.take();
    }
    let mut plans = Vec::new();
    for _ in 0..100 {
        plans = backend.plans(told.clone()).await;
        if promises().all(|promise| plans.iter().any(|plan| speaks_of(plan, promise))) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        told.extend(capture.take());
    }
    if before.is_some() {
        plans.retain(|plan| promises().any(|promise| speaks_of(plan, promise)));
    }
    let mut wrong: BTreeMap<String, &str> = BTreeMap::new();
    for promise in promises() {
        let mut named = plans.iter().filter(|plan| speaks_of(plan, promise)).peekable();
        if named.peek().is_none() {
            wrong.insert(format!("never ran: {}", promise.words), "");
        }
        for plan in named.filter(|plan| !plan.accesses.iter().any(|access| keeps(access, promise))) {
            wrong.insert(format!("not by {} {:?}: {}", promise.index, promise.columns, plan.sql), &plan.text);
        }
    }
    for plan in &plans {
        if plan.compiled {
            wrong.insert(format!("is compiled at each execution: {}", plan.sql), &plan.text);
        }
        for access in plan.accesses.iter().filter(|access| access.is_large() && reads_too_much(access)) {
            let promised = |promise| speaks_of(plan, promise) && keeps(access, promise);
            if !promises().any(promised) {
                wrong.insert(format!("reads too much of {}: {}", access.table, plan.sql), &plan.text);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.iter().map(|(what, plan)| format!("{what}\n{plan}\n\n")).collect::<String>());
}

fn speaks_of(plan: &Plan, promise: &Expected) -> bool {
    plan.sql.contains(promise.words)
}

fn keeps(access: &Access, promise: &Expected) -> bool {
    let index = access.index.as_deref().unwrap_or_default();
    let named =
        promise.index == ANY || index == promise.index || (index == "PRIMARY KEY" && promise.index.ends_with("_pkey"));
    named && promise.columns.iter().all(|column| access.looks_up(column))
}

/// A whole table, a whole index, or a whole bucket.
fn reads_too_much(access: &Access) -> bool {
    let columns = ["id", "owner_id", "contact_id", "token_id", "key", "address", "secret_hash", "external_id"];
    let instants = ["expires_at", "ended_at", "not_before", "finished_at", "deadline", "minute"];
    access.index.is_none() || !columns.iter().chain(&instants).any(|column| access.looks_up(column))
}

/// A page of each planning job, and a batch of what is old.
async fn plan_and_purge<S: Store>(store: &S) {
    let now = many::now();
    let policy = Policy::new([lead(30), lead(7), lead(1)], true, days(7));
    let guard = Guard::new(Limit::Auto, Limit::Auto);
    let window = Some("mon-sun 00:00-24:00".parse().expect("a window"));
    let digest = Digest { window, ..Digest::holding(TimeDelta::zero()) };
    let rules = Rules {
        policy,
        fallback: Some(many::contact(7)),
        digest,
        groups: Arc::from([]),
        skip_unused: false,
        batch: BATCH,
        guard,
    };
    let holder = Uuid::from_u128(1);
    let lease = store.lease(expire::NAME, holder, now).await.expect("a read").expect("a lease");
    let revived = expire::revive(store, &lease, &rules, now).await.expect("a step").did;
    let expired = expire::step(store, &lease, &rules, now).await.expect("a step").did;
    let lease = store.lease(remind::NAME, holder, now).await.expect("a read").expect("a lease");
    let unplanned = remind::step(store, &lease, &rules, now).await.expect("a step").did;
    // Of what has expired a step goes through several pages.
    assert_eq!((revived, expired.tokens, unplanned.tokens), (u64::from(BATCH), 4 * u64::from(BATCH), u64::from(BATCH)));
    assert!(expired.pending > 0 && unplanned.pending > 0, "{expired:?} {unplanned:?}");

    // Whatever is marked by now is more than a page; the leads come after it.
    let from = Watermark::after(now - days(30));
    let page = store.crossing(lead(30), from, now, BATCH).await.expect("a page");
    assert_eq!(page.len(), BATCH as usize);
    let ids: Vec<_> = page.iter().map(|token| token.id).collect();
    assert_eq!(store.traits(&ids).await.expect("a read").len(), BATCH as usize);
    let reminders = page.iter().map(|token| reminder(token.id.uuid(), now)).collect();
    let decided = Decided { now, looked_at: &page, reminders, may_open: None };
    let progress = Progress::Reached(lead(30), from);
    store.plan(&lease, decided, progress).await.expect("a write");

    assert!(store.uncorrected(Uuid::nil(), BATCH).await.expect("a read").is_empty());
    let token = many::token(active(0)).uuid();
    let looked_at = store.find_tokens(&IdRef::Whole(token)).await.expect("a read");
    let corrected = Corrected { now, looked_at: &looked_at, reminders: Vec::new(), may_open: None };
    assert_eq!(store.correct(&lease, corrected).await.expect("a write").tokens, 1);

    assert!(store.next_deadline(now).await.expect("a read").is_some_and(|next| next > now));

    // What the metrics ask, again and again.
    let waiting = store.waiting().await.expect("a read");
    assert!(waiting.open > 0 && waiting.oldest.is_some(), "{waiting:?}");
    let mut expired = 0;
    store.each_expired(now - days(300), now - days(299), |_, _| expired += 1).await.expect("a read");
    let mut rows = 0;
    let visit = |_| {
        rows += 1;
        std::ops::ControlFlow::Continue(())
    };
    store.each_ledger_row(now - days(20), now - days(19), visit).await.expect("a read");
    assert!(rows > 0, "{rows}");

    let lease = store.lease(purge::NAME, holder, now).await.expect("a read").expect("a lease");
    let cutoffs = Cutoffs {
        reminders: now - days(250),
        messages: now - days(80),
        ended_tokens: now - days(250),
        guard_counts: now - days(1),
    };
    assert!(store.to_purge(cutoffs).await.expect("a read"));
    let purged = store.purge(&lease, cutoffs, now, BATCH).await.expect("a step");
    let batch = u64::from(BATCH);
    assert_eq!(purged, Purged { reminders: batch, messages: batch, tokens: batch });
}

fn reminder(token: Uuid, now: lapsed::clock::Timestamp) -> NewReminder {
    NewReminder {
        token: token.into(),
        generation: 0,
        lead: lead(30),
        contact: Some(many::contact(9)),
        expires_at: now + days(30),
        state: ReminderState::Pending,
        reason: Some(Reason::NoContact),
        escalation: true,
        not_before: None,
    }
}

/// A token that is active and far from its deadline.
fn active(round: u32) -> u32 {
    50_400 + 1_000 * round
}

/// All that delivery asks of a bucket.
async fn deliver<S: Store>(store: &S, round: u32) {
    let now = many::now();
    let queue = store.queue(now).await.expect("a read");
    assert!(queue.due.len() > 200, "{}", queue.due.len());
    let bucket = Bucket::from_number(u8::try_from(round).expect("few") + 100);
    let claimed =
        store.claim(&[bucket], Uuid::from_u128(1), now, now + TimeDelta::minutes(5), 16).await.expect("a claim");
    let message = carrying(&claimed);
    let tokens: Vec<_> = message.reminders.iter().map(|reminder| reminder.token).collect();
    let asked: Vec<_> = tokens.iter().map(|token| (message.contact.id, *token)).collect();
    let facts = store.facts(&asked).await.expect("a read");
    assert_eq!(facts[&message.contact.id].tokens.len(), tokens.iter().collect::<BTreeSet<_>>().len());
    let since = now - days(1);
    store.mailed_before(&[message.contact.id], since, now).await.expect("a write");
    store.mailed(&[message.contact.id], now).await.expect("a write");
    let told = store.told(&asked, now).await.expect("a read");
    assert!(!told.is_empty(), "they are on their way");
    store.suppress(message, "550 unknown", now).await.expect("a write");
    assert!(store.renew(message, now + TimeDelta::minutes(6)).await.expect("a renewal"));
    let escalation = reminder(tokens[0].uuid(), now);
    let record = Record { escalations: vec![escalation], ..sent(message) };
    assert!(store.record(&[(message, &record)], now).await.expect("a record")[0]);
}

/// A claimed message that says something.
fn carrying(claimed: &[ClaimedMessage]) -> &ClaimedMessage {
    claimed.iter().find(|message| message.reminders.len() >= 2).expect("a message with reminders")
}

/// What verification and the commands ask.
async fn ask<S: Store>(store: &S, round: u32) {
    let now = many::now();
    let n = active(round);
    let token = many::token(n);
    let found = store.token_by_secret(token.bucket(), &many::secret(n)).await.expect("a read");
    assert_eq!(found.expect("a token").id, token);
    store.record_use(token, now, now, true).await.expect("a write");
    assert_eq!(store.find_tokens(&IdRef::Whole(token.uuid())).await.expect("a read").len(), 1);
    assert_eq!(store.find_tokens(&IdRef::Short(token.short())).await.expect("a read").len(), 1);
    assert_eq!(store.history(token).await.expect("a read").len(), 1);
    let edit = Edit { description: Some("renamed".into()), ..Edit::default() };
    store.change_token(token, |token| change::edit(token, &edit, now)).await.expect("an edit");
    let owner = many::owner(n % many::OWNERS);
    assert_eq!(support::world::tokens(store, Some(owner)).await.len(), 2);
    assert_eq!(store.contacts_of(owner).await.expect("a read").len(), 2);
    store.find_owners(&OwnerRef::Key("alice".into())).await.expect("a read");
    assert!(!store.keys_near("owner-4711x").await.expect("a read").is_empty());
    store.find_owners(&OwnerRef::Address(support::world::at("a@example.org"))).await.expect("a read");
}

/// The plans since the last call, when the statement with these words is among them.
async fn told<B: Explains>(backend: &B, capture: &Capture, words: &str) -> Vec<Plan> {
    let mut told = Vec::new();
    for _ in 0..100 {
        told.extend(capture.take());
        let plans = backend.plans(told.clone()).await;
        if plans.iter().any(|plan| plan.sql.contains(words)) {
            return plans;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{words} was not told: {told:?}");
}
