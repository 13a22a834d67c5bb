//! Random histories on the real store, against rules in the plainest words that look at every token at every tick.
//!
//! Tokens appear (some late, as imports do, some after the pass that should have seen them), their deadlines move, they are
//! revoked, rotated and listed again; contacts come, go and are suppressed; the daemon is down for a while, leads come and
//! go, a policy for some tokens comes, changes and goes, tokens move to it and away, the clock leaps either way. The naive account has no watermark, no mark and no page. What both write must be
//! the same: the same token, deadline, lead and contact, at the same tick: so each owed reminder once, none too early, none
//! after its deadline, none twice.
//!
//! Two sizes: many histories of a few tokens, in which each rule meets each other, and a year of hundreds of owners. Where
//! the two accounts differ, the history is cut down to the events that it takes, and printed.
//!
//! One kind of history is known to differ: the clock leaps ahead, the daemon stops, and real time passes the false
//! watermark before it starts again. The daily reconcile pass exists for those; none is made here.
//!
//! With LAPSED_TEST_LONG=1 there are more histories, years on PostgreSQL too, and a reconcile pass every day.

mod history;
mod naive;
mod real;

use crate::support::backend::{Backend, OnPostgres, OnSqlite};
use history::{DAY, History, Random, What, dense, year};
use naive::Line;
use real::Forgets;

/// An expired notice is stale after this, in seconds.
pub const STALE_AFTER: i64 = 7 * DAY;

/// Whether the long tests were asked for.
fn long() -> bool {
    std::env::var("LAPSED_TEST_LONG").is_ok_and(|value| value == "1")
}

/// Where the store and the naive account differ.
#[derive(Debug)]
struct Difference {
    lost: Vec<Line>,
    extra: Vec<Line>,
}

impl Difference {
    /// When the first of it shows, in seconds after dawn.
    fn first(&self) -> i64 {
        self.lost.iter().chain(&self.extra).map(|line| line.now).min().unwrap_or(i64::MAX)
    }
}

/// Plays a history on both. Returns how many lines must be there, and where the two differ.
async fn compare<B: Backend>(backend: B, history: &History, forgets: Forgets) -> (usize, Option<Difference>) {
    let expected = naive::play(history, STALE_AFTER);
    let found = real::play(backend, history, forgets).await;
    let lost: Vec<Line> = expected.must.difference(&found).copied().collect();
    let extra = found.difference(&expected.must).filter(|line| !expected.may.contains(line));
    let difference = Difference { lost, extra: extra.copied().collect() };
    let differs = !(difference.lost.is_empty() && difference.extra.is_empty());
    (expected.must.len(), differs.then_some(difference))
}

/// Cuts a history in which the two differ down to the events that it takes: away with halves of them, then quarters and so
/// on, as long as they still differ. Always on SQLite.
async fn shrink(mut history: History, forgets: Forgets) -> (History, Difference) {
    let differs = async |history: &History| compare(OnSqlite::fresh(), history, forgets).await.1;
    let mut difference = differs(&history).await.expect("it differs");
    let end = history.clock().iter().position(|now| *now >= difference.first()).unwrap_or(history.shape.ticks) + 1;
    let mut shorter = history.clone();
    shorter.shape.ticks = end.min(history.shape.ticks);
    shorter.events.retain(|event| event.at < end);
    for first in [Some(shorter), only_what_concerns(&history, &difference)].into_iter().flatten() {
        if first.events.len() < history.events.len()
            && let Some(same) = differs(&first).await
        {
            (history, difference) = (first, same);
        }
    }
    let mut size = history.events.len().div_ceil(2);
    while size > 0 {
        let mut from = 0;
        while from < history.events.len() {
            let mut without = history.clone();
            without.events.drain(from..(from + size).min(history.events.len()));
            match differs(&without).await {
                Some(same) => (history, difference) = (without, same),
                None => from += size,
            }
        }
        size = if size == 1 { 0 } else { size.div_ceil(2) };
    }
    (history, difference)
}

/// The history of the first token that differs and of what befalls everybody, up to the end of the whole.
fn only_what_concerns(history: &History, difference: &Difference) -> Option<History> {
    let line = difference.lost.iter().chain(&difference.extra).min()?;
    let mut only = history.clone();
    only.events.retain(|event| match event.what {
        What::Issue { token, .. } | What::Watch { token, .. } | What::Edit { token, .. } | What::Revoke { token } => {
            token == line.token
        }
        What::Rename { token, .. } => token == line.token,
        What::Rotate { token, successor, .. } => token == line.token || successor == line.token,
        _ => true,
    });
    Some(only)
}

async fn agree<B: Backend>(backend: B, history: History, name: &str) -> usize {
    let (lines, difference) = compare(backend, &history, Forgets::Nothing).await;
    if let Some(difference) = difference {
        eprintln!("{name} differs: {} lost, {} extra", difference.lost.len(), difference.extra.len());
        let (history, difference) = shrink(history, Forgets::Nothing).await;
        panic!("{name}: {difference:#?} in {history:#?}");
    }
    lines
}

#[tokio::test]
async fn small_histories() {
    let (count, mut lines) = (if long() { 1_000 } else { 30 }, 0);
    for seed in 0..count {
        lines += agree(OnSqlite::fresh(), dense(&mut Random(seed)), &format!("seed {seed}")).await;
    }
    assert!(lines > 3 * count as usize, "the histories have something to tell: {lines}");
}

#[tokio::test]
async fn a_year() {
    let (years, tokens, reconcile_every) = if long() { (4, 3_000, 2) } else { (1, 400, 60) };
    for seed in 0..years {
        let history = year(&mut Random(1_000 + seed), tokens, reconcile_every);
        let lines = agree(OnSqlite::fresh(), history, &format!("year {seed}")).await;
        assert!(lines > 5_000, "the year has something to tell: {lines}");
    }
}

#[tokio::test]
async fn a_year_on_postgres() {
    if !long() {
        eprintln!("skipped: a year on PostgreSQL is for LAPSED_TEST_LONG=1");
        return;
    }
    let history = year(&mut Random(2_000), 3_000, 2);
    let lines = agree(OnPostgres::make().await, history, "the year").await;
    assert!(lines > 5_000, "the year has something to tell: {lines}");
}

/// The test of the test: a program that forgets a rule is found, and the history that shows it is short.
async fn is_found(forgets: Forgets, most_events: usize) {
    for seed in 0..500 {
        let history = dense(&mut Random(seed));
        if compare(OnSqlite::fresh(), &history, forgets).await.1.is_some() {
            let (history, difference) = shrink(history, forgets).await;
            eprintln!("seed {seed}, cut down: {difference:#?} in {:#?}", history.events);
            assert!(!difference.lost.is_empty(), "{difference:?}");
            assert!(history.events.len() <= most_events, "{:#?}", history.events);
            assert!(compare(OnSqlite::fresh(), &history, Forgets::Nothing).await.1.is_none(), "{history:#?}");
            return;
        }
    }
    panic!("{forgets:?} is not found");
}

#[tokio::test]
async fn a_watermark_without_its_id_is_found() {
    is_found(Forgets::IdInWatermark, 5).await;
}

#[tokio::test]
async fn a_token_that_is_not_marked_is_found() {
    is_found(Forgets::Mark, 3).await;
}
