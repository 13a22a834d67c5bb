//! Which job's time has come: compared once a second, with the schedule that is in force then.

use std::sync::Arc;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::pass::Orders;
use crate::clock::{Clock, Timestamp};
use crate::config::Schedule;
use crate::schedule::Cron;

/// Which expression of a schedule.
pub(super) type Which = fn(&Schedule) -> &Cron;

/// Who is woken when.
#[derive(Debug, Default)]
pub(super) struct Ticks {
    ticks: Vec<Tick>,
    /// When it was last looked; firings after it are still to come.
    looked: Option<Timestamp>,
}

#[derive(Debug)]
struct Tick {
    which: Which,
    wake: Arc<Notify>,
    next: Option<Timestamp>,
}

impl Ticks {
    /// Wakes at each firing of this expression.
    pub(super) fn add(&mut self, which: Which, wake: &Arc<Notify>) {
        self.ticks.push(Tick { which, wake: wake.clone(), next: None });
    }

    /// Looks whenever a second has passed.
    pub(super) async fn run(
        mut self,
        mut orders: watch::Receiver<Arc<Orders>>,
        clock: impl Clock,
        second: Arc<Notify>,
        stop: CancellationToken,
    ) {
        loop {
            // An error: nothing replaces it any more.
            let changed = orders.has_changed().unwrap_or(false);
            let current = orders.borrow_and_update().clone();
            if changed {
                self.replaced(&current.schedule);
            }
            self.look(&current.schedule, clock.now());
            if stop.run_until_cancelled(second.notified()).await.is_none() {
                return;
            }
        }
    }

    /// There is another schedule: what it has from the last look on is still to come.
    fn replaced(&mut self, schedule: &Schedule) {
        for tick in &mut self.ticks {
            tick.next = self.looked.and_then(|looked| (tick.which)(schedule).next_after(looked));
        }
    }

    /// Wakes those whose time has come since the last look: once, however many firings there were. A clock that went back
    /// has not fired what lies between.
    fn look(&mut self, schedule: &Schedule, now: Timestamp) {
        let went_back = self.looked.replace(now).is_none_or(|looked| now < looked);
        for tick in &mut self.ticks {
            if !went_back && tick.next.is_some_and(|next| now < next) {
                continue;
            }
            if !went_back {
                tick.wake.notify_one();
            }
            tick.next = (tick.which)(schedule).next_after(now);
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

    fn at_minute(purge: &str) -> Schedule {
        let cron = |text| Cron::parse(text, chrono_tz::UTC).expect("a schedule");
        let never = cron("0 0 0 29 2 MON");
        Schedule {
            expire: never.clone(),
            remind: never.clone(),
            deliver: never.clone(),
            purge: cron(purge),
            reconcile: never,
        }
    }

    fn minutes(n: i64) -> Timestamp {
        DateTime::from_timestamp(1_800_000_060, 0).expect("in range") + TimeDelta::minutes(n)
    }

    #[test]
    fn a_firing_wakes_once_whatever_the_clock_does() {
        let wake = Arc::new(Notify::new());
        let mut ticks = Ticks::default();
        ticks.add(|schedule| &schedule.purge, &wake);
        let schedule = at_minute("0 */10 * * * *");
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
            ticks.look(&schedule, now);
            assert_eq!(woken(&wake), fires, "{why}");
        }
    }

    #[test]
    fn another_schedule_holds_from_the_last_look_on() {
        let wake = Arc::new(Notify::new());
        let mut ticks = Ticks::default();
        ticks.add(|schedule| &schedule.purge, &wake);
        let (rare, often) = (at_minute("0 0 0 1 1 *"), at_minute("0 * * * * *"));
        ticks.look(&rare, minutes(0));
        ticks.replaced(&often);
        ticks.look(&often, minutes(1));
        assert!(woken(&wake), "the new one has fired");
        ticks.replaced(&rare);
        ticks.look(&rare, minutes(2));
        assert!(!woken(&wake), "the old one is over");
    }
}
