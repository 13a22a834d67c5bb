//! What a run would do now: the same pages, decided by the same code, with nothing written and nothing sent.
//!
//! Guarantees that the store is only read, and that a run at the same instant does just this, as long as the mail server takes
//! what it is given and nobody changes anything meanwhile. Three things are the run's alone: tokens that a wrong clock marked too
//! early and what these then owe ([`Counts::revives`]); rows that become old enough to be purged because a mail about them was
//! sent; and, where deadlines far in the past wait for a guard, how many tokens go. What is held and added to again counts as
//! often as that happens, here as in a run.
//! Memory follows what waits and what would be mailed, not what is stored.

use std::collections::{BTreeMap, HashMap, HashSet};

use uuid::Uuid;

use super::deliver::foresee::{Fate, Known, foresee};
use super::deliver::{Delivered, Terms, said};
use super::guard::{TOLD_EVERY, URGENT};
use super::purge::Retention;
use super::{Rules, expire, remind};
use crate::clock::Timestamp;
use crate::mail::letter::Alert;
use crate::policies::fingerprint;
use crate::policy::{Claimed, Lead};
use crate::store::Store;
use crate::store::accounts::ReminderState;
use crate::store::foresight::{Alerted, Queued};
use crate::store::guards::Held;
use crate::store::needed::{Needed, first_deadlines, next_digest};
use crate::store::outbox::{ClaimedMessage, ClaimedReminder, MessageKind, MessageState};
use crate::store::planning::{Candidate, NewReminder, Watermark, Written};
use crate::store::purging::Purged;
use crate::token::{Address, Contact, ContactId, MessageId, NEVER, TokenId};

/// How many messages are looked at together.
const MESSAGES: usize = 200;

/// For how long nobody is told again that tokens wait to be marked, as `expiry_waits` has it.
const EXPIRY_TOLD_EVERY: chrono::TimeDelta = chrono::TimeDelta::days(1);

/// Something that would be done.
#[derive(Debug)]
pub enum Would {
    /// These tokens would be marked expired.
    Expire(Vec<Candidate>),
    /// These rows would be written to the ledger.
    Write(Vec<NewReminder>),
    /// A message of this kind would be sent, with so many reminders; an alert has none.
    Send(MessageKind, Contact, u64),
}

/// How much of each would be done.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// By `expire`; `None` where the clock cannot be believed.
    pub expire: Option<Written>,
    /// By `remind`; `None` where the clock cannot be believed.
    pub remind: Option<Written>,
    /// By `deliver`.
    pub deliver: Delivered,
    /// By `purge`.
    pub purge: Purged,
    /// Tokens would become active again that a wrong clock marked too early.
    pub revives: bool,
}

/// What a dry run goes by.
#[derive(Clone, Copy, Debug)]
pub struct Orders<'a> {
    /// What the planning jobs decide by.
    pub rules: &'a Rules,
    /// What delivery goes by.
    pub terms: &'a Terms,
    /// How long things are kept.
    pub retention: Retention,
    /// Contacts that the configuration names and the store does not have yet.
    pub newcomers: &'a [(ContactId, Address)],
    /// Whether the clock can be believed: else nothing is planned.
    pub plans: bool,
    /// Whether every lead starts over.
    pub reconciles: bool,
}

/// Hands what would be done now to `visit`, page by page, and counts it.
///
/// # Errors
/// When the store fails, or `visit` does.
pub async fn dry_run<S: Store, V: AsyncFnMut(Would) -> anyhow::Result<()>>(
    store: &S,
    orders: Orders<'_>,
    now: Timestamp,
    visit: V,
) -> anyhow::Result<Counts> {
    let mut dry = Dry::new(store, orders, now, visit).await?;
    let (mut expire, mut remind, mut revives) = (None, None, false);
    if orders.plans {
        let (written, wrong) = dry.expire().await?;
        (expire, revives) = (Some(written), wrong);
        remind = Some(dry.remind().await?);
    }
    let deliver = dry.deliver().await?;
    let mut purge = store.purgeable(orders.retention.cutoffs(now)).await?;
    purge.reminders += dry.written_to_go;
    Ok(Counts { expire, remind, deliver, purge, revives })
}

