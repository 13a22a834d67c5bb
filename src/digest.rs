//! When a message may go: it waits for more to say, for the hours in which its reader works, and for some time after the
//! last one.
//!
//! Pure functions, without I/O and without a clock. Guarantees that no wait, however it is configured, makes a reminder
//! come at or after its token's deadline, or after the instant at which the next shorter lead falls due: the hold takes a
//! quarter of that time at most, and a longer wait that would take more than half of it is not made at all. Each function
//! is total.

mod window;

use chrono::TimeDelta;
use chrono_tz::Tz;

use crate::clock::Timestamp;
use crate::policy::{Lead, Policy, change_is_news_until, speaks_until};
pub use window::Window;

/// How long word that is in no hurry waits at most for another mail to take it along.
const COMPANY: TimeDelta = TimeDelta::days(14);

/// How messages wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// How long a message waits for more to say; not negative.
    pub hold: TimeDelta,
    /// The hours in which mail may go that is not urgent; `None`: all.
    pub window: Option<Window>,
    /// The least time between two mails to a contact, of which the later is not urgent; `None`: any.
    pub min_interval: Option<TimeDelta>,
    /// A reminder with so little time left until its deadline is urgent; not negative.
    pub urgent_within: TimeDelta,
}

/// A reminder that is about to be written, and what its wait depends on.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// The instant of the decision.
    pub now: Timestamp,
    /// What it speaks of; `None` for an expired notice, which speaks of what has happened.
    pub ahead: Option<Ahead>,
    /// The zone of whoever reads it.
    pub zone: Tz,
    /// When its reader was last sent a mail.
    pub mailed_at: Option<Timestamp>,
}

/// What a reminder must not come too late for.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// The deadline that it speaks of.
    pub expires_at: Timestamp,
    /// When the next shorter lead falls due; the deadline, where there is none.
    pub until: Timestamp,
}

impl Ahead {
    /// Of a reminder by this policy; `None` for an expired notice.
    pub fn of(policy: &Policy, expires_at: Timestamp, lead: Lead, now: Timestamp) -> Option<Self> {
        let until = match lead {
            Lead::EXPIRED => return None,
            // Word of a change is news until the next lead falls due.
            lead if lead >= Lead::CHANGED => change_is_news_until(policy, expires_at, now),
            lead => speaks_until(policy, expires_at, lead),
        };
        Some(Self { expires_at, until })
    }
}

impl Digest {
    /// Messages wait for more to say, and for nothing else.
    pub fn holding(hold: TimeDelta) -> Self {
        Self { hold, window: None, min_interval: None, urgent_within: TimeDelta::zero() }
    }

    /// From which instant on a reminder may be sent. Never before `now`.
    ///
    /// ```
    /// # use chrono::{TimeDelta, TimeZone, Utc};
    /// use lapsed::digest::{Ahead, Digest, Waiting};
    /// let digest = Digest {
    ///     hold: TimeDelta::minutes(10),
    ///     window: Some("mon-fri 08:00-18:00".parse().unwrap()),
    ///     min_interval: None,
    ///     urgent_within: TimeDelta::hours(24),
    /// };
    /// // It falls due on a Friday evening, 7 days ahead; the next lead is 1 day.
    /// let friday = Utc.with_ymd_and_hms(2027, 1, 8, 21, 0, 0).unwrap();
    /// let ahead = Ahead { expires_at: friday + TimeDelta::days(7), until: friday + TimeDelta::days(6) };
    /// let waiting = Waiting { now: friday, ahead: Some(ahead), zone: chrono_tz::UTC, mailed_at: None };
    /// let monday = Utc.with_ymd_and_hms(2027, 1, 11, 8, 0, 0).unwrap();
    /// assert_eq!(digest.goes_at(waiting), monday);
    ///
    /// // 2 days ahead, and Monday would be too late to be of use: it goes after the hold.
    /// let ahead = Ahead { expires_at: friday + TimeDelta::days(2), until: friday + TimeDelta::days(2) };
    /// assert_eq!(digest.goes_at(Waiting { ahead: Some(ahead), ..waiting }), friday + TimeDelta::minutes(10));
    ///
    /// // What has expired does not wait for Monday.
    /// assert_eq!(digest.goes_at(Waiting { ahead: None, ..waiting }), friday + TimeDelta::minutes(10));
    /// ```
    pub fn goes_at(&self, waiting: Waiting) -> Timestamp {
        let Waiting { now, ahead, zone, mailed_at } = waiting;
        let hold = self.hold.max(TimeDelta::zero());
        let Some(Ahead { expires_at, until }) = ahead else {
            return later(now, hold);
        };
        let left = (until.min(expires_at) - now).max(TimeDelta::zero());
        let held = later(now, hold.min(whole_seconds(left / 4)));
        let Some(urgent_at) = expires_at.checked_sub_signed(self.urgent_within).filter(|at| *at > now) else {
            return held;
        };
        // One that lies in the future was sent by a wrong clock, and is not waited for.
        let mailed_at = mailed_at.filter(|at| *at <= now).zip(self.min_interval);
        let spaced = mailed_at.map(|(at, interval)| later(at, interval)).filter(|at| *at > held);
        let latest = later(now, whole_seconds(left / 2));
        // At night rather than often, and of both rather neither.
        let waits = [spaced.and_then(|spaced| self.within(spaced, zone)), self.held_within(now, held, zone), spaced];
        let at = waits.into_iter().flatten().find(|at| *at <= latest).unwrap_or(held);
        // What becomes urgent while it waits has waited long enough.
        at.min(urgent_at.max(held))
    }

    /// From when on word goes alone that any other mail to its reader may take along before, and that is of use until then: when half
    /// of that time is over, or two weeks are, and in the window where that is not much later. Never before `now`, and before `until`.
    pub fn goes_alone_at(&self, now: Timestamp, until: Timestamp, zone: Tz) -> Timestamp {
        let left = (until - now).max(TimeDelta::zero());
        let half = later(now, whole_seconds(left / 2).min(COMPANY));
        let latest = later(half, whole_seconds(left / 4));
        self.within(half, zone).filter(|at| *at <= latest).unwrap_or(half)
    }

    /// How long a reminder at a lead that is the shortest waits at most.
    pub fn longest_wait(&self, lead: Lead) -> TimeDelta {
        let quiet = self.window.is_none() && self.min_interval.is_none();
        if quiet || lead.span() <= self.urgent_within { self.hold.min(lead.span() / 4) } else { lead.span() / 2 }
    }

    /// The first instant from `at` on that lies in the window.
    fn within(&self, at: Timestamp, zone: Tz) -> Option<Timestamp> {
        let Some(window) = &self.window else { return Some(at) };
        window.next(at, zone).map(|(opens, _)| opens.max(at))
    }

    /// The same for the end of the hold. What falls due within the window goes at its end rather than in the next one.
    fn held_within(&self, now: Timestamp, held: Timestamp, zone: Tz) -> Option<Timestamp> {
        let open = self.window.and_then(|window| window.next(now, zone)).filter(|(opens, _)| *opens <= now);
        match open {
            Some((_, closes)) => Some(held.min(closes)),
            None => self.within(held, zone),
        }
    }
}

fn later(at: Timestamp, span: TimeDelta) -> Timestamp {
    at.checked_add_signed(span).unwrap_or(Timestamp::MAX_UTC)
}

fn whole_seconds(span: TimeDelta) -> TimeDelta {
    TimeDelta::seconds(span.num_seconds())
}

#[cfg(test)]
mod tests;
