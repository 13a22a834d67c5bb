//! Which reminders are owed, and when: pure functions, without I/O and without a clock.
//!
//! Every rule about reminders stands here and nowhere else: the jobs find candidates and write what these functions
//! decide. Each is total: no input makes one panic.

use std::fmt;

use chrono::TimeDelta;

use crate::clock::Timestamp;
use crate::token::{Status, Token, TokenId, words};

/// A deadline that moves by no more than this stays the same deadline (the same generation).
pub const SAME_DEADLINE: TimeDelta = TimeDelta::hours(1);

/// Reminders that fall due within this time of a write are looked for at once: a row may become visible to the
/// planner only some time after the instant that it bears.
pub const PLANNING_SLACK: TimeDelta = TimeDelta::hours(1);

/// How long before the deadline a reminder is due, in whole seconds. Zero is the expired notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lead(i64);

impl Lead {
    /// The expired notice.
    pub const EXPIRED: Self = Self(0);

    /// Word that somebody else than the owner moved the deadline. Longer than any lead time that can be configured: whatever
    /// else is due of that deadline speaks instead.
    pub const CHANGED: Self = Self(400_000 * 86_400);

    /// Word that the deadline that a contact was told of has moved. Any other word of the new one speaks instead.
    pub const MOVED: Self = Self(410_000 * 86_400);

    /// Word that the deadline that a contact was told of does not hold any more: the token was replaced or revoked, or never
    /// expires.
    pub const WITHDRAWN: Self = Self(420_000 * 86_400);

    /// A lead time; negative spans become zero.
    pub fn new(span: TimeDelta) -> Self {
        Self(span.num_seconds().max(0))
    }

    /// From the store, in seconds.
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds)
    }

    /// In seconds.
    pub const fn seconds(self) -> i64 {
        self.0
    }

    /// As a span of time.
    pub fn span(self) -> TimeDelta {
        TimeDelta::try_seconds(self.0).unwrap_or(TimeDelta::MAX)
    }

    /// The deadline whose reminder at this lead falls due at this instant.
    pub fn deadline_for(self, due_at: Timestamp) -> Timestamp {
        due_at.checked_add_signed(self.span()).unwrap_or(Timestamp::MAX_UTC)
    }

    /// Whether it is a lead time before the deadline, and neither the expired notice nor word of a change.
    pub fn is_time(self) -> bool {
        self > Self::EXPIRED && self < Self::CHANGED
    }

    /// Whether it corrects what was said before.
    pub fn corrects(self) -> bool {
        self >= Self::MOVED
    }

    /// When a reminder at this lead falls due.
    pub fn due_at(self, expires_at: Timestamp) -> Timestamp {
        expires_at.checked_sub_signed(self.span()).unwrap_or(Timestamp::MIN_UTC)
    }
}

impl fmt::Display for Lead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::EXPIRED {
            return f.pad("expired");
        }
        for (lead, word) in [(Self::CHANGED, "changed"), (Self::MOVED, "moved"), (Self::WITHDRAWN, "withdrawn")] {
            if *self == lead {
                return f.pad(word);
            }
        }
        let unit = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")].into_iter().find(|(n, _)| self.0 % n == 0);
        let (seconds, unit) = unit.unwrap_or((1, "s"));
        f.pad(&format!("{}{unit}", self.0 / seconds))
    }
}

/// Which reminders the configuration asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    leads: Vec<Lead>,
    expired_notice: bool,
    stale_after: TimeDelta,
}

impl Policy {
    /// A policy with these leads, in any order; zero and repetitions are dropped.
    pub fn new(leads: impl IntoIterator<Item = Lead>, expired_notice: bool, stale_after: TimeDelta) -> Self {
        let mut leads: Vec<Lead> = leads.into_iter().filter(|lead| *lead > Lead::EXPIRED).collect();
        leads.sort_unstable_by(|a, b| b.cmp(a));
        leads.dedup();
        Self { leads, expired_notice, stale_after }
    }

    /// The leads before the deadline, longest first.
    pub fn leads(&self) -> &[Lead] {
        &self.leads
    }