/// What a contact would be told that is new.
#[derive(Debug)]
struct News {
    not_before: Timestamp,
    reminders: Vec<ClaimedReminder>,
}

impl News {
    fn from(not_before: Timestamp) -> Self {
        Self { not_before, reminders: Vec::new() }
    }
}

/// A run that writes nothing.
struct Dry<'a, S, V> {
    store: &'a S,
    orders: Orders<'a>,
    now: Timestamp,
    visit: V,
    newcomers: Vec<ContactId>,
    /// What waits, without what is held.
    queued: Vec<Queued>,
    /// Who has a message that collects reminders, here or in the store.
    open: HashSet<Uuid>,
    /// How many messages were opened here.
    opened: u64,
    /// What a guard holds in the store, and the first deadline that each of it speaks of.
    stored: Option<Held>,
    was_held: HashMap<ContactId, Timestamp>,
    /// Whose reminders are held here, and the first deadline that they speak of.
    held: HashMap<ContactId, Timestamp>,
    /// What the fallback was sent.
    alerted: Vec<Alerted>,
    /// Who is told of what is new.
    news: BTreeMap<ContactId, News>,
    /// The same for the fallback's digest.
    escalated: Option<News>,
    /// The shortest lead that is new to the ledger, of each deadline and contact.
    tightest: HashMap<(ContactId, TokenId, i32), Lead>,
    /// Rows that are written, and old enough to be purged at once.
    written_to_go: u64,
    /// Tokens that are past their deadline, less those that are marked here.
    overdue: u64,
    /// A guard keeps some of them from being marked.
    waits: bool,
}

impl<'a, S: Store, V: AsyncFnMut(Would) -> anyhow::Result<()>> Dry<'a, S, V> {
    async fn new(store: &'a S, orders: Orders<'a>, now: Timestamp, visit: V) -> anyhow::Result<Self> {
        let (mut queued, mut open, mut was_held) = (Vec::new(), HashSet::new(), HashMap::new());
        store
            .each_queued(|message| match message.state {
                MessageState::Held => {
                    was_held.insert(message.contact, message.not_before);
                }
                state => {
                    if state == MessageState::Open && message.kind == MessageKind::Reminders {
                        open.insert(message.contact.uuid());
                    }
                    queued.push(message);
                }
            })
            .await?;
        let alerted = match orders.rules.fallback {
            Some(fallback) => store.alerted(fallback).await?,
            None => Vec::new(),
        };
        Ok(Self {
            newcomers: orders.newcomers.iter().map(|(contact, _)| *contact).collect(),
            stored: store.held(now).await?,
            overdue: store.overdue_count(now).await?,
            store,
            orders,
            now,
            visit,
            queued,
            open,
            opened: 0,
            was_held,
            held: HashMap::new(),
            alerted,
            news: BTreeMap::new(),
            escalated: None,
            tightest: HashMap::new(),
            written_to_go: 0,
            waits: false,
        })
    }

    /// Also returns whether a wrong clock had expired tokens too early.
    async fn expire(&mut self) -> anyhow::Result<(Written, bool)> {
        let (store, rules, now) = (self.store, self.orders.rules, self.now);
        let due = store.to_expire(now).await?;
        let start = Watermark { instant: Timestamp::UNIX_EPOCH, token: Uuid::nil() };
        let (mut did, mut marked) = (Written::default(), HashSet::new());
        let mut from = start;
        while due.marked && !self.waits {
            let page = store.marked(from, now, rules.batch).await?;
            let Some(last) = page.last() else { break };
            from = Watermark { instant: last.deadline.expires_at, token: last.id.uuid() };
            marked.extend(page.iter().map(|token| token.id));
            self.expire_page(page, &mut did).await?;
        }
        from = due.known(now).unwrap_or(start);
        while !self.waits {
            let mut page = store.crossing(Lead::EXPIRED, from, now, rules.batch).await?;
            let Some(last) = page.last() else { break };
            from = Watermark { instant: last.deadline.expires_at, token: last.id.uuid() };
            page.retain(|token| !marked.contains(&token.id));
            self.expire_page(page, &mut did).await?;
        }
        did.waits = self.waits;
        self.overdue = self.overdue.saturating_sub(did.tokens);
        Ok((did, due.too_early))
    }

