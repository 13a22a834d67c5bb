//! What `deliver` would send, of what waits in the store and of what would be new: rechecked as a claim rechecks it, composed by
//! nobody, and taken by a mail server that takes everything.

use std::collections::HashMap;

use uuid::Uuid;

use super::{Dry, News, Would};
use crate::clock::Timestamp;
use crate::jobs::deliver::foresee::{Fate, Known, foresee};
use crate::jobs::deliver::{Delivered, said};
use crate::jobs::guard::{TOLD_EVERY, URGENT};
use crate::mail::letter::Alert;
use crate::store::Store;
use crate::store::foresight::{Alerted, Queued};
use crate::store::outbox::{ClaimedMessage, ClaimedReminder, MessageKind, MessageState};
use crate::store::planning::{NewReminder, Written};
use crate::token::{Contact, ContactId, MessageId};

/// How many messages are looked at together.
const MESSAGES: usize = 200;

/// For how long nobody is told again that tokens wait to be marked, as `expiry_waits` has it.
const EXPIRY_TOLD_EVERY: chrono::TimeDelta = chrono::TimeDelta::days(1);

impl<S: Store, V: AsyncFnMut(Would) -> anyhow::Result<()>> Dry<'_, S, V> {
    pub(super) async fn deliver(&mut self) -> anyhow::Result<Delivered> {
        let now = self.now;
        let (mut did, fallback) = (Delivered::default(), self.orders.rules.fallback);
        let queued = std::mem::take(&mut self.queued);
        let digests = |message: &Queued| message.kind == MessageKind::Escalations && Some(message.contact) == fallback;
        let is_due = |message: &Queued, news: Option<&News>| {
            let hurried = message.state == MessageState::Open && news.is_some_and(|news| news.not_before <= now);
            message.not_before <= now || hurried
        };
        let due = queued.iter().filter(|message| !digests(message)).filter(|message| {
            let news = self.news.get(&message.contact).filter(|_| message.kind == MessageKind::Reminders);
            is_due(message, news)
        });
        let due: Vec<MessageId> = due.map(|message| message.id).collect();
        let mut late = Vec::new();
        for some in due.chunks(MESSAGES) {
            let mut messages = self.store.would_claim(some, now).await?;
            for message in &mut messages {
                // Only the first claim takes what is new.
                if message.epoch == 1 && message.kind == MessageKind::Reminders {
                    let news = self.news.remove(&message.contact.id);
                    message.reminders.extend(news.into_iter().flat_map(|news| news.reminders));
                }
            }
            late.extend(self.send(messages, &mut did).await?);
        }
        // Those that have a message which is not due yet are not due either, or it would be.
        let news: Vec<(ContactId, News)> =
            std::mem::take(&mut self.news).into_iter().filter(|(_, news)| news.not_before <= now).collect();
        let mut news = news.into_iter();
        loop {
            let some: Vec<(ContactId, News)> = news.by_ref().take(MESSAGES).collect();
            if some.is_empty() {
                break;
            }
            let contacts = self.contacts(some.iter().map(|(contact, _)| *contact)).await?;
            let messages = some.into_iter().filter_map(|(contact, news)| {
                Some(self.message(MessageKind::Reminders, contacts.get(&contact)?.clone(), news.reminders))
            });
            let messages = messages.collect();
            late.extend(self.send(messages, &mut did).await?);
        }
        self.write(late, &mut Written::default(), false).await?;
        let Some(fallback) = fallback else { return Ok(did) };
        self.tell_fallback(fallback, queued.iter().filter(|message| digests(message)), is_due, &mut did).await?;
        Ok(did)
    }

    /// The digest that collects for the fallback, those that are tried again, and alerts.
    async fn tell_fallback<'q>(
        &mut self,
        fallback: ContactId,
        digests: impl Iterator<Item = &'q Queued>,
        is_due: impl Fn(&Queued, Option<&News>) -> bool,
        did: &mut Delivered,
    ) -> anyhow::Result<()> {
        let escalated = self.escalated.take();
        let due: Vec<MessageId> =
            digests.filter(|message| is_due(message, escalated.as_ref())).map(|message| message.id).collect();
        let mut messages = self.store.would_claim(&due, self.now).await?;
        let mut escalated = escalated.filter(|news| news.not_before <= self.now || !due.is_empty());
        for message in messages.iter_mut().filter(|message| message.epoch == 1) {
            message.reminders.extend(escalated.take().into_iter().flat_map(|news| news.reminders));
        }
        let contact = self.contacts(std::iter::once(fallback)).await?.remove(&fallback);
        let Some(contact) = contact else { return Ok(()) };
        if let Some(news) = escalated.filter(|news| news.not_before <= self.now) {
            messages.push(self.message(MessageKind::Escalations, contact.clone(), news.reminders));
        }
        for kind in self.new_alerts() {
            messages.push(self.message(kind, contact.clone(), Vec::new()));
        }
        // What is passed on from here would go to the fallback, who has it.
        self.send(messages, did).await?;
        Ok(())
    }

    /// The alerts that a run would open.
    fn new_alerts(&self) -> Vec<MessageKind> {
        let now = self.now;
        let newly = self.held.keys().any(|contact| !self.was_held.contains_key(contact));
        let latest = if newly { Some(now) } else { self.stored.map(|held| held.latest) };
        let since = self.stored.map_or(now, |held| held.since);
        let wanted = [
            (MessageKind::Held, latest.map(|latest| since.max(latest - TOLD_EVERY))),
            (MessageKind::HeldUrgent, latest.filter(|_| self.is_urgent()).map(|_| now - URGENT)),
            (MessageKind::Expiry, self.waits.then_some(now - EXPIRY_TOLD_EVERY)),
        ];
        let is_new = |(kind, since): (MessageKind, Option<Timestamp>)| {
            let since = since?;
            let told = |sent: &Alerted| sent.kind == kind && (sent.is_open || sent.opened_at >= since);
            (!self.alerted.iter().any(told)).then_some(kind)
        };
        wanted.into_iter().filter_map(is_new).collect()
    }

    fn next_deadline(&self) -> Option<Timestamp> {
        let new = self.held.values().copied().filter(|deadline| *deadline > self.now);
        self.stored.and_then(|held| held.next_deadline).into_iter().chain(new).min()
    }

    fn is_urgent(&self) -> bool {
        self.next_deadline().is_some_and(|deadline| deadline - self.now <= URGENT)
    }

    /// What an alert of this kind would say.
    fn alert(&self, kind: MessageKind) -> Option<Alert> {
        match kind {
            MessageKind::Reminders | MessageKind::Escalations => None,
            MessageKind::Expiry => Some(Alert::Expiry { tokens: self.overdue }).filter(|_| self.overdue > 0),
            MessageKind::Held | MessageKind::HeldUrgent => {
                let new = self.held.keys().filter(|contact| !self.was_held.contains_key(contact)).count() as u64;
                let messages = self.stored.map_or(0, |held| held.messages) + new;
                let since = self.stored.map_or(self.now, |held| held.since);
                let urgent = kind == MessageKind::HeldUrgent;
                let alert = Alert::Held { messages, since, next_deadline: self.next_deadline(), urgent };
                Some(alert).filter(|_| messages > 0)
            }
        }
    }

    /// Returns what the fallback would be told of what is not sent.
    async fn send(
        &mut self,
        mut messages: Vec<ClaimedMessage>,
        did: &mut Delivered,
    ) -> anyhow::Result<Vec<NewReminder>> {
        for message in &mut messages {
            let contact = message.contact.id;
            for reminder in &mut message.reminders {
                let claimed = &mut reminder.claimed;
                let new = self.tightest.get(&(contact, reminder.token, claimed.generation));
                claimed.tightest = new.copied().unwrap_or(claimed.tightest).min(claimed.tightest);
            }
        }
        let mut asked: Vec<_> = messages
            .iter()
            .flat_map(|message| message.reminders.iter().map(|reminder| (message.contact.id, reminder.token)))
            .collect();
        asked.sort_unstable();
        asked.dedup();
        let facts = self.store.facts(&asked).await?;
        let said = said(self.store, &messages, self.now).await?;
        let mailed = self.mailed(&messages).await?;
        let mut late = Vec::new();
        for message in messages {
            let (kind, contact) = (message.kind, message.contact.clone());
            let mut facts = facts.get(&contact.id).cloned().unwrap_or_default();
            // Who it is may have changed in the configuration since the store was told.
            facts.is_fallback = Some(contact.id) == self.orders.rules.fallback;
            let alert = self.alert(kind);
            let (fate, told) = foresee(
                self.store,
                message,
                Known { facts: &facts, said: &said, mailed_at: mailed.get(&contact.id).copied() },
                alert,
                self.orders.terms,
                self.now,
            )
            .await?;
            late.extend(told);
            match fate {
                Fate::Goes(reminders) => {
                    did.sent += 1;
                    (self.visit)(Would::Send(kind, contact, reminders)).await?;
                }
                Fate::PutOff => did.put_off += 1,
                Fate::SaysNothing => did.cancelled += 1,
                Fate::GivenUp => did.failed += 1,
            }
        }
        Ok(late)
    }

    /// When contacts were sent reminders, where that was so lately that others wait.
    async fn mailed(&self, messages: &[ClaimedMessage]) -> anyhow::Result<HashMap<ContactId, Timestamp>> {
        let Some(interval) = self.orders.terms.digest.min_interval else { return Ok(HashMap::new()) };
        let mut contacts: Vec<ContactId> = messages.iter().map(|message| message.contact.id).collect();
        contacts.sort_unstable();
        contacts.dedup();
        let known = self.store.addressees(&contacts).await?.into_iter();
        let lately = |at: &Timestamp| *at > self.now - interval && *at <= self.now;
        Ok(known.filter_map(|(contact, to)| Some((contact, to.mailed_at.filter(lately)?))).collect())
    }

    async fn contacts(&self, ids: impl Iterator<Item = ContactId>) -> anyhow::Result<HashMap<ContactId, Contact>> {
        let mut contacts = self.store.contacts(&ids.collect::<Vec<_>>()).await?;
        contacts.extend(self.orders.newcomers.iter().map(|(id, address)| {
            let address = address.clone();
            (*id, Contact { id: *id, address, time_zone: None, locale: None, suppressed: None })
        }));
        Ok(contacts)
    }

    /// A message that would be opened and claimed.
    fn message(&self, kind: MessageKind, contact: Contact, reminders: Vec<ClaimedReminder>) -> ClaimedMessage {
        let now = self.now;
        ClaimedMessage {
            id: MessageId::new(contact.id.bucket(), now),
            kind,
            contact,
            holder: Uuid::nil(),
            epoch: 1,
            lease_until: now,
            attempts: 0,
            lost_claims: 0,
            created_at: now,
            first_claimed_at: now,
            reminders,
        }
    }
}