    /// Whether owners are told that a token has expired.
    pub fn expired_notice(&self) -> bool {
        self.expired_notice
    }
}

/// A deadline and when it was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// The instant from which the token is no longer valid.
    pub expires_at: Timestamp,
    /// When that was decided.
    pub set_at: Timestamp,
}

impl Deadline {
    /// The deadline of a token that has one.
    pub fn of(token: &Token) -> Option<Self> {
        token.expires_at.map(|expires_at| Self { expires_at, set_at: token.deadline_set_at })
    }

    fn lifetime(self) -> i64 {
        (self.expires_at - self.set_at).num_seconds()
    }

    /// Whether a reminder at this lead is owed at all: the lead is at most 80 % of the time for which the deadline was
    /// set. The expired notice always is.
    ///
    /// ```
    /// # use chrono::{TimeDelta, TimeZone, Utc};
    /// use lapsed::policy::{Deadline, Lead};
    /// let set_at = Utc.with_ymd_and_hms(2027, 1, 1, 9, 0, 0).unwrap();
    /// let week = Deadline { expires_at: set_at + TimeDelta::days(7), set_at };
    /// assert!(!week.owes(Lead::new(TimeDelta::days(7)))); // nobody is told a second later
    /// assert!(week.owes(Lead::new(TimeDelta::days(1))));
    ///
    /// let half_a_day = Deadline { expires_at: set_at + TimeDelta::hours(12), set_at };
    /// assert!(!half_a_day.owes(Lead::new(TimeDelta::days(1))));
    /// assert!(half_a_day.owes(Lead::EXPIRED));
    /// ```
    pub fn owes(self, lead: Lead) -> bool {
        lead == Lead::EXPIRED || i128::from(lead.seconds()) * 5 <= i128::from(self.lifetime()) * 4
    }
}

/// A token that was not used for so long counts as unused.
pub const UNUSED_AFTER: TimeDelta = TimeDelta::days(90);

/// Whether anybody still uses a token, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Whether its uses are known: of a token that was imported they are only where the list says so.
    pub is_known: bool,
    /// When it was last used, to the minute.
    pub last_used_at: Option<Timestamp>,
    /// When it was replaced by a successor.
    pub replaced_at: Option<Timestamp>,
}

impl Usage {
    /// Of a token.
    pub fn of(token: &Token) -> Self {
        Self::new(token.issued, token.last_used_at, token.replaced_by)
    }

    /// Of a token that was issued here or not. It was replaced when its successor was made.
    pub fn new(issued: bool, last_used_at: Option<Timestamp>, replaced_by: Option<TokenId>) -> Self {
        Self {
            is_known: issued || last_used_at.is_some(),
            last_used_at,
            replaced_at: replaced_by.map(|successor| successor.made_at().unwrap_or(Timestamp::MAX_UTC)),
        }
    }

    /// Whether the token has a successor and has been silent since: nobody needs to hear of it any more.
    ///
    /// ```
    /// # use chrono::{TimeDelta, TimeZone, Utc};
    /// use lapsed::policy::Usage;
    /// let noon = Utc.with_ymd_and_hms(2027, 1, 1, 12, 0, 0).unwrap();
    /// let used_before = Usage { is_known: true, last_used_at: Some(noon), replaced_at: Some(noon + TimeDelta::hours(1)) };
    /// assert!(used_before.is_left_behind());
    /// let used_since = Usage { last_used_at: Some(noon + TimeDelta::hours(2)), ..used_before };
    /// assert!(!used_since.is_left_behind());
    /// assert!(!Usage { replaced_at: None, ..used_before }.is_left_behind());
    /// ```
    pub fn is_left_behind(self) -> bool {
        self.replaced_at.is_some_and(|at| self.last_used_at.is_none_or(|used| used <= at))
    }

    /// Whether the token was never used, or not for [`UNUSED_AFTER`].
    pub fn is_unused(self, now: Timestamp) -> bool {
        self.is_known && self.last_used_at.is_none_or(|used| now - used > UNUSED_AFTER)
    }

