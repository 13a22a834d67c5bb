//! What is coming: how many tokens expire on each day, and what will be written and mailed about them, by the rules of
//! [`crate::policy`] and what the store holds now.

use std::collections::HashSet;

use chrono::NaiveDate;
use chrono_tz::Tz;

use crate::clock::Timestamp;
use crate::policy::{Deadline, Lead, Policy};
use crate::token::ContactId;

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

    /// Adds an active token with this deadline, whether it has a successor, and the contacts of its owner that take mail.
    pub fn add(&mut self, deadline: Deadline, replaced: bool, contacts: &[ContactId]) {
        if deadline.expires_at <= self.now {
            return;
        }
        if let Some(day) = self.day(deadline.expires_at) {
            self.days[day].expire += 1;
        }
        if replaced {
            return;
        }
        let notice = self.policy.expired_notice().then_some(Lead::EXPIRED);
        let leads: Vec<Lead> = self.policy.leads().iter().copied().chain(notice).collect();
        for lead in leads.into_iter().filter(|lead| deadline.owes(*lead)) {
            let due = lead.due_at(deadline.expires_at);
            // What was due before is written already.
            let Some(day) = self.day(due).filter(|_| due > self.now) else { continue };
            self.days[day].reminders += contacts.len() as u64;
            self.days[day].unreachable += u64::from(contacts.is_empty());
            for contact in contacts {
                self.days[day].mails += u64::from(self.mailed.insert((day, *contact)));
            }
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

    fn counts(forecast: &Forecast) -> Vec<(u64, u64, u64)> {
        forecast.days().map(|(_, day)| (day.expire, day.reminders, day.mails)).collect()
    }

    #[test]
    fn each_day_has_what_falls_due_on_it() {
        let (ann, bob) = (ContactId::new(Bucket::from_number(2), now()), ContactId::new(Bucket::from_number(3), now()));
        let mut forecast = forecast();
        forecast.add(in_days(8), false, &[ann, bob]);
        forecast.add(in_days(8), false, &[ann]);
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
        forecast.add(in_days(3), true, &[]);
        forecast.add(in_days(50), false, &[]);
        forecast.add(in_days(0), false, &[]);
        let mut expected = vec![(0, 0, 0); 10];
        expected[3] = (1, 0, 0); // a replaced token expires all the same
        assert_eq!(counts(&forecast), expected);
        // Nobody can be told of this one.
        forecast.add(in_days(3), false, &[]);
        assert_eq!(forecast.days().map(|(_, day)| day.unreachable).sum::<u64>(), 2, "the day before, and the notice");
    }
}
