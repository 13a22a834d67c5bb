//! Claims messages, and checks what they say against the tokens as they are now.
//!
//! Owns all that it needs, so that sessions go on meanwhile. When it is dropped, what it had claimed is claimed again when
//! the lease ends.

use std::collections::{HashMap, HashSet};

use chrono::TimeDelta;
use uuid::Uuid;

use super::attempt::{Attempt, untried};
use super::{LEASE, Said, Terms, said};
use crate::clock::{Clock, Timestamp};
use crate::mail::letter::{Alert, Letter};
use crate::store::outbox::{ClaimedMessage, MessageKind, Record};
use crate::store::recipients::Facts;
use crate::store::{Error, Result, Store};
use crate::token::{Bucket, ContactId, TokenId};

/// What a claim brought.
#[derive(Debug, Default)]
pub(super) struct Claimed {
    /// How many messages.
    pub(super) messages: usize,
    /// The last bucket of any.
    pub(super) last: Option<Bucket>,
    /// Each with the letter to send, if something is left to say.
    pub(super) checked: Vec<(Attempt, Option<Letter>)>,
    /// Those that nobody could check: they are given back.
    pub(super) untried: Vec<(Attempt, Record)>,
    /// Why not.
    pub(super) failed: Option<Error>,
}

/// One claim of a process.
pub(super) struct Claiming<S, C> {
    store: S,
    clock: C,
    terms: Terms,
    holder: Uuid,
}

impl<S: Store, C: Clock + Clone> Claiming<S, C> {
    pub(super) fn new(store: &S, clock: &C, terms: &Terms, holder: Uuid) -> Self {
        Self { store: store.clone(), clock: clock.clone(), terms: terms.clone(), holder }
    }

    /// Claims so many messages of these buckets at most.
    ///
    /// # Errors
    /// When the store fails, with nothing claimed.
    pub(super) async fn claim(self, buckets: &[Bucket], room: usize, now: Timestamp) -> Result<Claimed> {
        let limit = u32::try_from(room).unwrap_or(u32::MAX);
        let claimed = self.store.claim(buckets, self.holder, now, now + LEASE, limit).await?;
        if claimed.is_empty() {
            return Ok(Claimed::default());
        }
        let last = claimed.iter().map(|message| message.id.bucket()).max();
        Ok(Claimed { last, ..self.check(claimed).await })
    }

    async fn check(&self, claimed: Vec<ClaimedMessage>) -> Claimed {
        let messages = claimed.len();
        let mut asked: Vec<_> = claimed
            .iter()
            .flat_map(|message| message.reminders.iter().map(|reminder| (message.contact.id, reminder.token)))
            .collect();
        asked.sort_unstable();
        asked.dedup();
        let (facts, said, alerts) = match self.read(&claimed, &asked).await {
            Ok(read) => read,
            Err(error) => return self.give_back(claimed, error),
        };
        let (now, nothing) = (self.clock.now(), Facts::default());
        let mut checked = Vec::with_capacity(messages);
        for (message, alert) in claimed.into_iter().zip(alerts) {
            let facts = facts.get(&message.contact.id).unwrap_or(&nothing);
            checked.push(Attempt::new(message, facts, &said, alert, &self.terms, now));
        }
        if let Some(interval) = self.terms.digest.min_interval
            && let Err(error) = self.space(&mut checked, &facts, interval, now).await
        {
            return self.give_back(checked.into_iter().map(|(attempt, _)| attempt.message).collect(), error);
        }
        Claimed { messages, checked, ..Claimed::default() }
    }

    fn give_back(&self, claimed: Vec<ClaimedMessage>, error: Error) -> Claimed {
        let (messages, now, why) = (claimed.len(), self.clock.now(), error.to_string());
        let untried = claimed.into_iter().map(|message| untried(message, now, &why)).collect();
        Claimed { messages, untried, failed: Some(error), ..Claimed::default() }
    }

    /// Remembers that contacts are sent reminders now, before they are: a pass that plans meanwhile must know. A message that is in
    /// no hurry and finds that its contact was sent another since it was planned, within the interval, is put off.
    async fn space(
        &self,
        attempts: &mut [(Attempt, Option<Letter>)],
        facts: &HashMap<ContactId, Facts>,
        interval: TimeDelta,
        now: Timestamp,
    ) -> Result<()> {
        let reminds = |(attempt, letter): &&mut (Attempt, Option<Letter>)| {
            letter.is_some() && attempt.message.kind == MessageKind::Reminders
        };
        let (mut certain, mut asked): (Vec<ContactId>, Vec<&mut (Attempt, Option<Letter>)>) = (Vec::new(), Vec::new());
        for pair in attempts.iter_mut().filter(reminds) {
            // One that may have been sent already does not wait for itself.
            let is_new = pair.0.message.first_claimed_at + LEASE == pair.0.message.lease_until;
            if is_new { asked.push(pair) } else { certain.push(pair.0.message.contact.id) }
        }
        let wanted: Vec<ContactId> = asked.iter().map(|(attempt, _)| attempt.message.contact.id).collect();
        let before = self.store.mailed_before(&wanted, now - interval, now).await?;
        let mut going: HashSet<ContactId> = HashSet::new();
        for (attempt, letter) in asked {
            let contact = attempt.message.contact.id;
            // Of two messages to one contact the first goes, or both wait.
            let mailed_at = before.get(&contact).copied().or_else(|| (!going.insert(contact)).then_some(now));
            let Some(mailed_at) = mailed_at else { continue };
            let facts = facts.get(&contact);
            match facts.and_then(|facts| attempt.put_off_until(facts, &self.terms, mailed_at, now)) {
                Some(at) => {
                    *letter = None;
                    attempt.put_off = Some(at);
                }
                None => certain.push(contact),
            }
        }
        self.store.mailed(&certain, now).await
    }

    /// What is true now of what was claimed, what was said before of what it corrects, and what each of the alerts among it says.
    async fn read(
        &self,
        claimed: &[ClaimedMessage],
        asked: &[(ContactId, TokenId)],
    ) -> Result<(HashMap<ContactId, Facts>, Said, Vec<Option<Alert>>)> {
        let facts = self.store.facts(asked).await?;
        let said = said(&self.store, claimed, self.clock.now()).await?;
        let mut alerts = Vec::with_capacity(claimed.len());
        for message in claimed {
            alerts.push(self.alert(message.kind, self.clock.now()).await?);
        }
        Ok((facts, said, alerts))
    }

    /// What an alert of this kind says now; `None` where it is no longer true, and for other messages.
    async fn alert(&self, kind: MessageKind, now: Timestamp) -> Result<Option<Alert>> {
        Ok(match kind {
            MessageKind::Reminders | MessageKind::Escalations => None,
            MessageKind::Held | MessageKind::HeldUrgent => self.store.held(now).await?.map(|held| Alert::Held {
                messages: held.messages,
                since: held.since,
                next_deadline: held.next_deadline,
                urgent: kind == MessageKind::HeldUrgent,
            }),
            MessageKind::Expiry => {
                Some(self.store.overdue_count(now).await?).filter(|n| *n > 0).map(|tokens| Alert::Expiry { tokens })
            }
        })
    }
}