    /// Whether a use at `now` makes reminders owed that no watermark will come across: until now the token may have owed
    /// none, because it was left behind or unused.
    pub fn wakes(self, deadline: Option<Deadline>, now: Timestamp) -> bool {
        let slept = self.is_left_behind() || self.is_unused(now);
        slept && deadline.is_some_and(|deadline| must_be_planned(deadline, now))
    }
}

/// What becomes of a reminder when it is written to the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// It is to be sent.
    Send,
    /// A tighter one is due as well, and speaks instead.
    Superseded,
    /// It is too late to be of use.
    Stale,
}

/// The reminders before the deadline that are due at `now`, tightest first, no wider than `widest`.
///
/// Only the tightest is to be sent. Nothing is due at or after the deadline: then the expired notice speaks.
///
/// ```
/// # use chrono::{TimeDelta, TimeZone, Utc};
/// use lapsed::policy::{due_reminders, Deadline, Decision, Lead, Policy};
/// let days = |n| Lead::new(TimeDelta::days(n));
/// let policy = Policy::new([days(30), days(7), days(1)], true, TimeDelta::days(7));
/// let set_at = Utc.with_ymd_and_hms(2027, 1, 1, 0, 0, 0).unwrap();
/// let deadline = Deadline { expires_at: set_at + TimeDelta::days(90), set_at };
///
/// let on_time = due_reminders(&policy, deadline, set_at + TimeDelta::days(60), days(30));
/// assert_eq!(on_time, [(days(30), Decision::Send)]);
///
/// // The daemon was down for a month: one reminder, not two.
/// let late = due_reminders(&policy, deadline, set_at + TimeDelta::days(85), days(30));
/// assert_eq!(late, [(days(7), Decision::Send), (days(30), Decision::Superseded)]);
///
/// assert!(due_reminders(&policy, deadline, set_at + TimeDelta::days(90), days(30)).is_empty());
/// ```
pub fn due_reminders(policy: &Policy, deadline: Deadline, now: Timestamp, widest: Lead) -> Vec<(Lead, Decision)> {
    if now >= deadline.expires_at {
        return Vec::new();
    }
    let due = policy
        .leads
        .iter()
        .rev()
        .copied()
        .filter(|lead| *lead <= widest && deadline.owes(*lead) && lead.due_at(deadline.expires_at) <= now);
    due.enumerate().map(|(i, lead)| (lead, if i == 0 { Decision::Send } else { Decision::Superseded })).collect()
}

/// Until when a reminder at this lead has something to say that no other has said: the next shorter lead falls due, or the
/// deadline passes.
///
/// ```
/// # use chrono::{TimeDelta, TimeZone, Utc};
/// use lapsed::policy::{speaks_until, Lead, Policy};
/// let days = |n| Lead::new(TimeDelta::days(n));
/// let policy = Policy::new([days(30), days(7)], true, TimeDelta::days(7));
/// let deadline = Utc.with_ymd_and_hms(2027, 4, 1, 0, 0, 0).unwrap();
/// assert_eq!(speaks_until(&policy, deadline, days(30)), deadline - TimeDelta::days(7));
/// assert_eq!(speaks_until(&policy, deadline, days(7)), deadline);
/// ```
pub fn speaks_until(policy: &Policy, expires_at: Timestamp, lead: Lead) -> Timestamp {
    let next = policy.leads.iter().find(|shorter| **shorter < lead);
    next.map_or(expires_at, |shorter| shorter.due_at(expires_at))
}

