//! What stands in the store, counted now and then for the metrics, so that whoever reads them asks it nothing.
//!
//! Guarantees that counting takes a thousandth of the time at most, however much there is: what took long is done less
//! often. A store that fails leaves the last counts, whose own instants say how old they are.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Timestamp};
use crate::coverage::{InTime, Ledger, Verdict};
use crate::health::Health;
use crate::metrics::Metrics;
use crate::store::accounts::ReminderState;
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
    /// By when owners must know, by the policy for all tokens.
    pub(super) in_time: InTime,
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
                let (covered, owed) = windows.follow(&self.store, self.in_time, now).await?;
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
#[derive(Debug, Default)]
struct Windows {
    past: VecDeque<Window>,
    /// When all were read.
    read: Option<Timestamp>,
}

impl Windows {
    /// How many owners knew in time, and how many should have, up to now.
    async fn follow<S: Store>(&mut self, store: &S, in_time: InTime, now: Timestamp) -> store::Result<(u64, u64)> {
        let is_stale = |read: Timestamp| now < read || now - read >= TimeDelta::days(1);
        if self.read.is_none_or(is_stale) {
            self.past.clear();
            self.read = Some(now);
        }
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
            self.past.push_back(read(store, in_time, from, end).await?);
            from = end;
        }
        let last = read(store, in_time, whole, now).await?;
        let all = || self.past.iter().chain([&last]);
        Ok((all().map(|window| window.covered).sum(), all().map(|window| window.owed).sum()))
    }
}

async fn read<S: Store>(store: &S, in_time: InTime, from: Timestamp, end: Timestamp) -> store::Result<Window> {
    let mut ledger = Ledger::default();
    let visit = |row: crate::store::reports::LedgerRow| {
        // Why somebody did not know is not asked here.
        if row.state == ReminderState::Sent {
            ledger.add(row);
        }
        ControlFlow::Continue(())
    };
    store.each_ledger_row(from, end, visit).await?;
    let mut window = Window { end, ..Window::default() };
    let visit = |token| match ledger.verdict(&token, in_time) {
        Verdict::Covered => {
            window.covered += 1;
            window.owed += 1;
        }
        Verdict::Silent(_) => window.owed += 1,
        Verdict::NotOwed => {}
    };
    store.each_expired(from, end, visit).await?;
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
