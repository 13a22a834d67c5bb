//! What is coming: how many tokens expire on each day, and what will be written and mailed about them, by the rules of
//! [`crate::policy`] and what the store holds now.

use std::collections::{HashMap, HashSet};

use chrono::NaiveDate;
use chrono_tz::Tz;

use crate::clock::Timestamp;
use crate::policy::{Deadline, Decision, Lead, Policy, due_reminders};
use crate::store::accounts::ReminderState;
use crate::store::reports::LedgerRow;
use crate::token::{ContactId, OwnerId, Token, TokenId};

/// What happens on a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Day {
    /// Tokens that expire.
    pub expire: u64,
    /// Reminders that fall due, expired notices among them: one for each contact.
    pub reminders: u64,
    /// Mails: one for each contact that has reminders on that day, whatever their number.
    pub mails: u64,
    /// Reminders that nobody can be sent, as the owner has no contact that takes mail.
    pub unreachable: u64,
}

/// A token as a forecast sees it.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// Which token.
    pub token: TokenId,
    /// Whose it is.
    pub owner: OwnerId,
    /// Which of its deadlines this is.
    pub generation: i32,
    /// Its deadline.
    pub deadline: Deadline,
    /// Whether it has a successor.
    pub replaced: bool,
}

impl Ahead {
    /// A token that has a deadline.
    pub fn of(token: &Token) -> Option<Self> {
        let deadline = Deadline::of(token)?;
        let Token { id, owner, generation, replaced_by, .. } = token;
        Some(Self { token: *id, owner: *owner, generation: *generation, deadline, replaced: replaced_by.is_some() })
    }
}

/// What the ledger has already of deadlines that are ahead: it is not written again, and what is wider than what was said
/// is not said any more.
#[derive(Debug, Default)]
pub struct Told {
    written: HashSet<(TokenId, i32, Lead)>,
    tightest: HashMap<(TokenId, i32), Lead>,
}

impl Told {
    /// Takes a row. What the fallback was told is not what the owner knows.
    pub fn add(&mut self, row: &LedgerRow) {
        if row.escalation {
            return;
        }
        self.written.insert((row.token, row.generation, row.lead));
        if matches!(row.state, ReminderState::Pending | ReminderState::Sent) {
            let tightest = self.tightest.entry((row.token, row.generation)).or_insert(row.lead);
            *tightest = (*tightest).min(row.lead);
        }
    }

    fn leaves_out(&self, ahead: &Ahead, lead: Lead) -> bool {
        self.written.contains(&(ahead.token, ahead.generation, lead))
            || self.tightest.get(&(ahead.token, ahead.generation)).is_some_and(|tightest| *tightest < lead)
    }
}

/// A forecast that tokens are added to.
#[derive(Debug)]
pub struct Forecast {
    policy: Policy,
    now: Timestamp,
    first: NaiveDate,
    zone: Tz,
    days: Vec<Day>,
    mailed: HashSet<(usize, ContactId)>,
}

impl Forecast {
    /// For so many days from now on, as the calendar of this zone counts them.
    pub fn new(policy: Policy, now: Timestamp, days: u16, zone: Tz) -> Self {
        let first = now.with_timezone(&zone).date_naive();
        Self { policy, now, first, zone, days: vec![Day::default(); usize::from(days)], mailed: HashSet::new() }
    }

    /// The widest lead: what is due now speaks of deadlines no further ahead.
    pub fn widest(&self) -> Option<Lead> {
        self.policy.leads().first().copied()
    }

    /// Adds an active token, and the contacts of its owner that take mail.
    pub fn add(&mut self, ahead: &Ahead, told: &Told, contacts: &[ContactId]) {
        let deadline = ahead.deadline;
        if deadline.expires_at <= self.now {
            return;
        }
        if let Some(day) = self.day(deadline.expires_at) {
            self.days[day].expire += 1;
        }
        if ahead.replaced {
            return;
        }
        // What is due now and not written yet is written by the next pass: of an import, say, or of a lead that is new.
        let widest = self.widest().unwrap_or(Lead::EXPIRED);
        let due = due_reminders(&self.policy, deadline, self.now, widest);
        for (lead, _) in due.into_iter().filter(|(_, decision)| *decision == Decision::Send) {
            if !told.leaves_out(ahead, lead) {
                self.remind(0, contacts);
            }
        }
        let notice = self.policy.expired_notice().then_some(Lead::EXPIRED);
        let leads: Vec<Lead> = self.policy.leads().iter().copied().chain(notice).collect();
        for lead in leads.into_iter().filter(|lead| deadline.owes(*lead)) {
            let due = lead.due_at(deadline.expires_at);
            let Some(day) = self.day(due).filter(|_| due > self.now) else { continue };
            self.remind(day, contacts);
        }
    }

    fn remind(&mut self, day: usize, contacts: &[ContactId]) {
        let Some(of) = self.days.get_mut(day) else { return };
        of.reminders += contacts.len() as u64;
        of.unreachable += u64::from(contacts.is_empty());
        for contact in contacts {
            of.mails += u64::from(self.mailed.insert((day, *contact)));
        }
    }

