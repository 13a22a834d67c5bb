//! The jobs: each is one function that does a step of its work, idempotent and safe to repeat after a crash.
//!
//! A step reads a bounded page of what is due, decides with [`crate::policy`], and writes in one transaction. It says
//! whether more is due; whoever calls it ([`crate::service`], or a test) goes on until nothing is. No job waits, holds
//! state that a restart would lose, or knows of another.

pub mod deliver;
pub mod dry_run;
pub mod expire;
pub mod guard;
pub mod purge;
pub mod remind;

use std::collections::HashMap;
use std::sync::Arc;

use chrono_tz::Tz;

use crate::clock::Timestamp;
use crate::digest::{Ahead, Digest, Waiting};
use crate::policies::{Group, Traits, group_of};
use crate::policy::{Decision, Lead, Policy, Reason, Usage};
use crate::store::accounts::ReminderState;
use crate::store::planning::{Candidate, NewReminder};
use crate::store::recipients::Addressee;
use crate::store::{Result, Store};
use crate::token::{Address, ContactId, OwnerId, TokenId};

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
    /// For which tokens there are others.
    pub groups: Arc<[Group]>,
    /// Who hears of what an owner could not be told.
    pub fallback: Option<ContactId>,
    /// When a message may go.
    pub digest: Digest,
    /// Whether nobody is told of tokens that nobody uses.
    pub skip_unused: bool,
    /// How many tokens a step looks at.
    pub batch: u32,
    /// How much may happen in an hour.
    pub guard: guard::Guard,
}

/// Who is told of a page of tokens, as the store has it now.
struct Recipients {
    now: Timestamp,
    speakers: HashMap<OwnerId, Vec<ContactId>>,
    watchers: HashMap<TokenId, Vec<ContactId>>,
    addressees: HashMap<ContactId, Addressee>,
    zones: HashMap<OwnerId, Tz>,
}

/// What a token's reminders are decided by.
#[derive(Clone, Copy)]
struct Terms<'a> {
    policy: &'a Policy,
    digest: &'a Digest,
    contacts: &'a [(ContactId, Address)],
}

impl Recipients {
    /// The contacts that are told of a token, each once.
    fn of(&self, owner: OwnerId, token: TokenId, terms: Terms<'_>) -> Vec<(ContactId, Addressee)> {
        let speakers = self.speakers.get(&owner).into_iter().flatten();
        let watchers = self.watchers.get(&token).into_iter().flatten();
        let others = terms.contacts.iter().map(|(contact, _)| contact);
        let mut contacts: Vec<ContactId> = speakers.chain(watchers).chain(others).copied().collect();
        contacts.sort_unstable();
        contacts.dedup();
        contacts.into_iter().filter_map(|contact| Some((contact, *self.addressees.get(&contact)?))).collect()
    }
}

impl Rules {
    /// Whether anybody is to be told of a token. It has no successor, or was used after it was replaced: then whatever
    /// still uses it is about to break.
    pub fn speaks_of(&self, usage: Usage, now: Timestamp) -> bool {
        let unused = self.skip_unused && usage.is_unused(now);
        !usage.is_left_behind() && !unused
    }

    /// Every lead that some token may owe a reminder at, longest first.
    pub fn leads(&self) -> Vec<Lead> {
        let policies = self.groups.iter().map(|group| &group.policy).chain([&self.policy]);
        let mut leads: Vec<Lead> = policies.flat_map(|policy| policy.leads()).copied().collect();
        leads.sort_unstable_by(|a, b| b.cmp(a));
        leads.dedup();
        leads
    }

    /// Reads what the tokens of a page are matched by, where there is something to match.
    async fn describe<S: Store>(&self, store: &S, page: &mut [Candidate]) -> Result<()> {
        if self.groups.is_empty() || page.is_empty() {
            return Ok(());
        }
        let ids: Vec<TokenId> = page.iter().map(|token| token.id).collect();
        let mut traits = store.traits(&ids).await?;
        page.iter_mut().for_each(|token| token.traits = traits.remove(&token.id));
        Ok(())
    }

