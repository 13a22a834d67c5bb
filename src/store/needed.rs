//! Which messages new rows of the ledger need: common to both back ends.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::accounts::ReminderState;
use super::planning::{NewReminder, Reminded};
use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::ContactId;

/// The contacts that need a message, each once.
pub(super) struct Needed {
    /// For their reminders, in the order in which these were decided: the most urgent first.
    pub(super) reminders: Vec<ContactId>,
    /// For what is escalated to them.
    pub(super) escalations: Vec<ContactId>,
    /// How many reminders are to be sent.
    pub(super) pending: u64,
    /// All that were written.
    pub(super) reminded: Reminded,
}

impl Needed {
    /// By what was decided, and what of it is new to the ledger: contact, state, whether it is escalated, and its lead.
    pub(super) fn new(decided: &[NewReminder], inserted: &[(Uuid, String, bool, i64)]) -> Self {
        let new: Vec<(Uuid, bool)> = inserted
            .iter()
            .filter(|(_, state, ..)| state == ReminderState::Pending.as_str())
            .map(|(contact, _, escalation, _)| (*contact, *escalation))
            .collect();
        let mut reminded = Reminded::default();
        for (_, state, _, lead) in inserted {
            // It was written a moment ago, by its word.
            if let Ok(state) = state.parse() {
                reminded.add(Lead::from_seconds(*lead), state);
            }
        }
        let pending = new.len() as u64;
        let mut left: HashSet<(Uuid, bool)> = new.into_iter().collect();
        let mut of = |escalation: bool| -> Vec<ContactId> {
            let contacts = decided.iter().filter(|r| r.escalation == escalation).filter_map(|r| r.contact);
            contacts.filter(|contact| left.remove(&(contact.uuid(), escalation))).collect()
        };
        let (reminders, escalations) = (of(false), of(true));
        Self { reminders, escalations, pending, reminded }
    }

    /// The contacts whose message would be one too many, where so many may be opened and these have one already.
    pub(super) fn beyond(&self, most: u64, open: &HashSet<Uuid>) -> Vec<ContactId> {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let mut beyond: Vec<ContactId> =
            self.reminders.iter().filter(|contact| !open.contains(&contact.uuid())).skip(most).copied().collect();
        in_order(&mut beyond);
        beyond
    }

    /// The contacts that need a message for their reminders, without these.
    pub(super) fn all_but(&self, held: &[ContactId]) -> Vec<ContactId> {
        let held: HashSet<ContactId> = held.iter().copied().collect();
        let mut contacts: Vec<ContactId> =
            self.reminders.iter().filter(|contact| !held.contains(contact)).copied().collect();
        in_order(&mut contacts);
        contacts
    }
}

/// In one order, so that two planners that open messages of the same contacts never wait for each other in a circle.
fn in_order(contacts: &mut [ContactId]) {
    contacts.sort_unstable_by_key(|contact| (contact.bucket(), *contact));
}

/// The first deadline that each contact is to be told of.
pub(super) fn first_deadlines(contacts: &[ContactId], reminders: &[NewReminder], now: Timestamp) -> Vec<Timestamp> {
    let mut first: HashMap<ContactId, Timestamp> = HashMap::new();
    for reminder in reminders.iter().filter(|reminder| reminder.state == ReminderState::Pending) {
        if let Some(contact) = reminder.contact {
            let deadline = first.entry(contact).or_insert(reminder.expires_at);
            *deadline = (*deadline).min(reminder.expires_at);
        }
    }
    contacts.iter().map(|contact| first.get(contact).copied().unwrap_or(now)).collect()
}
