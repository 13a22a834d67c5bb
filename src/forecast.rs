//! What is coming: how many tokens expire on each day, and what will be written and mailed about them, by the rules of
//! [`crate::policy`] and what the store holds now.

use std::collections::{HashMap, HashSet};

use chrono::{NaiveDate, TimeDelta};
use chrono_tz::Tz;

use crate::clock::Timestamp;
use crate::policies::{Group, Traits, group_of};
use crate::policy::{Deadline, Decision, Lead, Policy, Usage, due_reminders};
use crate::store::accounts::ReminderState;
use crate::store::reports::LedgerRow;
use crate::token::{ContactId, TokenId};

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
    /// Which of its deadlines this is.
    pub generation: i32,
    /// Its deadline.
    pub deadline: Deadline,
    /// Whether anybody still uses it. What nobody uses now is taken to stay so.
    pub usage: Usage,
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
    groups: Vec<Group>,
    skip_unused: bool,
    now: Timestamp,
    first: NaiveDate,
    zone: Tz,
    days: Vec<Day>,
    /// Who is mailed on each day, as far as tokens may still be added to it.
    mailed: Vec<HashSet<ContactId>>,
    /// To how many days, from the first one on, none is added any more.
    complete: usize,
}

impl Forecast {
    /// For so many days from now on, as the calendar of this zone counts them.
    pub fn new(policy: Policy, groups: Vec<Group>, skip_unused: bool, now: Timestamp, days: u16, zone: Tz) -> Self {
        let first = now.with_timezone(&zone).date_naive();
        Self {
            policy,
            groups,
            skip_unused,
            now,
            first,
            zone,
            days: vec![Day::default(); usize::from(days)],
            mailed: vec![HashSet::new(); usize::from(days)],
            complete: 0,
        }
    }

    /// The widest lead: what is due now speaks of deadlines no further ahead.
    pub fn widest(&self) -> Option<Lead> {
        let policies = self.groups.iter().map(|group| &group.policy).chain([&self.policy]);
        policies.filter_map(|policy| policy.leads().first()).max().copied()
    }

    /// No token whose deadline lies behind this instant counts.
    pub fn until(&self) -> Timestamp {
        self.after_days(self.days.len() as i64)
    }

    /// From here on, tokens whose deadline lies before this instant are not added any more: memory follows the days that may
    /// still change.
    pub fn reached(&mut self, deadline: Timestamp) {
        while self.complete < self.days.len() && self.after_days(self.complete as i64) < deadline {
            self.mailed[self.complete] = HashSet::new();
            self.complete += 1;
        }
    }

    /// After the day with this number, wherever the calendar's day ends, and the widest lead.
    fn after_days(&self, day: i64) -> Timestamp {
        let widest = self.widest().map_or(TimeDelta::zero(), Lead::span);
        let span = TimeDelta::try_days(day + 2).and_then(|days| days.checked_add(&widest));
        span.and_then(|span| self.now.checked_add_signed(span)).unwrap_or(Timestamp::MAX_UTC)
    }

    /// Whether some tokens follow a policy of their own.
    pub fn has_groups(&self) -> bool {
        !self.groups.is_empty()
    }

    /// The place of the policy that a token follows, where it is not the one for all.
    pub fn group_of(&self, token: &Traits) -> Option<usize> {
        group_of(&self.groups, token).map(|(place, _)| place)
    }

