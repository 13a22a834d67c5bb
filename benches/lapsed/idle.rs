//! What a pass costs when nothing is due: every job once, as `lapsed run --once` does them, from one connection pool.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use lapsed::clock::SystemClock;
use lapsed::config;
use lapsed::jobs::deliver::Terms;
use lapsed::jobs::purge::Retention;
use lapsed::mail::compose::Composer;
use lapsed::mail::transport::{Memory, Transport};
use lapsed::service::{Setup, run_once};
use lapsed::store::{Postgres, Store};
use tokio_util::sync::CancellationToken;

use crate::Sizes;
use crate::fill::{Shape, fill};
use crate::place::{OnPg, Place};
use crate::planning::{expire_all, rules};
use crate::program;
use crate::table::{Line, median, ratio};

/// How many passes are measured; the median counts.
const PASSES: usize = 101;

/// A small store and a large one, and one right after many expirations.
pub async fn rows(sizes: &Sizes) -> Vec<Line> {
    let large = if sizes.quick { 500_000 } else { 10_000_000 };
    let (small_store, large_store) = (quiet(10_000).await, quiet(large).await);
    let (mut small, mut big) = (Vec::new(), Vec::new());
    for _ in 0..sizes.runs {
        small.push(median(passes(&small_store).await));
        big.push(median(passes(&large_store).await));
    }
    let ratios = big.iter().zip(&small).map(|(big, small)| big / small);
    let unvacuumed = after_expirations(sizes).await;
    vec![
        Line {
            what: format!("idle pass of every job, {large} tokens, 100000 messages for later, PostgreSQL"),
            ratio: ratio(median(ratios)),
            got: format!("{:.2} ms", 1e3 * median(big.iter().copied())),
            against: format!("10000 tokens: {:.2} ms", 1e3 * median(small.iter().copied())),
            wanted: "at most 1.5, under 5 ms",
        },
        unvacuumed,
        program::daemon(&large_store, large).await,
    ]
}

/// A store in which nothing is due for months.
async fn quiet(tokens: u64) -> OnPg {
    let owners = (tokens / 10).max(100_000);
    let deadline = "86400 * 90 + CAST(i AS BIGINT) * 7919 % 31536000".into();
    fill(&Shape { owners, tokens, deadline, queued: 100_000, queued_for: 3_600 }).await
}

async fn after_expirations(sizes: &Sizes) -> Line {
    let due = sizes.of(1_000_000);
    let deadline = format!("-1 - (CAST(i AS BIGINT) * 7919 % {due}) * 86400 / {due}");
    let place: OnPg = fill(&Shape { owners: due, tokens: due, deadline, queued: 0, queued_for: 3_600 }).await;
    for table in ["tokens", "reminders", "messages"] {
        place.client(&format!("ALTER TABLE {table} SET (autovacuum_enabled = FALSE)"));
    }
    let store = place.open().await;
    let mut rules = rules::<Postgres>();
    rules.digest.hold = chrono::TimeDelta::days(1);
    expire_all(&store, &rules).await;
    store.close().await;
    let took = passes(&place).await;
    let (first, second) = (1e3 * took[0], 1e3 * took[1]);
    Line {
        what: format!("the same right after {due} expirations, not vacuumed"),
        got: format!("{:.2} ms", 1e3 * median(took)),
        against: format!("the first pass {first:.0} ms, the second {second:.0} ms"),
        ratio: String::new(),
        wanted: "reported",
    }
}

/// The seconds that each of many passes took, in their order.
async fn passes(place: &OnPg) -> Vec<f64> {
    let store = place.open().await;
    let mut took = Vec::new();
    for _ in 0..PASSES {
        let setup = setup();
        let started = Instant::now();
        let report = run_once(store.clone(), Arc::new(SystemClock::default()), setup, CancellationToken::new())
            .await
            .expect("a pass");
        took.push(started.elapsed().as_secs_f64());
        let idle = report.lines.iter().all(|(_, did)| did == "nothing was due");
        assert!(idle, "{report:?}");
    }
    store.close().await;
    took
}

fn setup() -> Setup {
    let settings = config::load(None).expect("the default configuration");
    let retention = Retention {
        reminders: settings.retention.reminders,
        messages: settings.retention.messages,
        ended_tokens: settings.retention.ended_tokens,
    };
    let from = "Tokens <tokens@example.org>".parse().expect("a mailbox");
    let composer = Composer::new(from, None, None).expect("templates");
    let transports = vec![Transport::Memory(Memory::new())];
    let terms = Terms {
        fallback: None,
        give_up_after: TimeDelta::days(2),
        every: Duration::ZERO,
        idle: Duration::MAX,
        groups: Arc::from([]),
        policy: lapsed::policy::Policy::new([], true, TimeDelta::days(7)),
        digest: lapsed::digest::Digest::holding(TimeDelta::zero()),
    };
    Setup {
        schedule: settings.schedule,
        rules: rules::<Postgres>(),
        retention,
        composer,
        transports,
        terms,
        http: None,
    }
}