    /// Each day with its date.
    pub fn days(&self) -> impl Iterator<Item = (NaiveDate, Day)> {
        self.first.iter_days().zip(self.days.iter().copied())
    }

    /// On how many tokens a day stands out: at least ten, and five times what an average day has.
    pub fn many(&self) -> u64 {
        let all: u64 = self.days.iter().map(|day| day.expire).sum();
        (all * 5 / (self.days.len() as u64).max(1)).max(10)
    }

    fn day(&self, at: Timestamp) -> Option<usize> {
        let days = (at.with_timezone(&self.zone).date_naive() - self.first).num_days();
        usize::try_from(days).ok().filter(|day| *day < self.days.len())
    }
}

#[cfg(test)]
mod tests {
    use chrono::{TimeDelta, TimeZone, Utc};

    use super::*;
    use crate::token::Bucket;

    fn now() -> Timestamp {
        Utc.with_ymd_and_hms(2027, 1, 1, 9, 0, 0).unwrap()
    }

    fn forecast() -> Forecast {
        let leads = [7, 1].map(|days| Lead::new(TimeDelta::days(days)));
        Forecast::new(Policy::new(leads, true, TimeDelta::days(7)), now(), 10, chrono_tz::UTC)
    }

    fn in_days(expires: i64) -> Deadline {
        Deadline { expires_at: now() + TimeDelta::days(expires), set_at: now() - TimeDelta::days(90) }
    }

    fn ahead(deadline: Deadline) -> Ahead {
        let bucket = Bucket::from_number(7);
        let (token, owner) = (TokenId::new(bucket, now()), OwnerId::new(bucket, now()));
        Ahead { token, owner, generation: 0, deadline, replaced: false }
    }

    fn counts(forecast: &Forecast) -> Vec<(u64, u64, u64)> {
        forecast.days().map(|(_, day)| (day.expire, day.reminders, day.mails)).collect()
    }

    #[test]
    fn each_day_has_what_falls_due_on_it() {
        let (ann, bob) = (ContactId::new(Bucket::from_number(2), now()), ContactId::new(Bucket::from_number(3), now()));
        let mut forecast = forecast();
        let told = Told::default();
        forecast.add(&ahead(in_days(8)), &told, &[ann, bob]);
        forecast.add(&ahead(in_days(8)), &told, &[ann]);
        let mut expected = vec![(0, 0, 0); 10];
        expected[1] = (0, 3, 2); // the 7d lead; ann gets one mail about two tokens
        expected[7] = (0, 3, 2);
        expected[8] = (2, 3, 2); // the notice
        assert_eq!(counts(&forecast), expected);
        assert_eq!(forecast.days().nth(8).map(|(date, _)| date.to_string()).as_deref(), Some("2027-01-09"));
    }

    #[test]
    fn what_owes_nothing_adds_nothing() {
        let mut forecast = forecast();
        let told = Told::default();
        forecast.add(&Ahead { replaced: true, ..ahead(in_days(3)) }, &told, &[]);
        forecast.add(&ahead(in_days(50)), &told, &[]);
        forecast.add(&ahead(in_days(0)), &told, &[]);
        let mut expected = vec![(0, 0, 0); 10];
        expected[3] = (1, 0, 0); // a replaced token expires all the same
        assert_eq!(counts(&forecast), expected);
        // Nobody can be told of this one.
        forecast.add(&ahead(in_days(9)), &told, &[]);
        let unreachable: Vec<u64> = forecast.days().map(|(_, day)| day.unreachable).collect();
        assert_eq!(unreachable, [0, 0, 1, 0, 0, 0, 0, 0, 1, 1], "a week before, the day before, and the notice");
    }

    #[test]
    fn what_is_due_and_not_written_comes_today() {
        let ann = ContactId::new(Bucket::from_number(2), now());
        let today = |written: &[(i64, ReminderState)]| {
            let token = ahead(in_days(3));
            let mut told = Told::default();
            for (days, state) in written {
                let lead = Lead::new(TimeDelta::days(*days));
                told.add(&LedgerRow {
                    token: token.token,
                    generation: 0,
                    lead,
                    state: *state,
                    reason: None,
                    escalation: false,
                    settled_at: None,
                });
            }
            let mut forecast = forecast();
            forecast.add(&token, &told, &[ann]);
            counts(&forecast)[0]
        };
        assert_eq!(today(&[]), (0, 1, 1), "an import that no pass has come to, or a lead that is new");
        assert_eq!(today(&[(7, ReminderState::Sent)]), (0, 0, 0));
        assert_eq!(today(&[(7, ReminderState::Unreachable)]), (0, 0, 0), "it is not written twice");
        assert_eq!(today(&[(5, ReminderState::Sent)]), (0, 0, 0), "a tighter one was said under other settings");
        assert_eq!(today(&[(5, ReminderState::Superseded)]), (0, 1, 1));
        assert_eq!(today(&[(30, ReminderState::Sent)]), (0, 1, 1), "a wider one was");
    }
}