    /// Adds an active token, which policy it follows, and the contacts that take mail about it whatever that is.
    pub fn add(&mut self, ahead: &Ahead, group: Option<usize>, told: &Told, contacts: &[ContactId]) {
        let deadline = ahead.deadline;
        if deadline.expires_at <= self.now {
            return;
        }
        if let Some(day) = self.day(deadline.expires_at) {
            self.days[day].expire += 1;
        }
        if ahead.usage.is_left_behind() {
            return;
        }
        let group = group.and_then(|place| self.groups.get(place));
        let policy = group.map_or(&self.policy, |group| &group.policy).clone();
        let others = group.map_or(&[][..], |group| &group.contacts).iter().map(|(contact, _)| contact);
        let mut contacts: Vec<ContactId> = contacts.iter().chain(others).copied().collect();
        contacts.sort_unstable();
        contacts.dedup();
        let skips = |now: Timestamp| self.skip_unused && ahead.usage.is_unused(now);
        // What is due now and not written yet is written by the next pass: of an import, say, or of a lead that is new.
        let widest = policy.leads().first().copied().unwrap_or(Lead::EXPIRED);
        let due = due_reminders(&policy, deadline, self.now, widest);
        let now = due.into_iter().find(|(_, decision)| *decision == Decision::Send);
        let now = now.filter(|(lead, _)| !skips(self.now) && !told.leaves_out(ahead, *lead)).map(|_| 0);
        let notice = policy.expired_notice().then_some(Lead::EXPIRED);
        let leads = policy.leads().iter().copied().chain(notice).filter(|lead| deadline.owes(*lead));
        let later = leads.filter_map(|lead| {
            let due = lead.due_at(deadline.expires_at);
            self.day(due).filter(|_| due > self.now && !skips(due))
        });
        let days: Vec<usize> = now.into_iter().chain(later).collect();
        days.into_iter().for_each(|day| self.remind(day, &contacts));
    }

    fn remind(&mut self, day: usize, contacts: &[ContactId]) {
        let Some(of) = self.days.get_mut(day) else { return };
        of.reminders += contacts.len() as u64;
        of.unreachable += u64::from(contacts.is_empty());
        let Some(mailed) = self.mailed.get_mut(day) else { return };
        of.mails += contacts.iter().filter(|contact| mailed.insert(**contact)).count() as u64;
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
    use chrono::{TimeZone, Utc};

    use super::*;
    use crate::digest::Digest;
    use crate::policies::Match;
    use crate::token::{Address, Bucket, Kind};

    fn now() -> Timestamp {
        Utc.with_ymd_and_hms(2027, 1, 1, 9, 0, 0).unwrap()
    }

    fn forecast() -> Forecast {
        with_groups(Vec::new())
    }

    fn with_groups(groups: Vec<Group>) -> Forecast {
        let leads = [7, 1].map(|days| Lead::new(TimeDelta::days(days)));
        Forecast::new(Policy::new(leads, true, TimeDelta::days(7)), groups, true, now(), 10, chrono_tz::UTC)
    }

    /// Of a token that was used today.
    fn used() -> Usage {
        Usage { is_known: true, last_used_at: Some(now()), replaced_at: None }
    }

    fn in_days(expires: i64) -> Deadline {
        Deadline { expires_at: now() + TimeDelta::days(expires), set_at: now() - TimeDelta::days(90) }
    }

    fn ahead(deadline: Deadline) -> Ahead {
        let bucket = Bucket::from_number(7);
        Ahead { token: TokenId::new(bucket, now()), generation: 0, deadline, usage: used() }
    }

    fn counts(forecast: &Forecast) -> Vec<(u64, u64, u64)> {
        forecast.days().map(|(_, day)| (day.expire, day.reminders, day.mails)).collect()
    }

    #[test]
    fn each_day_has_what_falls_due_on_it() {
        let (ann, bob) = (ContactId::new(Bucket::from_number(2), now()), ContactId::new(Bucket::from_number(3), now()));
        let mut forecast = forecast();
        let told = Told::default();
        forecast.add(&ahead(in_days(8)), None, &told, &[ann, bob]);
        forecast.add(&ahead(in_days(8)), None, &told, &[ann]);
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
        let replaced = Usage { replaced_at: Some(now()), ..used() };
        forecast.add(&Ahead { usage: replaced, ..ahead(in_days(3)) }, None, &told, &[]);
        let unused = Usage { last_used_at: Some(now() - TimeDelta::days(91)), ..used() };
        forecast.add(&Ahead { usage: unused, ..ahead(in_days(4)) }, None, &told, &[]);
        forecast.add(&ahead(in_days(50)), None, &told, &[]);
        forecast.add(&ahead(in_days(0)), None, &told, &[]);
        let mut expected = vec![(0, 0, 0); 10];
        expected[3] = (1, 0, 0); // a replaced token expires all the same
        expected[4] = (1, 0, 0); // and so does one that nobody has used for 90 days
        assert_eq!(counts(&forecast), expected);
        // Nobody can be told of this one.
        forecast.add(&ahead(in_days(9)), None, &told, &[]);
        let unreachable: Vec<u64> = forecast.days().map(|(_, day)| day.unreachable).collect();
        assert_eq!(unreachable, [0, 0, 1, 0, 0, 0, 0, 0, 1, 1], "a week before, the day before, and the notice");
    }

    #[test]
    fn it_reaches_as_far_as_its_widest_lead_and_forgets_what_is_complete() {
        let ann = ContactId::new(Bucket::from_number(2), now());
        let mut forecast = forecast();
        let told = Told::default();
        // The last day is 2027-01-10, and the widest lead a week.
        assert!(forecast.until() > now() + TimeDelta::days(17));
        for day in 1..17 {
            forecast.reached(in_days(day).expires_at);
            forecast.add(&ahead(in_days(day)), None, &told, &[ann]);
            forecast.add(&ahead(in_days(day)), None, &told, &[ann]);
        }
        let mails: Vec<u64> = forecast.days().map(|(_, day)| day.mails).collect();
        assert_eq!(mails, [1; 10], "one mail a day to each");
        forecast.reached(forecast.until());
        assert!(forecast.mailed.iter().take(9).all(HashSet::is_empty));
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
            forecast.add(&token, None, &told, &[ann]);
            counts(&forecast)[0]
        };
        assert_eq!(today(&[]), (0, 1, 1), "an import that no pass has come to, or a lead that is new");
        assert_eq!(today(&[(7, ReminderState::Sent)]), (0, 0, 0));
        assert_eq!(today(&[(7, ReminderState::Unreachable)]), (0, 0, 0), "it is not written twice");
        assert_eq!(today(&[(5, ReminderState::Sent)]), (0, 0, 0), "a tighter one was said under other settings");
        assert_eq!(today(&[(5, ReminderState::Superseded)]), (0, 1, 1));
        assert_eq!(today(&[(30, ReminderState::Sent)]), (0, 1, 1), "a wider one was");
    }

