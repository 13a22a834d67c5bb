//! The jobs: each is one function that does a step of its work, idempotent and safe to repeat after a crash.
//!
//! A step reads a bounded page of what is due, decides with [`crate::policy`], and writes in one transaction. It says
//! whether more is due; whoever calls it ([`crate::service`], or a test) goes on until nothing is. No job waits, holds
//! state that a restart would lose, or knows of another.

pub mod deliver;
pub mod expire;
pub mod guard;
pub mod purge;
pub mod remind;

use chrono::TimeDelta;

use crate::policy::{Decision, Lead, Policy, Reason};
use crate::store::accounts::ReminderState;
use crate::store::planning::{Candidate, NewReminder};
use crate::token::ContactId;

/// What a step did, and whether more is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome<R> {
    /// What it did.
    pub did: R,
    /// Whether another step would find something to do.
    pub more: bool,
}

/// What the planning jobs decide by.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Which reminders are owed.
    pub policy: Policy,
    /// Who hears of what an owner could not be told.
    pub fallback: Option<ContactId>,
    /// How long a message waits, once opened, for more to say.
    pub hold: TimeDelta,
    /// How many tokens a step looks at.
    pub batch: u32,
    /// How much may happen in an hour.
    pub guard: guard::Guard,
}

impl Rules {
    /// The ledger rows for one decision: one for each contact, or the record that there is none and, where something
    /// was to be sent, a line for the fallback.
    fn rows(
        &self,
        candidate: &Candidate,
        lead: Lead,
        decision: Decision,
        contacts: &[ContactId],
    ) -> impl Iterator<Item = NewReminder> + use<> {
        let row = |contact, state, reason, escalation| NewReminder {
            token: candidate.id,
            generation: candidate.generation,
            lead,
            contact,
            expires_at: candidate.deadline.expires_at,
            state,
            reason,
            escalation,
        };
        let (state, reason) = match decision {
            Decision::Send => (ReminderState::Pending, None),
            Decision::Superseded => (ReminderState::Superseded, Some(Reason::TighterLead)),
            Decision::Stale => (ReminderState::Stale, Some(Reason::Stale)),
        };
        let mut rows: Vec<NewReminder> =
            contacts.iter().map(|contact| row(Some(*contact), state, reason, false)).collect();
        if contacts.is_empty() && decision == Decision::Send {
            let why = Some(Reason::NoContact);
            rows.push(row(None, ReminderState::Unreachable, why, false));
            rows.extend(self.fallback.map(|fallback| row(Some(fallback), ReminderState::Pending, why, true)));
        } else if contacts.is_empty() {
            rows.push(row(None, state, reason, false));
        }
        rows.into_iter()
    }
}
