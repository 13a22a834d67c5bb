//! What `expire` and `remind` would write: the pages that they would read, and what is new of that to the ledger.
//!
//! A run writes as it goes, and finds it the next time; here what was decided is remembered instead: which tokens, who has a message
//! that collects, what is held, and what each contact would be told.

use std::collections::HashSet;

use uuid::Uuid;

use super::{Dry, News, Would};
use crate::clock::Timestamp;
use crate::jobs::{expire, remind};
use crate::policies::fingerprint;
use crate::policy::{Claimed, Lead};
use crate::store::Store;
use crate::store::accounts::ReminderState;
use crate::store::needed::{Needed, first_deadlines, next_digest};
use crate::store::outbox::{ClaimedReminder, MessageKind};
use crate::store::planning::{Candidate, NewReminder, Watermark, Written};
use crate::token::NEVER;

impl<S: Store, V: AsyncFnMut(Would) -> anyhow::Result<()>> Dry<'_, S, V> {
    /// Also returns whether a wrong clock had expired tokens too early.
    pub(super) async fn expire(&mut self) -> anyhow::Result<(Written, bool)> {
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

    pub(super) async fn remind(&mut self) -> anyhow::Result<Written> {
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
    pub(super) async fn write(
        &mut self,
        reminders: Vec<NewReminder>,
        did: &mut Written,
        guarded: bool,
    ) -> anyhow::Result<()> {
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
}