/// What becomes of the expired notice of a token whose deadline has passed; `None`: no notice is owed.
///
/// ```
/// # use chrono::{TimeDelta, TimeZone, Utc};
/// use lapsed::policy::{expired_notice, Decision, Policy};
/// let policy = Policy::new([], true, TimeDelta::days(7));
/// let deadline = Utc.with_ymd_and_hms(2027, 1, 1, 0, 0, 0).unwrap();
/// assert_eq!(expired_notice(&policy, deadline, deadline), Some(Decision::Send));
/// assert_eq!(expired_notice(&policy, deadline, deadline + TimeDelta::days(8)), Some(Decision::Stale));
/// assert_eq!(expired_notice(&policy, deadline, deadline - TimeDelta::seconds(1)), None);
/// ```
pub fn expired_notice(policy: &Policy, expires_at: Timestamp, now: Timestamp) -> Option<Decision> {
    if !policy.expired_notice || now < expires_at {
        return None;
    }
    Some(if now - expires_at > policy.stale_after { Decision::Stale } else { Decision::Send })
}

/// What becomes of the word that somebody else than the owner moved a deadline from `moved_from` (the end of the year 9999: from
/// "never"); `None`: it is not owed. It is where the deadline moved by more than the shortest lead, and lies ahead. `due` are the
/// reminders that are due of the new deadline: one that is sent says the same.
///
/// ```
/// # use chrono::{TimeDelta, TimeZone, Utc};
/// use lapsed::policy::{change_notice, Decision, Lead, Policy};
/// let days = |n| TimeDelta::days(n);
/// let policy = Policy::new([Lead::new(days(7)), Lead::new(days(1))], true, days(7));
/// let now = Utc.with_ymd_and_hms(2027, 1, 1, 0, 0, 0).unwrap();
/// let notice = |from, to| change_notice(&policy, now + days(from), now + days(to), now, &[]);
/// assert_eq!(notice(90, 20), Some(Decision::Send));
/// assert_eq!(notice(90, 89), None);
/// let due = [(Lead::new(days(7)), Decision::Send)];
/// assert_eq!(change_notice(&policy, now + days(90), now + days(6), now, &due), Some(Decision::Superseded));
/// ```
pub fn change_notice(
    policy: &Policy,
    moved_from: Timestamp,
    expires_at: Timestamp,
    now: Timestamp,
    due: &[(Lead, Decision)],
) -> Option<Decision> {
    let least = policy.leads.last().map_or(SAME_DEADLINE, |lead| lead.span());
    if now >= expires_at || (expires_at - moved_from).abs() <= least {
        return None;
    }
    let said = due.iter().any(|(_, decision)| *decision == Decision::Send);
    Some(if said { Decision::Superseded } else { Decision::Send })
}

/// Until when the word that a deadline was changed is of use: the next lead falls due, or the deadline passes.
pub fn change_is_news_until(policy: &Policy, expires_at: Timestamp, now: Timestamp) -> Timestamp {
    let next = policy.leads.iter().map(|lead| lead.due_at(expires_at)).find(|due| *due > now);
    next.unwrap_or(expires_at)
}

/// Whether a deadline that is written at `now` may owe reminders that no watermark will come across, whatever the
/// leads are: they are due already, or within [`PLANNING_SLACK`].
///
/// The leads that a deadline can owe reach back to `set_at` plus a fifth of its lifetime. Asking only that, and not for
/// the configured leads, keeps writers and daemons with different configurations safe from each other.
///
/// ```
/// # use chrono::{TimeDelta, TimeZone, Utc};
/// use lapsed::policy::{must_be_planned, Deadline};
/// let now = Utc.with_ymd_and_hms(2027, 1, 1, 0, 0, 0).unwrap();
/// let fresh = Deadline { expires_at: now + TimeDelta::days(90), set_at: now };
/// assert!(!must_be_planned(fresh, now));
/// let imported = Deadline { set_at: now - TimeDelta::days(85), expires_at: now + TimeDelta::days(5) };
/// assert!(must_be_planned(imported, now));
/// ```
pub fn must_be_planned(deadline: Deadline, now: Timestamp) -> bool {
    let left = (deadline.expires_at - now).num_seconds();
    let widest_owed = i128::from(deadline.lifetime()) * 4;
    i128::from(left - PLANNING_SLACK.num_seconds()) * 5 <= widest_owed
}