    async fn expire_page(&mut self, mut page: Vec<Candidate>, did: &mut Written) -> anyhow::Result<()> {
        let (store, rules, now) = (self.store, self.orders.rules, self.now);
        let wanted = page.len().saturating_add(usize::try_from(did.tokens).unwrap_or(usize::MAX));
        if let Some(most) = rules.guard.may_expire(store, wanted, now).await? {
            let left = usize::try_from(most.saturating_sub(did.tokens)).unwrap_or(usize::MAX);
            self.waits = left < page.len();
            page.truncate(left);
        }
        if page.is_empty() {
            return Ok(());
        }
        let reminders = expire::decide(store, rules, now, &mut page, &self.newcomers).await?;
        did.tokens += page.len() as u64;
        (self.visit)(Would::Expire(page)).await?;
        self.write(reminders, did, true).await
    }

    async fn remind(&mut self) -> anyhow::Result<Written> {
        let (store, rules, now) = (self.store, self.orders.rules, self.now);
        let due = store.to_remind(now).await?;
        let starts_over = self.orders.reconciles || due.policies != fingerprint(&rules.policy, &rules.groups);
        let (mut did, mut marked) = (Written::default(), HashSet::new());
        let mut from = Watermark::after(now);
        let mut more = due.marked;
        while more {
            let mut page = store.marked(from, NEVER, rules.batch).await?;
            let Some(last) = page.last() else { break };
            from = Watermark { instant: last.deadline.expires_at, token: last.id.uuid() };
            more = page.len() >= rules.batch as usize;
            marked.extend(page.iter().map(|token| token.id));
            rules.describe(store, &mut page).await?;
            let reminders = remind::decide(store, rules, now, &page, None, &self.newcomers).await?;
            self.write(reminders, &mut did, true).await?;
        }
        let mut after = Uuid::nil();
        let mut more = due.uncorrected;
        while more {
            let page = store.uncorrected(after, rules.batch).await?;
            let Some(last) = page.last() else { break };
            after = last.id.uuid();
            more = page.len() >= rules.batch as usize;
            let reminders = remind::corrections::decide(store, rules, now, &page, &self.newcomers).await?;
            self.write(reminders, &mut did, true).await?;
        }
        // What is past its deadline owes no reminder: each lead starts behind it.
        let start = |lead: Lead| {
            let window = Watermark::after(lead.due_at(now));
            due.known(lead, now).filter(|_| !starts_over).map_or(window, |known| known.max(window))
        };
        let leads: Vec<(Lead, Watermark)> = rules.leads().into_iter().map(|lead| (lead, start(lead))).collect();
        let crosses = |token: &Candidate, (lead, from): &(Lead, Watermark)| {
            let instant = lead.due_at(token.deadline.expires_at);
            instant <= now && Watermark { instant, token: token.id.uuid() } > *from
        };
        for (i, (lead, from)) in leads.iter().enumerate() {
            let mut from = *from;
            loop {
                let mut page = store.crossing(*lead, from, now, rules.batch).await?;
                let Some(last) = page.last() else { break };
                from = Watermark { instant: lead.due_at(last.deadline.expires_at), token: last.id.uuid() };
                rules.describe(store, &mut page).await?;
                // What is marked, or crosses a wider lead of its policy, was decided with that.
                let decided = |token: &Candidate| {
                    let policy = rules.terms(token.traits.as_ref()).policy;
                    let wider = leads.iter().take(i).filter(|(lead, _)| policy.leads().contains(lead));
                    marked.contains(&token.id) || wider.into_iter().any(|wider| crosses(token, wider))
                };
                page.retain(|token| !decided(token));
                let reminders = remind::decide(store, rules, now, &page, Some(*lead), &self.newcomers).await?;
                self.write(reminders, &mut did, true).await?;
            }
        }
        Ok(did)
    }

