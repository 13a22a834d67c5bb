//! Which of several mail servers to use: the first that can be reached, and none before it for longer than needed.
//!
//! Shared by the sessions of a process, so that what one has found out spares the others the wait. Held in memory: after a
//! restart every server is tried again.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Relay;

/// How long a server that could not be reached is passed over, where there is another.
const PASS_OVER: Duration = Duration::from_secs(5 * 60);

/// The servers, in the order in which they are wanted.
#[derive(Debug)]
pub(super) struct Relays {
    all: Vec<Relay>,
    /// Of each, until when it is passed over.
    passed_over: Mutex<Vec<Option<Instant>>>,
}

impl Relays {
    pub(super) fn new(all: Vec<Relay>) -> Self {
        let passed_over = Mutex::new(vec![None; all.len()]);
        Self { all, passed_over }
    }

    pub(super) fn get(&self, at: usize) -> Option<&Relay> {
        self.all.get(at)
    }

    /// In which order to try them: those that are passed over come last, because the others may fail, too.
    pub(super) fn order(&self, now: Instant) -> Vec<usize> {
        let passed_over = self.lock();
        let (last, mut order): (Vec<_>, Vec<_>) =
            (0..self.all.len()).partition(|at| passed_over.get(*at).is_some_and(|until| is_later(*until, now)));
        order.extend(last);
        order
    }

    /// A server before this one that has been passed over for long enough. The caller tries it; for the others it is
    /// passed over meanwhile.
    pub(super) fn better_than(&self, at: usize, now: Instant) -> Option<usize> {
        let mut passed_over = self.lock();
        let better = (0..at).find(|at| passed_over.get(*at).is_some_and(|until| !is_later(*until, now)))?;
        if let Some(until) = passed_over.get_mut(better) {
            *until = now.checked_add(PASS_OVER);
        }
        Some(better)
    }

    /// Whether there was an answer.
    pub(super) fn tried(&self, at: usize, reached: bool, now: Instant) {
        if let Some(until) = self.lock().get_mut(at) {
            *until = if reached { None } else { now.checked_add(PASS_OVER) };
        }
    }

    /// A panic elsewhere leaves nothing half-done here.
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Instant>>> {
        self.passed_over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_later(until: Option<Instant>, now: Instant) -> bool {
    until.is_some_and(|until| until > now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Relays {
        Relays::new((1..=3).map(|port| Relay { host: "mx.example.org".into(), port }).collect())
    }

    #[test]
    fn one_that_cannot_be_reached_comes_last_for_a_while() {
        let (relays, now) = (three(), Instant::now());
        assert_eq!(relays.order(now), [0, 1, 2]);
        relays.tried(0, false, now);
        assert_eq!(relays.order(now), [1, 2, 0]);
        relays.tried(2, false, now);
        assert_eq!(relays.order(now), [1, 0, 2]);
        relays.tried(1, false, now);
        assert_eq!(relays.order(now), [0, 1, 2], "if none can be reached, none is better");
        relays.tried(2, true, now);
        assert_eq!(relays.order(now), [2, 0, 1]);
        assert_eq!(relays.order(now + PASS_OVER), [0, 1, 2]);
    }

    #[test]
    fn one_session_finds_out_whether_a_better_one_is_back() {
        let (relays, now) = (three(), Instant::now());
        relays.tried(0, false, now);
        assert_eq!(relays.better_than(1, now), None);
        let later = now + PASS_OVER;
        assert_eq!(relays.better_than(0, later), None, "there is none before the first");
        assert_eq!(relays.better_than(1, later), Some(0));
        assert_eq!(relays.better_than(1, later), None, "one asks, the others wait");
        relays.tried(0, true, later);
        assert_eq!(relays.better_than(1, later), Some(0), "it is back: the others follow");
    }
}
