//! Which job's time has come: compared once a second.

use std::sync::Arc;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Timestamp};
use crate::schedule::Cron;

/// Who is woken when.
#[derive(Debug, Default)]
pub(super) struct Ticks {
    ticks: Vec<Tick>,
    /// When it was last looked; firings after it are still to come.
    looked: Option<Timestamp>,
}

#[derive(Debug)]
struct Tick {
    cron: Cron,
    wake: Arc<Notify>,
    next: Option<Timestamp>,
}

impl Ticks {
    /// Wakes at each firing of this expression.
    pub(super) fn add(&mut self, cron: &Cron, wake: &Arc<Notify>) {
        self.ticks.push(Tick { cron: cron.clone(), wake: wake.clone(), next: None });
    }

    /// Looks whenever a second has passed.
    pub(super) async fn run(mut self, clock: impl Clock, second: Arc<Notify>, stop: CancellationToken) {
        self.look(clock.now());
        while stop.run_until_cancelled(second.notified()).await.is_some() {
            self.look(clock.now());
        }
    }

    /// Wakes those whose time has come since the last look: once, however many firings there were. A clock that went back
    /// has not fired what lies between.
    fn look(&mut self, now: Timestamp) {
        let went_back = self.looked.replace(now).is_none_or(|looked| now < looked);
        for tick in &mut self.ticks {
            if !went_back && tick.next.is_some_and(|next| now < next) {
                continue;
            }
            if !went_back {
                tick.wake.notify_one();
            }
            tick.next = tick.cron.next_after(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;

    fn woken(wake: &Notify) -> bool {
        use futures_util::FutureExt;
        wake.notified().now_or_never().is_some()
    }

    #[test]
    fn a_firing_wakes_once_whatever_the_clock_does() {
        let wake = Arc::new(Notify::new());
        let mut ticks = Ticks::default();
        ticks.add(&Cron::parse("0 */10 * * * *", chrono_tz::UTC).expect("a schedule"), &wake);
        let start: Timestamp = DateTime::from_timestamp(1_800_000_060, 0).expect("in range");
        let minutes = |n| start + TimeDelta::minutes(n);
        for (now, fires, why) in [
            (minutes(0), false, "the start has a pass of its own"),
            (minutes(8), false, "not yet"),
            (minutes(9), true, "on time"),
            (minutes(9), false, "once"),
            (minutes(500), true, "a leap ahead, or a night asleep: once"),
            (minutes(501), false, "and not again"),
            (minutes(100), false, "back"),
            (minutes(108), false, "not yet"),
            (minutes(109), true, "by the clock as it is now"),
        ] {
            ticks.look(now);
            assert_eq!(woken(&wake), fires, "{why}");
        }
    }
}
