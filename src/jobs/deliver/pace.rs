//! How fast messages may begin.

use std::time::Duration;

use tokio::time::Instant;

/// What was not used for this long is lost: a rate is a rate also after an idle hour.
const SAVED: Duration = Duration::from_millis(100);

/// Allows a message whenever enough time has passed since the last one (the generic cell rate algorithm).
#[derive(Debug)]
pub(super) struct Pace {
    every: Duration,
    /// From when on the next message may begin.
    next: Option<Instant>,
}

impl Pace {
    /// One message in each `every`; zero: no limit.
    pub(super) fn new(every: Duration) -> Self {
        Self { every, next: None }
    }

    /// Whether there is a limit.
    pub(super) fn is_limited(&self) -> bool {
        !self.every.is_zero()
    }

    /// How many may begin now, `most` at most.
    pub(super) fn room(&self, now: Instant, most: usize) -> usize {
        let Some(next) = self.next.filter(|_| !self.every.is_zero()) else {
            return if self.every.is_zero() { most } else { most.min(1) };
        };
        let Some(late) = now.checked_duration_since(next) else { return 0 };
        let whole = late.min(SAVED).as_nanos() / self.every.as_nanos().max(1);
        most.min(usize::try_from(whole).unwrap_or(usize::MAX).saturating_add(1))
    }

    /// When the next may begin, unless it may now.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        self.next.filter(|next| *next > now)
    }

    /// One begins.
    pub(super) fn spend(&mut self, now: Instant) {
        if self.every.is_zero() {
            return;
        }
        let earliest = now.checked_sub(SAVED).unwrap_or(now);
        self.next = self.next.unwrap_or(now).max(earliest).checked_add(self.every);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn no_limit_is_no_limit() {
        let mut pace = Pace::new(Duration::ZERO);
        let now = Instant::now();
        for _ in 0..5 {
            assert_eq!((pace.room(now, 16), pace.wait(now)), (16, None));
            pace.spend(now);
        }
    }

    proptest! {
        /// Whoever asks whenever it likes, and begins as many as it may, never exceeds the rate by more than what is saved.
        #[test]
        fn a_rate_is_kept(millis in 1u64..500, steps in prop::collection::vec((0u64..300, 1usize..20), 1..60)) {
            let every = Duration::from_millis(millis);
            let mut pace = Pace::new(every);
            let start = Instant::now();
            let (mut now, mut begun) = (start, 0u32);
            for (pass, most) in steps {
                now += Duration::from_millis(pass);
                let room = pace.room(now, most);
                prop_assert!(room <= most);
                prop_assert_eq!(room == 0, pace.wait(now).is_some(), "it waits exactly when there is no room");
                for _ in 0..room {
                    pace.spend(now);
                    begun += 1;
                }
                let allowed = (now - start + SAVED).as_nanos() / every.as_nanos() + 1;
                prop_assert!(u128::from(begun) <= allowed, "{} of {}", begun, allowed);
            }
        }

        /// Whoever comes back when it is told to gets what the rate promises.
        #[test]
        fn a_rate_is_reached(millis in 1u64..50, messages in 1u32..100) {
            let every = Duration::from_millis(millis);
            let mut pace = Pace::new(every);
            let start = Instant::now();
            let mut now = start;
            for _ in 0..messages {
                now = pace.wait(now).unwrap_or(now);
                prop_assert!(pace.room(now, 1) == 1);
                pace.spend(now);
            }
            prop_assert_eq!(now - start, every * (messages - 1));
        }
    }
}
