//! Which messages new rows of the ledger need: common to both back ends.

use std::collections::{HashMap, HashSet};

use chrono::TimeDelta;
use uuid::Uuid;

use super::accounts::ReminderState;
use super::planning::{NewReminder, Reminded};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::{Bucket, ContactId};

/// The least time between two digests of escalations.
const DIGEST_EVERY: TimeDelta = TimeDelta::days(1);

/// From when on a digest of escalations may be claimed, if the last one was first claimed then. One that lies in the
/// future was claimed by a wrong clock, and is not waited for.
pub(crate) fn next_digest(last: Option<Timestamp>, now: Timestamp, not_before: Timestamp) -> Timestamp {
    let next = last.filter(|last| *last <= now).map_or(not_before, |last| last + DIGEST_EVERY);
    next.max(not_before)
}

/// When the fallback's last digest was first claimed. Index messages_to_fallback.
pub(super) const LAST_DIGEST: &str = "SELECT MAX(claimed_at) FROM messages \
     WHERE bucket = $1 AND contact_id = $2 AND kind = 'escalations' AND kind <> 'reminders'";

/// A row that is new to the ledger, as the insertion returns it: contact, state, whether it is escalated, token and lead.
pub(crate) type Inserted = (Uuid, String, bool, Uuid, i64);

/// A contact that needs a message, and from when on that may be sent.
pub(crate) type Wanted = (ContactId, Timestamp);

/// The contacts that need a message, each once.
pub(crate) struct Needed {
    /// For their reminders, in the order in which these were decided: the most urgent first.
    pub(crate) reminders: Vec<Wanted>,
    /// For what is escalated to them.
    pub(crate) escalations: Vec<Wanted>,
    /// How many reminders are to be sent.
    pub(crate) pending: u64,
    /// All that were written.
    pub(crate) reminded: Reminded,
}

impl Needed {
    /// By what was decided, and what of it is new to the ledger. A message may go as soon as one of its reminders may.
    pub(crate) fn new(decided: &[NewReminder], inserted: &[Inserted], now: Timestamp) -> Self {
        let new: HashSet<(Uuid, bool, Uuid, i64)> = inserted
            .iter()
            .filter(|(_, state, ..)| state == ReminderState::Pending.as_str())
            .map(|(contact, _, escalation, token, lead)| (*contact, *escalation, *token, *lead))
            .collect();
        let mut reminded = Reminded::default();
        for (_, state, _, _, lead) in inserted {
            // It was written a moment ago, by its word.
            if let Ok(state) = state.parse() {
                reminded.add(Lead::from_seconds(*lead), state);
            }
        }
        let pending = new.len() as u64;
        let mut needed = Self { reminders: Vec::new(), escalations: Vec::new(), pending, reminded };
        let mut places: HashMap<(ContactId, bool), usize> = HashMap::new();
        for reminder in decided {
            let Some(contact) = reminder.contact else { continue };
            let escalation = reminder.escalation;
            if !new.contains(&(contact.uuid(), escalation, reminder.token.uuid(), reminder.lead.seconds())) {
                continue;
            }
            let wanted = if escalation { &mut needed.escalations } else { &mut needed.reminders };
            let not_before = reminder.not_before.unwrap_or(now);
            let place = *places.entry((contact, escalation)).or_insert(wanted.len());
            match wanted.get_mut(place) {
                Some((_, first)) => *first = not_before.min(*first),
                None => wanted.push((contact, not_before)),
            }
        }
        needed
    }

    /// The contacts whose message would be one too many, where so many may be opened and these have one already.
    pub(crate) fn beyond(&self, most: u64, open: &HashSet<Uuid>) -> Vec<ContactId> {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let contacts = self.reminders.iter().map(|(contact, _)| *contact);
        let mut beyond: Vec<ContactId> =
            contacts.filter(|contact| !open.contains(&contact.uuid())).skip(most).collect();
        beyond.sort_unstable_by_key(in_order);
        beyond
    }

    /// The contacts that need a message for their reminders, without these.
    pub(crate) fn all_but(&self, held: &[ContactId]) -> Vec<Wanted> {
        let held: HashSet<ContactId> = held.iter().copied().collect();
        let mut wanted: Vec<Wanted> =
            self.reminders.iter().filter(|(contact, _)| !held.contains(contact)).copied().collect();
        wanted.sort_unstable_by_key(|(contact, _)| in_order(contact));
        wanted
    }
}

/// One order, so that two planners that open messages of the same contacts never wait for each other in a circle.
fn in_order(contact: &ContactId) -> (Bucket, ContactId) {
    (contact.bucket(), *contact)
}

/// In the order of the ledger's key: neighbours in its pages one after the other.
pub(crate) fn in_key_order(reminders: &[NewReminder]) -> Vec<&NewReminder> {
    let mut rows: Vec<&NewReminder> = reminders.iter().collect();
    rows.sort_unstable_by_key(|r| (r.bucket(), r.token, r.generation, r.lead, r.contact));
    rows
}

/// The first deadline that each contact is to be told of.
pub(crate) fn first_deadlines(contacts: &[ContactId], reminders: &[NewReminder], now: Timestamp) -> Vec<Timestamp> {
    let mut first: HashMap<ContactId, Timestamp> = HashMap::new();
    for reminder in reminders.iter().filter(|reminder| reminder.state == ReminderState::Pending) {
        if let Some(contact) = reminder.contact {
            let deadline = first.entry(contact).or_insert(reminder.expires_at);
            *deadline = (*deadline).min(reminder.expires_at);
        }
    }
    contacts.iter().map(|contact| first.get(contact).copied().unwrap_or(now)).collect()
}
