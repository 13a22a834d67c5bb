//! What stands in the store, counted now and then for the metrics, so that whoever reads them asks it nothing.
//!
//! Guarantees that counting takes a thousandth of the time at most, however much there is: what took long is done less
//! often. A store that fails leaves the last counts, whose own instants say how old they are.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::pass::Orders;
use crate::clock::{Clock, Timestamp};
use crate::coverage::{self, Terms, Verdict};
use crate::health::Health;
use crate::metrics::Metrics;
use crate::store::{self, Store};

/// What follows a count is a pause so many times as long.
const PAUSE: u32 = 1_000;

/// However long a count takes, the next one comes after this.
const LONGEST: Duration = Duration::from_secs(3_600);

/// A count that takes longer is given up: whoever was asked may be gone without a word.
const GIVE_UP: Duration = Duration::from_secs(600);

/// Over which span coverage is told.
const SPAN: TimeDelta = TimeDelta::days(30);

/// By how much the span moves on at once: what is read together must fit into memory, and the first count is to be brief.
const WINDOW: TimeDelta = TimeDelta::hours(3);

/// What is counted together.
#[derive(Clone, Copy, Debug)]
pub(super) enum What {
    /// The messages that wait, and how the jobs ended.
    Waiting,
    /// The tokens and the contacts.
    Stored,
    /// Whose owners knew in time.
    Coverage,
}

impl What {
    pub(super) const ALL: [Self; 3] = [Self::Waiting, Self::Stored, Self::Coverage];

    /// How often it is counted at most.
    fn every(self) -> Duration {
        Duration::from_secs(match self {
            Self::Waiting => 15,
            Self::Stored => 60,
            Self::Coverage => 300,
        })
    }
}

/// Counts, and sets what the metrics show.
#[derive(Clone)]
pub(super) struct Counts<S, C> {
    pub(super) store: S,
    pub(super) clock: C,
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Arc<Health>,
    /// What the jobs go by now.
    pub(super) orders: watch::Receiver<Arc<Orders>>,
}

impl<S: Store, C: Clock> Counts<S, C> {
    /// Counts this until `stop`, with pauses that follow from how long it takes.
    pub(super) async fn run(self, what: What, stop: CancellationToken) {
        let mut windows = Windows::default();
        loop {
            let began = Instant::now();
            let count = tokio::time::timeout(GIVE_UP, self.count(what, &mut windows));
            match stop.run_until_cancelled(count).await {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => tracing::debug!(?what, %error, "cannot count what is in the store"),
                Some(Err(_)) => tracing::debug!(?what, "cannot count what is in the store in time"),
                None => return,
            }
            let pause = pause(what.every(), began.elapsed());
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    async fn count(&self, what: What, windows: &mut Windows) -> store::Result<()> {
        let now = self.clock.now();
        match what {
            What::Waiting => {
                self.health.recorded(&self.store.job_records().await?);
                let mut waiting = self.store.waiting().await?;
                if let Some(held) = self.store.held(now).await? {
                    waiting.held = held.messages;
                    waiting.oldest = waiting.oldest.into_iter().chain([held.since]).min();
                }
                self.metrics.waiting(&waiting, now);
            }
            What::Stored => {
                let tokens = self.store.token_counts(now).await?;
                self.metrics.stored(tokens, self.store.suppressed_count().await?, now);
            }
            What::Coverage => {
                let orders = self.orders.borrow().clone();
                let (covered, owed) = windows.follow(&self.store, &orders, now).await?;
                self.metrics.coverage(covered, owed, now);
            }
        }
        Ok(())
    }
}

fn pause(every: Duration, took: Duration) -> Duration {
    every.max(took.saturating_mul(PAUSE)).min(LONGEST.max(every))
}

/// Of the tokens whose deadline fell into a window: the owners of how many knew in time, and how many were owed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Window {
    end: Timestamp,
    covered: u64,
    owed: u64,
}

/// Coverage over the last days, window by window: what is past does not change, so each is read once; the last two are read
/// each time, as tokens are marked after their deadlines, and all of them once a day, for what came later than that.
#[derive(Default)]
struct Windows {
    past: VecDeque<Window>,
    /// When all were read, and what the jobs went by then.
    read: Option<(Timestamp, Arc<Orders>)>,
}

impl Windows {
    /// How many owners knew in time, and how many should have, up to now.
    async fn follow<S: Store>(&mut self, store: &S, orders: &Arc<Orders>, now: Timestamp) -> store::Result<(u64, u64)> {
        let holds = |(read, by): &(Timestamp, Arc<Orders>)| {
            *read <= now && now - *read < TimeDelta::days(1) && Arc::ptr_eq(by, orders)
        };
        if !self.read.as_ref().is_some_and(holds) {
            self.past.clear();
            self.read = Some((now, orders.clone()));
        }
        let rules = &orders.rules;
        let terms = Terms::new(&rules.policy, &rules.digest, rules.groups.clone());
        let whole = now - TimeDelta::seconds(now.timestamp().rem_euclid(WINDOW.num_seconds()));
        let first = whole - SPAN;
        while self.past.front().is_some_and(|window| window.end <= first) {
            self.past.pop_front();
        }
        while self.past.back().is_some_and(|window| window.end > whole - WINDOW) {
            self.past.pop_back();
        }
        let mut from = self.past.back().map_or(first, |window| window.end);
        while from < whole {
            let end = from + WINDOW;
            self.past.push_back(read(store, &terms, from, end).await?);
            from = end;
        }
        let last = read(store, &terms, whole, now).await?;
        let all = || self.past.iter().chain([&last]);
        Ok((all().map(|window| window.covered).sum(), all().map(|window| window.owed).sum()))
    }
}

async fn read<S: Store>(store: &S, terms: &Terms, from: Timestamp, end: Timestamp) -> store::Result<Window> {
    let mut window = Window { end, ..Window::default() };
    let visit = |_, _, verdict| match verdict {
        Verdict::Covered => {
            window.covered += 1;
            window.owed += 1;
        }
        Verdict::Silent(_) => window.owed += 1,
        Verdict::NotOwed => {}
    };
    coverage::within(store, terms, from, end, visit).await?;
    Ok(window)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_counted_seldom() {
        let seconds = Duration::from_secs;
        assert_eq!(pause(seconds(15), Duration::from_millis(2)), seconds(15));
        assert_eq!(pause(seconds(60), Duration::from_millis(250)), seconds(250));
        assert_eq!(pause(seconds(60), seconds(20)), seconds(3_600));
    }
}
