//! `expire` and `remind`, against the bare statements that change the same rows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use lapsed::config::Limit;
use lapsed::digest::Digest;
use lapsed::jobs::guard::Guard;
use lapsed::jobs::{Rules, expire, remind};
use lapsed::policy::{Lead, Policy};
use lapsed::store::planning::Written;
use lapsed::store::{Postgres, Store};
use uuid::Uuid;

use crate::Sizes;
use crate::fill::{Shape, at, fill, now};
use crate::place::{OnPg, Place};
use crate::table::{Line, median, rate, ratio};

/// What the daemon decides by where nobody configured anything, but for the guards: so many are let through by none.
pub fn rules<S: Store>() -> Rules {
    let leads = [30, 7, 1].map(|days| Lead::new(TimeDelta::days(days)));
    let policy = Policy::new(leads, true, TimeDelta::days(7));
    Rules {
        policy,
        fallback: None,
        digest: Digest::holding(TimeDelta::minutes(10)),
        groups: Arc::from([]),
        skip_unused: false,
        batch: S::BATCH,
        guard: Guard::new(Limit::None, Limit::None),
    }
}

/// `due` of `tokens` are past their deadline: the oldest, each of another owner, in an order of their own.
pub async fn expire<P: Place>(sizes: &Sizes) -> Line {
    let (tokens, due) = (sizes.of(5_000_000), sizes.of(1_000_000));
    let deadline = format!(
        "CASE WHEN i < {due} THEN -1 - (CAST(i AS BIGINT) * 7919 % {due}) * 86400 / {due} \
              ELSE 86400 * 40 + CAST(i AS BIGINT) * 7919 % 31536000 END"
    );
    let filled: P = fill(&Shape { owners: due, tokens, deadline, queued: 0, queued_for: 3_600 }).await;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..sizes.runs {
        let place = filled.copy().await;
        bare.push(place.client(&format!(
            "UPDATE tokens SET status = 'expired', ended_at = expires_at, unplanned = FALSE \
             WHERE status = 'active' AND expires_at <= {}",
            at::<P>("0")
        )));
        drop(place);
        let place = filled.copy().await;
        let store = place.open().await;
        let (took, written) = expire_all(&store, &rules::<P::Store>()).await;
        assert_eq!((written.tokens, written.pending), (due, due));
        store.close().await;
        ours.push(took);
    }
    line::<P>(format!("expire: {due} of {tokens} tokens"), "one bare UPDATE", due, ours, bare, "0.2, aim 0.4")
}

/// Expires until nothing is due, as a pass does.
pub async fn expire_all<S: Store>(store: &S, rules: &Rules) -> (Duration, Written) {
    let started = Instant::now();
    let lease = store.lease(expire::NAME, Uuid::from_u128(1), now()).await.expect("a read").expect("a lease");
    let mut total = Written::default();
    loop {
        let outcome = expire::step(store, &lease, rules, now()).await.expect("a step");
        total += outcome.did;
        if !outcome.more {
            break;
        }
        tokio::time::sleep(S::GAP).await;
    }
    store.finish(&lease, now(), Ok("done")).await.expect("a write");
    (started.elapsed(), total)
}

/// Tokens that cross the widest lead, one of each owner.
pub async fn remind(sizes: &Sizes) -> Line {
    let due = sizes.of(1_000_000);
    let deadline = format!("86400 * 30 - (CAST(i AS BIGINT) * 7919 % {due}) * 86400 / {due}");
    let filled: OnPg = fill(&Shape { owners: due, tokens: due, deadline, queued: 0, queued_for: 3_600 }).await;
    for lead in rules::<Postgres>().policy.leads() {
        filled.client(&format!(
            "INSERT INTO watermarks (bucket, lead, instant, token_id) VALUES (0, {}, {}, '{}')",
            lead.seconds(),
            at::<OnPg>("-86401"),
            Uuid::max()
        ));
    }
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..sizes.runs {
        let place = filled.copy().await;
        let store = place.open().await;
        let (took, written) = remind_all(&store).await;
        assert_eq!(written.pending, due);
        store.close().await;
        ours.push(took);
        place.client(
            "CREATE TABLE ready_reminders AS TABLE reminders; CREATE TABLE ready_messages AS TABLE messages; \
             TRUNCATE reminders, messages",
        );
        place.rest();
        bare.push(place.client(
            "INSERT INTO reminders SELECT * FROM ready_reminders; INSERT INTO messages SELECT * FROM ready_messages",
        ));
    }
    let what = format!("remind: {due} tokens of as many owners cross a lead");
    line::<OnPg>(what, "two bare INSERT ... SELECT", due, ours, bare, "0.3, aim 0.5")
}

async fn remind_all<S: Store>(store: &S) -> (Duration, Written) {
    let rules = rules::<S>();
    let started = Instant::now();
    let lease = store.lease(remind::NAME, Uuid::from_u128(1), now()).await.expect("a read").expect("a lease");
    let mut total = Written::default();
    loop {
        let outcome = remind::step(store, &lease, &rules, now()).await.expect("a step");
        total += outcome.did;
        if !outcome.more {
            break;
        }
        tokio::time::sleep(S::GAP).await;
    }
    store.finish(&lease, now(), Ok("done")).await.expect("a write");
    (started.elapsed(), total)
}

fn line<P: Place>(
    what: String,
    against: &str,
    rows: u64,
    ours: Vec<Duration>,
    bare: Vec<Duration>,
    wanted: &'static str,
) -> Line {
    let (store, client) = P::NAMES;
    let ratios = bare.iter().zip(&ours).map(|(bare, ours)| bare.as_secs_f64() / ours.as_secs_f64());
    Line {
        what: format!("{what}, {store}"),
        got: rate(rows, median(ours.iter().map(Duration::as_secs_f64))),
        against: format!("{against} in {client}: {}", rate(rows, median(bare.iter().map(Duration::as_secs_f64)))),
        ratio: ratio(median(ratios)),
        wanted,
    }
}