/// Whether a change of the deadline re-arms its reminders: it moves by more than [`SAME_DEADLINE`], or from or to "never".
pub fn is_another_deadline(old: Option<Timestamp>, new: Option<Timestamp>) -> bool {
    match (old, new) {
        (None, None) => false,
        (Some(old), Some(new)) => (new - old).abs() > SAME_DEADLINE,
        _ => true,
    }
}

/// A reminder that is about to be sent, as the ledger has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// How long before the deadline it was due.
    pub lead: Lead,
    /// Which of the token's deadlines it speaks of.
    pub generation: i32,
    /// The tightest lead of the same token, deadline and contact that the ledger has as pending or sent.
    pub tightest: Lead,
}

/// What becomes of a reminder at the moment of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It is still true.
    Speak,
    /// A tighter one speaks.
    Superseded(Reason),
    /// It is no longer true.
    Cancelled(Reason),
}

/// Why a reminder was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The token is gone.
    Deleted,
    /// The token was revoked.
    Revoked,
    /// The token has a successor, and was not used since.
    Replaced,
    /// The deadline was moved.
    DeadlineChanged,
    /// The clock had run ahead when the expired notice was written.
    NotYet,
    /// The deadline has passed; the expired notice speaks.
    DeadlinePassed,
    /// A reminder closer to the deadline speaks.
    TighterLead,
    /// The contact no longer speaks for the owner.
    NoLongerContact,
    /// It would have come too late to be of use.
    Stale,
    /// The owner has no contact that takes mail.
    NoContact,
    /// The contact takes no mail any more.
    Suppressed,
    /// The mail could not be delivered.
    Undeliverable,
    /// The store's row of the token or of its owner is broken.
    Unreadable,
    /// Somebody who operates lapsed cancelled its message.
    ByHand,
    /// What it was to correct holds again, was never said, or is over.
    NothingToCorrect,
}

words!(Reason {
    Deleted => "the token was deleted",
    Revoked => "the token was revoked",
    Replaced => "the token was replaced",
    DeadlineChanged => "the deadline was changed",
    NotYet => "the deadline had not been reached",
    DeadlinePassed => "the deadline had passed",
    TighterLead => "a later reminder spoke instead",
    NoLongerContact => "the contact no longer speaks for the owner",
    Stale => "the deadline had passed too long ago",
    NoContact => "the owner has no contact that takes mail",
    Suppressed => "the contact is suppressed",
    Undeliverable => "the mail could not be delivered",
    Unreadable => "the token or its owner cannot be read from the store",
    ByHand => "an operator cancelled the message",
    NothingToCorrect => "there is nothing to correct any more",
});