    /// What the reminders of a token with these traits are decided by.
    fn terms(&self, traits: Option<&Traits>) -> Terms<'_> {
        let group = traits.and_then(|traits| group_of(&self.groups, traits));
        match group {
            Some((_, Group { policy, digest, contacts, .. })) => Terms { policy, digest, contacts },
            None => Terms { policy: &self.policy, digest: &self.digest, contacts: &[] },
        }
    }

    /// Who is told of these tokens. `newcomers` take mail, though the store does not have them yet.
    async fn recipients<S: Store>(
        &self,
        store: &S,
        tokens: &[(OwnerId, TokenId)],
        newcomers: &[ContactId],
        now: Timestamp,
    ) -> Result<Recipients> {
        let (mut speakers, mut watchers, mut zones) = (HashMap::new(), HashMap::new(), HashMap::new());
        let mut addressees = HashMap::new();
        if !tokens.is_empty() {
            let mut owners: Vec<OwnerId> = tokens.iter().map(|(owner, _)| *owner).collect();
            owners.sort_unstable();
            owners.dedup();
            let ids: Vec<TokenId> = tokens.iter().map(|(_, token)| *token).collect();
            speakers = store.speakers(&owners).await?;
            watchers = store.watchers(&ids).await?;
            if self.digest.window.is_some() || self.groups.iter().any(|group| group.digest.window.is_some()) {
                zones = store.zones(&owners).await?;
            }
            let others = self.groups.iter().flat_map(|group| &group.contacts).map(|(contact, _)| contact);
            let contacts = speakers.values().chain(watchers.values()).flatten().chain(others);
            let mut contacts: Vec<ContactId> = contacts.copied().collect();
            contacts.sort_unstable();
            contacts.dedup();
            addressees = store.addressees(&contacts).await?;
            addressees.extend(newcomers.iter().map(|contact| (*contact, Addressee::default())));
        }
        Ok(Recipients { now, speakers, watchers, addressees, zones })
    }

    /// The ledger rows for one decision: one for each contact, or the record that there is none and, where something
    /// was to be sent, a line for the fallback.
    fn rows(&self, token: &Candidate, lead: Lead, decision: Decision, recipients: &Recipients) -> Vec<NewReminder> {
        let row = |contact, state, reason, escalation, not_before| NewReminder {
            token: token.id,
            generation: token.generation,
            lead,
            contact,
            expires_at: token.deadline.expires_at,
            state,
            reason,
            escalation,
            not_before,
        };
        let (state, reason) = match decision {
            Decision::Send => (ReminderState::Pending, None),
            Decision::Superseded => (ReminderState::Superseded, Some(Reason::TighterLead)),
            Decision::Stale => (ReminderState::Stale, Some(Reason::Stale)),
        };
        let terms = self.terms(token.traits.as_ref());
        let expires_at = token.deadline.expires_at;
        let ahead = Ahead::of(terms.policy, expires_at, lead, recipients.now);
        let owner_zone = recipients.zones.get(&token.owner).copied();
        let goes_at = |to: Addressee| {
            let zone = to.time_zone.or(owner_zone).unwrap_or_default();
            let waiting = Waiting { now: recipients.now, ahead, zone, mailed_at: to.mailed_at };
            (decision == Decision::Send).then(|| terms.digest.goes_at(waiting))
        };
        let contacts = recipients.of(token.owner, token.id, terms);
        if !contacts.is_empty() {
            let rows = contacts.into_iter().map(|(contact, to)| row(Some(contact), state, reason, false, goes_at(to)));
            return rows.collect();
        }
        if decision != Decision::Send {
            return vec![row(None, state, reason, false, None)];
        }
        let why = Some(Reason::NoContact);
        let mut rows = vec![row(None, ReminderState::Unreachable, why, false, None)];
        let held = self.digest.goes_at(Waiting { now: recipients.now, ahead: None, zone: Tz::UTC, mailed_at: None });
        rows.extend(self.fallback.map(|fallback| row(Some(fallback), ReminderState::Pending, why, true, Some(held))));
        rows
    }
}