    #[test]
    fn a_policy_has_its_own_leads_and_contacts() {
        let (ann, sec) = (ContactId::new(Bucket::from_number(2), now()), ContactId::new(Bucket::from_number(3), now()));
        let address = Address::parse("security@example.org").expect("an address");
        let group = Group {
            matches: Match { kind: Some(Kind::Primary), ..Match::default() },
            policy: Policy::new([Lead::new(TimeDelta::days(3))], true, TimeDelta::days(7)),
            digest: Digest::holding(TimeDelta::zero()),
            contacts: vec![(sec, address)],
        };
        let mut forecast = with_groups(vec![group]);
        let told = Told::default();
        let traits = |kind| Traits { kind, scopes: Vec::new(), owner_key: "ann".into(), description: "laptop".into() };
        let place = |kind| forecast.group_of(&traits(kind));
        let (primary, additional) = (place(Kind::Primary), place(Kind::Additional));
        assert_eq!((primary, additional), (Some(0), None));
        forecast.add(&ahead(in_days(8)), primary, &told, &[ann]);
        let mut expected = vec![(0, 0, 0); 10];
        expected[5] = (0, 2, 2);
        expected[8] = (1, 2, 2);
        assert_eq!(counts(&forecast), expected);
        forecast.add(&ahead(in_days(8)), additional, &told, &[ann]);
        expected[1] = (0, 1, 1);
        expected[7] = (0, 1, 1);
        expected[8] = (2, 3, 2);
        assert_eq!(counts(&forecast), expected);
    }
}