/// Whether a reminder is still true of its token, as the token is at `now`.
pub fn recheck(claimed: Claimed, token: Option<&Token>, now: Timestamp) -> Verdict {
    use Verdict::{Cancelled, Speak, Superseded};
    let Some(token) = token else { return Cancelled(Reason::Deleted) };
    if claimed.lead == Lead::WITHDRAWN {
        // Whether there is anything to withdraw depends on what was said: see `correction`.
        let same = token.generation == claimed.generation;
        return if same { Speak } else { Cancelled(Reason::DeadlineChanged) };
    }
    if Usage::of(token).is_left_behind() {
        return Cancelled(Reason::Replaced);
    }
    if token.status == Status::Revoked {
        return Cancelled(Reason::Revoked);
    }
    let Some(expires_at) = token.expires_at.filter(|_| token.generation == claimed.generation) else {
        return Cancelled(Reason::DeadlineChanged);
    };
    match (claimed.lead == Lead::EXPIRED, now >= expires_at) {
        (true, true) => Speak,
        (true, false) => Cancelled(Reason::NotYet),
        (false, true) => Superseded(Reason::DeadlinePassed),
        (false, false) if claimed.tightest < claimed.lead => Superseded(Reason::TighterLead),
        (false, false) => Speak,
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range")
    }

    fn policies() -> impl Strategy<Value = Policy> {
        prop::collection::vec(1i64..100 * 86_400, 0..6)
            .prop_map(|leads| Policy::new(leads.into_iter().map(Lead::from_seconds), true, TimeDelta::days(7)))
    }

    const WIDEST: Lead = Lead::from_seconds(i64::MAX);

    proptest! {
        #[test]
        fn at_most_one_reminder_speaks_and_it_is_the_tightest(
            policy in policies(), life in 0i64..200 * 86_400, now in -86_400i64..200 * 86_400,
        ) {
            let deadline = Deadline { set_at: at(0), expires_at: at(life) };
            let due = due_reminders(&policy, deadline, at(now), WIDEST);
            let speaking: Vec<_> = due.iter().filter(|(_, decision)| *decision == Decision::Send).collect();
            prop_assert!(speaking.len() <= 1);
            if let Some((lead, _)) = speaking.first() {
                prop_assert!(due.iter().all(|(other, _)| other >= lead));
                prop_assert!(lead.due_at(deadline.expires_at) <= at(now));
                prop_assert!(now < life);
            }
            // Compared with the words of the rule: each owed lead that has come is there, and nothing else is.
            for lead in policy.leads() {
                let owed = lead.seconds() as f64 <= 0.8 * life as f64;
                let came = life - lead.seconds() <= now && now < life;
                prop_assert_eq!(due.iter().any(|(other, _)| other == lead), owed && came);
            }
        }

        #[test]
        fn an_unmarked_deadline_owes_nothing_within_the_hour(
            lead in 1i64..100 * 86_400, age in 0i64..100 * 86_400, left in 1i64..100 * 86_400,
        ) {
            let deadline = Deadline { set_at: at(-age), expires_at: at(left) };
            let lead = Lead::from_seconds(lead);
            if !must_be_planned(deadline, at(0)) && deadline.owes(lead) {
                prop_assert!(lead.due_at(deadline.expires_at) > at(0) + PLANNING_SLACK);
            }
        }

        #[test]
        fn an_owed_reminder_falls_due_a_quarter_of_its_lead_after_the_deadline_was_set(
            lead in 1i64..100 * 86_400, life in 1i64..200 * 86_400,
        ) {
            let deadline = Deadline { set_at: at(0), expires_at: at(life) };
            let lead = Lead::from_seconds(lead);
            if deadline.owes(lead) {
                prop_assert!((lead.due_at(deadline.expires_at) - at(0)).num_seconds() * 4 >= lead.seconds());
            }
        }

        #[test]
        fn no_instant_panics(a: i32, b: i32, c: i32, lead: i64) {
            let deadline = Deadline { set_at: at(a.into()), expires_at: at(b.into()) };
            let policy = Policy::new([Lead::from_seconds(lead)], true, TimeDelta::zero());
            due_reminders(&policy, deadline, at(c.into()), WIDEST);
            must_be_planned(deadline, at(c.into()));
            expired_notice(&policy, at(b.into()), at(c.into()));
            let _ = Lead::from_seconds(lead).due_at(Timestamp::MIN_UTC);
        }
    }

    #[test]
    fn a_page_of_one_lead_leaves_wider_ones_alone() {
        let leads = [30, 7, 1].map(|n| Lead::new(TimeDelta::days(n)));
        let policy = Policy::new(leads, true, TimeDelta::days(7));
        let deadline = Deadline { set_at: at(0), expires_at: at(90 * 86_400) };
        let due = due_reminders(&policy, deadline, at(84 * 86_400), leads[1]);
        assert_eq!(due, [(leads[1], Decision::Send)]);
    }

    #[test]
    fn a_deadline_that_moves_by_an_hour_is_the_same() {
        assert!(!is_another_deadline(Some(at(0)), Some(at(3600))));
        assert!(is_another_deadline(Some(at(0)), Some(at(-3601))));
        assert!(is_another_deadline(None, Some(at(0))) && is_another_deadline(Some(at(0)), None));
        assert!(!is_another_deadline(None, None));
    }

    #[test]
    fn leads_print_as_they_are_configured() {
        let printed = [2_592_000, 129_600, 90, 0].map(|seconds| Lead::from_seconds(seconds).to_string());
        assert_eq!(printed, ["30d", "36h", "90s", "expired"]);
    }
}