    /// What the ledger does not have yet, and the messages that it needs.
    async fn write(&mut self, reminders: Vec<NewReminder>, did: &mut Written, guarded: bool) -> anyhow::Result<()> {
        if reminders.is_empty() {
            return Ok(());
        }
        let (store, rules, now) = (self.store, self.orders.rules, self.now);
        let wanted = reminders.len().saturating_add(usize::try_from(self.opened).unwrap_or(usize::MAX));
        let known = store.in_ledger(&reminders).await?;
        let (new, known): (Vec<NewReminder>, Vec<_>) =
            reminders.into_iter().zip(known).filter(|(_, known)| !known.is_there).unzip();
        let inserted = new
            .iter()
            .map(|r| (r.contact_column(), r.state.as_str().to_owned(), r.escalation, r.token.uuid(), r.lead.seconds()));
        let needed = Needed::new(&new, &inserted.collect::<Vec<_>>(), now);
        did.pending += needed.pending;
        did.settled += new.len() as u64 - needed.pending;

        let mut held = Vec::new();
        let may_open = if guarded { rules.guard.may_open(store, wanted, now).await? } else { None };
        if let Some(most) = may_open.map(|most| most.saturating_sub(self.opened))
            && needed.reminders.len() as u64 > most
        {
            held = needed.beyond(most, &self.open);
        }
        did.held += held.len() as u64;
        for (contact, deadline) in held.iter().zip(first_deadlines(&held, &new, now)) {
            // One that is held already keeps speaking of its first deadline, be that over.
            let known = self.was_held.get(contact).copied().unwrap_or(deadline);
            let first = self.held.entry(*contact).or_insert(known);
            *first = deadline.min(*first);
        }
        for (contact, not_before) in needed.all_but(&held) {
            self.opened += u64::from(self.open.insert(contact.uuid()));
            let news = self.news.entry(contact).or_insert_with(|| News::from(not_before));
            news.not_before = not_before.min(news.not_before);
        }
        for (_, not_before) in &needed.escalations {
            let last = self.alerted.iter().find(|sent| sent.kind == MessageKind::Escalations);
            let not_before = next_digest(last.and_then(|sent| sent.claimed_at), now, *not_before);
            let news = self.escalated.get_or_insert_with(|| News::from(not_before));
            news.not_before = not_before.min(news.not_before);
        }
        let cutoff = self.orders.retention.cutoffs(now).reminders;
        for (reminder, known) in new.iter().zip(known) {
            let pending = reminder.contact.filter(|_| reminder.state == ReminderState::Pending);
            let Some(contact) = pending else {
                self.written_to_go += u64::from(reminder.expires_at < cutoff);
                continue;
            };
            let NewReminder { token, generation, lead, expires_at, escalation, reason, .. } = *reminder;
            let tightest = known.tightest.map_or(lead, |known| known.min(lead));
            let shortest = self.tightest.entry((contact, token, generation)).or_insert(tightest);
            *shortest = tightest.min(*shortest);
            let claimed = Claimed { lead, generation, tightest };
            let claimed = ClaimedReminder { token, claimed, expires_at, escalation, reason };
            let news = if escalation { self.escalated.as_mut() } else { self.news.get_mut(&contact) };
            if let Some(news) = news.filter(|_| escalation || !held.contains(&contact)) {
                news.reminders.push(claimed);
            }
        }
        if !new.is_empty() {
            (self.visit)(Would::Write(new)).await?;
        }
        Ok(())
    }

    async fn deliver(&mut self) -> anyhow::Result<Delivered> {
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
