//! How many messages are claimed before there is a session for them.

use std::time::Duration;

use tokio::time::Instant;

/// As many as begin in this time, in which a message can be claimed, sent and recorded where the mail server is fast.
const SPAN: Duration = Duration::from_millis(50);

/// And not more, however fast it goes.
pub(super) const MOST: usize = 64;

/// Follows how fast messages begin. For a server that takes its time nothing is claimed ahead: what this process has, no
/// other can send.
#[derive(Debug)]
pub(super) struct Ahead {
    since: Instant,
    begun: usize,
    messages: usize,
}

impl Ahead {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, begun: 0, messages: 0 }
    }

    /// How many to claim beyond those that sessions wait for.
    pub(super) fn messages(&self) -> usize {
        self.messages
    }

    /// One begins.
    pub(super) fn begins(&mut self, now: Instant) {
        self.look(now);
        self.begun += 1;
    }

    /// Takes notice of what has begun until now.
    pub(super) fn look(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        if passed < SPAN {
            return;
        }
        let share = self.begun.saturating_mul(micros(SPAN)) / micros(passed).max(1);
        *self = Self { since: now, begun: 0, messages: share.min(MOST) };
    }
}

#[cfg(test)]
impl Ahead {
    /// As for a mail server than which none is faster, from now on.
    pub(super) fn at_its_most(now: Instant) -> Self {
        // Before then nothing is counted.
        Self { since: now + Duration::from_secs(3_600), begun: 0, messages: MOST }
    }
}

fn micros(time: Duration) -> usize {
    usize::try_from(time.as_micros()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is claimed ahead when a message begins in each `every`, for a second.
    fn at_rate(every: Duration) -> usize {
        let start = Instant::now();
        let mut ahead = Ahead::new(start);
        let mut now = start;
        while now < start + Duration::from_secs(1) {
            now += every;
            ahead.begins(now);
        }
        ahead.messages()
    }

    #[test]
    fn it_follows_the_rate() {
        assert_eq!(at_rate(Duration::from_secs(1)), 0);
        assert_eq!(at_rate(Duration::from_millis(100)), 0);
        assert_eq!(at_rate(Duration::from_millis(5)), 10);
        assert_eq!(at_rate(Duration::from_millis(1)), 50);
        assert_eq!(at_rate(Duration::from_micros(50)), MOST);
    }

    #[test]
    fn it_forgets_a_rate_that_is_over() {
        let start = Instant::now();
        let mut ahead = Ahead::new(start);
        for n in 0..100 {
            ahead.begins(start + n * Duration::from_millis(1));
        }
        assert_eq!(ahead.messages(), 50);
        ahead.look(start + Duration::from_secs(60));
        assert_eq!(ahead.messages(), 0);
    }
}
