//! Time as an argument: the only place that asks a machine what time it is.
//!
//! Guarantees that an instant is whole seconds, rounded down, so that "at the deadline" means the same everywhere.
//! With PostgreSQL all hosts follow the database's clock: [`SystemClock::follow`] takes what it said. A crash loses
//! nothing: the offset is measured again at the next start.

use std::sync::atomic::{AtomicI64, Ordering};

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};

/// An instant, in whole seconds.
pub type Timestamp = DateTime<Utc>;

/// What a PostgreSQL store is asked for its clock.
pub const DATABASE_TIME: &str = "SELECT clock_timestamp()";

/// Tells the time.
pub trait Clock: Send + Sync + 'static {
    /// The current instant, in whole seconds.
    fn now(&self) -> Timestamp;
}

impl<C: Clock> Clock for std::sync::Arc<C> {
    fn now(&self) -> Timestamp {
        (**self).now()
    }
}

/// An instant without its fraction of a second.
pub fn whole_seconds(instant: DateTime<Utc>) -> Timestamp {
    instant.trunc_subsecs(0)
}

/// The host's clock plus an offset, with which all processes of one store agree.
#[derive(Debug, Default)]
pub struct SystemClock {
    offset_millis: AtomicI64,
}

impl SystemClock {
    /// The host's clock with its fraction of a second: for [`SystemClock::follow`].
    #[expect(clippy::disallowed_methods, reason = "the one place that may")]
    pub fn host(&self) -> DateTime<Utc> {
        Utc::now()
    }

    /// Follows another clock, which said `told` at some moment between the host's `before` and `after`.
    /// Returns by how much the host's clock differs from it.
    pub fn follow(&self, before: DateTime<Utc>, told: DateTime<Utc>, after: DateTime<Utc>) -> TimeDelta {
        let offset = told - (before + (after - before) / 2);
        self.offset_millis.store(offset.num_milliseconds(), Ordering::Relaxed);
        offset
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        whole_seconds(self.host() + TimeDelta::milliseconds(self.offset_millis.load(Ordering::Relaxed)))
    }
}

/// A clock that a test or a simulation moves by hand.
#[derive(Debug)]
pub struct ManualClock {
    seconds: AtomicI64,
}

impl ManualClock {
    /// A clock that stands at this instant.
    pub fn at(instant: Timestamp) -> Self {
        Self { seconds: AtomicI64::new(instant.timestamp()) }
    }

    /// Moves the clock to this instant, forward or back.
    pub fn set(&self, instant: Timestamp) {
        self.seconds.store(instant.timestamp(), Ordering::SeqCst);
    }

    /// Moves the clock on (or back, by a negative span) and returns the new instant.
    pub fn advance(&self, span: TimeDelta) -> Timestamp {
        self.seconds.fetch_add(span.num_seconds(), Ordering::SeqCst);
        self.now()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        DateTime::from_timestamp(self.seconds.load(Ordering::SeqCst), 0).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_a_wrong_clock_follows_the_database() {
        let clock = SystemClock::default();
        let host = clock.host();
        let database = host + TimeDelta::hours(3);
        let differs = clock.follow(host, database, host);
        assert_eq!(differs, TimeDelta::hours(3));
        let error = clock.now() - database;
        assert!(error.abs() < TimeDelta::minutes(1), "{error}");
        assert_eq!(clock.now().timestamp_subsec_nanos(), 0);
    }
}
