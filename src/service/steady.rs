//! Whether the clock can be believed: one that leaps is watched for a while before anything is planned by it.
//!
//! The clock is compared with the time that has really passed, which no setting of the clock changes. (A host that was
//! asleep looks like one whose clock leapt ahead: it waits a minute as well.)

use std::time::{Duration, Instant};

use chrono::TimeDelta;

use crate::clock::Timestamp;

/// How far ahead a clock may leap between two passes.
const AHEAD: TimeDelta = TimeDelta::hours(1);

/// How far back: anything less is a correction.
const BACK: TimeDelta = TimeDelta::minutes(1);

/// For how long a clock must be steady after it leapt.
const STEADY_FOR: Duration = Duration::from_secs(60);

/// What the clock showed, and since when it has been steady.
#[derive(Debug, Default)]
pub(super) struct Steady {
    last: Option<(Timestamp, Instant)>,
    leapt: Option<Leapt>,
}

#[derive(Debug)]
struct Leapt {
    at: Instant,
    why: String,
}

/// The clock cannot be believed yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Waits {
    /// Why, in words.
    pub(super) why: String,
    /// Whether this was found out just now.
    pub(super) new: bool,
}

impl Steady {
    /// A clock that showed a later time before than it does now, as the store knows, is not believed at once.
    pub(super) fn started(&mut self, now: Timestamp, passed: Instant, last_pass: Option<Timestamp>) {
        self.last = Some((now, passed));
        if let Some(last_pass) = last_pass.filter(|last| *last - now > BACK) {
            self.leap(now - last_pass, passed);
            tracing::warn!("{}", self.leapt.as_ref().map_or("", |leapt| &leapt.why));
        }
    }

    /// Compares the clock with the time that has passed; `Some` while it cannot be believed.
    pub(super) fn look(&mut self, now: Timestamp, passed: Instant) -> Option<Waits> {
        let mut new = false;
        if let Some((then, before)) = self.last.replace((now, passed)) {
            let really = TimeDelta::from_std(passed.saturating_duration_since(before)).unwrap_or(TimeDelta::MAX);
            let by = (now - then) - really;
            if by > AHEAD || by < -BACK {
                self.leap(by, passed);
                new = true;
            }
        }
        let leapt = self.leapt.take_if(|leapt| passed.saturating_duration_since(leapt.at) >= STEADY_FOR);
        if leapt.is_some() {
            tracing::info!("the clock has been steady for a minute: planning goes on");
        }
        self.leapt.as_ref().map(|leapt| Waits { why: leapt.why.clone(), new })
    }

    fn leap(&mut self, by: TimeDelta, at: Instant) {
        let how = if by > TimeDelta::zero() { "leapt ahead" } else { "went back" };
        let seconds = by.num_seconds().abs();
        let span = match seconds {
            s if s >= 2 * 86_400 => format!("{} days", s / 86_400),
            s if s >= 2 * 3_600 => format!("{} hours", s / 3_600),
            s => format!("{} minutes", s / 60),
        };
        let why = format!("the clock {how} by {span}: planning waits until it has been steady for a minute");
        self.leapt = Some(Leapt { at, why });
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    struct Host {
        clock: Timestamp,
        passed: Instant,
        steady: Steady,
    }

    impl Host {
        fn new() -> Self {
            let clock = DateTime::from_timestamp(1_800_000_000, 0).expect("in range");
            let mut steady = Steady::default();
            let passed = Instant::now();
            steady.started(clock, passed, None);
            Self { clock, passed, steady }
        }

        /// So many seconds pass, and somebody sets the clock on (or back) by some more.
        fn after(&mut self, seconds: u64, set_by: TimeDelta) -> Option<Waits> {
            self.passed += Duration::from_secs(seconds);
            self.clock += TimeDelta::seconds(seconds.cast_signed()) + set_by;
            self.steady.look(self.clock, self.passed)
        }
    }

    const NOT: TimeDelta = TimeDelta::zero();

    #[test]
    fn a_clock_that_leaps_is_believed_after_a_minute() {
        for (by, words) in
            [(TimeDelta::days(400), "leapt ahead by 400 days"), (-TimeDelta::hours(3), "went back by 3 hours")]
        {
            let mut host = Host::new();
            assert_eq!(host.after(5, NOT), None);
            let waits = host.after(5, by).expect("it leapt");
            assert!(waits.new && waits.why.contains(words), "{waits:?}");
            let waits = host.after(59, NOT).expect("not long enough");
            assert!(!waits.new);
            assert_eq!(host.after(1, NOT), None);
        }
    }

    #[test]
    fn one_that_leaps_again_is_watched_anew() {
        let mut host = Host::new();
        host.after(5, TimeDelta::hours(5));
        assert!(host.after(50, -TimeDelta::hours(5)).is_some_and(|waits| waits.new));
        assert!(host.after(50, NOT).is_some());
        assert_eq!(host.after(10, NOT), None);
    }

    #[test]
    fn corrections_and_long_passes_are_no_leaps() {
        let mut host = Host::new();
        assert_eq!(host.after(5, TimeDelta::minutes(59)), None);
        assert_eq!(host.after(5, -TimeDelta::seconds(30)), None);
        assert_eq!(host.after(8 * 3_600, NOT), None, "a pass that took all night");
    }

    #[test]
    fn a_start_before_the_last_pass_waits_too() {
        let mut host = Host::new();
        let mut steady = Steady::default();
        steady.started(host.clock, host.passed, Some(host.clock + TimeDelta::days(3)));
        std::mem::swap(&mut steady, &mut host.steady);
        assert!(host.after(5, NOT).is_some_and(|waits| waits.why.contains("went back by 3 days")));
        assert_eq!(host.after(60, NOT), None);
    }
}
