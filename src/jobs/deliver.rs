//! `deliver`: sends messages, each to one contact, and records what became of them.
//!
//! A message is claimed in a short transaction, sent in none, and recorded in a short transaction. Between the mail
//! server's acceptance and the record a crash repeats the message, with the same `Message-ID` and the same reminders or
//! fewer; nothing else can repeat one. Nothing is claimed before the mail server answers, so that a server that is out
//! of reach touches no message. What is said is checked against the tokens as they are at that moment.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use chrono::TimeDelta;
use uuid::Uuid;

use super::Outcome;
use crate::clock::{Clock, Timestamp};
use crate::mail::compose::{Composer, Item, Letter};
use crate::mail::outcome::{Happened, Next, decide};
use crate::mail::transport::Transport;
use crate::policy::{Reason, Verdict, recheck};
use crate::store::accounts::ReminderState;
use crate::store::outbox::{ClaimedMessage, ClaimedReminder, Delivery, Record, Settled};
use crate::store::planning::{Facts, NewReminder};
use crate::store::{Result, Store};
use crate::token::{Bucket, ContactId};

/// The job's name in logs.
pub const NAME: &str = "deliver";

/// How long a claim lasts without renewal.
pub const LEASE: TimeDelta = TimeDelta::minutes(5);

/// With less than this left of its lease, a message is renewed before it is handed over.
const RENEW_WITHIN: TimeDelta = TimeDelta::minutes(3);

/// How often a message that is being sent is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(60);

/// How long delivery pauses when the mail server refuses everybody: at first, and at most.
const PAUSE: (TimeDelta, TimeDelta) = (TimeDelta::seconds(5), TimeDelta::minutes(5));

/// What a step did, in messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Taken by the mail server.
    pub sent: u64,
    /// To be tried again.
    pub retried: u64,
    /// Given up.
    pub failed: u64,
    /// Had nothing left to say.
    pub cancelled: u64,
    /// Lost to another process before they were handed over or recorded.
    pub lost: u64,
}

impl fmt::Display for Delivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.sent, "sent"),
            (self.retried, "to be tried again"),
            (self.failed, "given up"),
            (self.cancelled, "had nothing left to say"),
            (self.lost, "lost to another process"),
        ];
        let words: Vec<String> =
            counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{what}: {n}")).collect();
        f.write_str(if words.is_empty() { "nothing was due" } else { "messages " })?;
        f.write_str(&words.join(", "))
    }
}

impl std::ops::AddAssign for Delivered {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.retried += other.retried;
        self.failed += other.failed;
        self.cancelled += other.cancelled;
        self.lost += other.lost;
    }
}

/// Why delivery waits for the mail server.
#[derive(Clone, Debug)]
struct Paused {
    until: Timestamp,
    next: TimeDelta,
}

/// Sends messages from a store through one session.
pub struct Deliverer<S, C> {
    store: S,
    clock: C,
    composer: Composer,
    transport: Transport,
    fallback: Option<ContactId>,
    holder: Uuid,
    due: VecDeque<Bucket>,
    paused: Option<Paused>,
}

impl<S: Store, C: Clock> Deliverer<S, C> {
    /// A deliverer that sends through this transport, and claims in the name of this process.
    pub fn new(
        store: S,
        clock: C,
        composer: Composer,
        transport: Transport,
        fallback: Option<ContactId>,
        holder: Uuid,
    ) -> Self {
        Self { store, clock, composer, transport, fallback, holder, due: VecDeque::new(), paused: None }
    }

    /// The transport, for tests that ask what it sent.
    pub fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    /// Whether the mail server refuses everybody, so that messages wait without being tried.
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Sends the due messages of a bucket, as many as the transport takes at once.
    ///
    /// # Errors
    /// When the store fails. Claimed messages are then claimed again when their lease ends.
    pub async fn step(&mut self) -> Result<Outcome<Delivered>> {
        let nothing = Outcome { did: Delivered::default(), more: false };
        let now = self.clock.now();
        if self.paused.as_ref().is_some_and(|paused| now < paused.until && paused.until <= now + PAUSE.1) {
            return Ok(nothing);
        }
        if self.due.is_empty() {
            let due = self.store.queue(now).await?.due;
            // From a random start, so that several processes begin in different places.
            let start = usize::from(rand::random::<u8>()) % due.len().max(1);
            self.due = due.iter().cycle().skip(start).take(due.len()).copied().collect();
        }
        let Some(bucket) = self.due.front().copied() else {
            return Ok(nothing);
        };
        if let Err(happened) = self.transport.ready().await {
            self.pause(&happened.reply(), now);
            return Ok(nothing);
        }
        self.resume();
        // Anew: a slow server may take longer to greet us than a lease lasts.
        let now = self.clock.now();
        let claimed = self.store.claim(bucket, self.holder, now, now + LEASE, 1).await?;
        if claimed.is_empty() {
            self.due.pop_front();
        }
        let mut did = Delivered::default();
        for message in claimed {
            did += self.deliver(message).await?;
        }
        Ok(Outcome { did, more: self.paused.is_none() })
    }

    /// When the next step would find something to do, as far as is known now; `None`: not before something new is due.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn next_due(&self) -> Result<Option<Timestamp>> {
        if let Some(paused) = &self.paused {
            return Ok(Some(paused.until));
        }
        let now = self.clock.now();
        let queue = self.store.queue(now).await?;
        Ok(if queue.due.is_empty() { queue.next } else { Some(now) })
    }

    /// Ends the session with the mail server.
    pub async fn close(&mut self) {
        self.transport.close().await;
    }

    async fn deliver(&mut self, message: ClaimedMessage) -> Result<Delivered> {
        let mut ids: Vec<_> = message.reminders.iter().map(|reminder| reminder.token).collect();
        ids.sort_unstable();
        ids.dedup();
        let facts = self.store.facts(message.contact.id, &ids).await?;
        let now = self.clock.now();
        let Judged { speaking, mut settled, passed_on } = judge(&message, &facts, now);
        let to_new_fallback = self.fallback.filter(|fallback| *fallback != message.contact.id);
        let passed_on = to_new_fallback
            .into_iter()
            .flat_map(|fallback| passed_on.iter().map(move |said| said.escalated(fallback, said.reminder.reason)));
        let passed_on: Vec<NewReminder> = passed_on.collect();

        let suppressed = message.contact.suppressed.is_some();
        if speaking.is_empty() || suppressed {
            let why = Reason::Suppressed;
            settled.extend(speaking.iter().map(|said| said.settled(ReminderState::Unreachable, Some(why))));
            let mut escalations = self.escalations(&message, &speaking, why, true).await?;
            escalations.extend(passed_on);
            let record = Record { delivery: Delivery::Cancelled, settled, suppress: None, escalations };
            return self.record(&message, record, message.lease_until).await;
        }

        let hold = Hold { store: &self.store, clock: &self.clock, message: &message, until: AtomicI64::new(0) };
        hold.until.store(message.lease_until.timestamp(), Ordering::Relaxed);
        let items = speaking.iter().filter_map(|said| said.item(&facts)).collect();
        let letter = Letter { message: message.id, to: message.contact.clone(), items };
        let happened = match self.composer.compose(&letter, now) {
            Ok(composed) => {
                let sending = self.transport.send(message.id, &composed, || hold.still_ours());
                tokio::pin!(sending);
                loop {
                    tokio::select! {
                        happened = &mut sending => break happened,
                        // Dropping the send drops its session: nothing more goes out.
                        () = tokio::time::sleep(RENEW_EVERY) => if !hold.prolong().await && hold.is_over() {
                            break Happened::LostLease;
                        },
                    }
                }
            }
            Err(error) => Happened::Unbuildable { error: error.to_string() },
        };

        let (now, lease_until) = (self.clock.now(), hold.until());
        let attempt = u32::try_from(message.attempts).unwrap_or_default().saturating_add(1);
        let next = decide(&happened, attempt, now - message.first_claimed_at, rand::random());
        let mut record = match next {
            Next::Abandon => {
                tracing::warn!(message = %message.id, "lost the lease on a message before it was handed over");
                return Ok(Delivered { lost: 1, ..Delivered::default() });
            }
            Next::Sent { reply } => {
                settled.extend(speaking.iter().map(|said| said.settled(ReminderState::Sent, None)));
                Record { delivery: Delivery::Sent(reply), settled, suppress: None, escalations: Vec::new() }
            }
            Next::Retry { after, reply } => {
                let delivery = Delivery::Retry { at: now + after, reply, counts: true };
                Record { delivery, settled, suppress: None, escalations: Vec::new() }
            }
            Next::Pause { reply } => {
                self.pause(&reply, now);
                let delivery = Delivery::Retry { at: now + PAUSE.0, reply, counts: false };
                Record { delivery, settled, suppress: None, escalations: Vec::new() }
            }
            Next::Failed { reply, suppress } => {
                let why = Reason::Undeliverable;
                settled.extend(speaking.iter().map(|said| said.settled(ReminderState::Failed, Some(why))));
                let escalations = self.escalations(&message, &speaking, why, suppress).await?;
                let suppress = suppress.then(|| reply.clone());
                Record { delivery: Delivery::Failed(reply), settled, suppress, escalations }
            }
        };
        record.escalations.extend(passed_on);
        self.record(&message, record, lease_until).await
    }

    /// What the fallback is told of reminders that their contact was not. Where the address was at fault, another contact
    /// of the owner is enough; where the message was, operations must hear of it.
    async fn escalations(
        &self,
        message: &ClaimedMessage,
        unsaid: &[Said<'_>],
        why: Reason,
        address_at_fault: bool,
    ) -> Result<Vec<NewReminder>> {
        let Some(fallback) = self.fallback.filter(|_| !unsaid.is_empty()) else { return Ok(Vec::new()) };
        if fallback == message.contact.id {
            tracing::error!(message = %message.id, "the fallback itself could not be told");
            return Ok(Vec::new());
        }
        let mut owners: Vec<_> = unsaid.iter().filter_map(|said| said.owner).collect();
        owners.sort_unstable();
        owners.dedup();
        let reachable = self.store.reachable(&owners).await?;
        let told = |said: &&Said<'_>| {
            let contacts = said.owner.and_then(|owner| reachable.get(&owner)).map_or(&[][..], Vec::as_slice);
            address_at_fault && contacts.iter().any(|contact| *contact != message.contact.id)
        };
        Ok(unsaid.iter().filter(|said| !told(said)).map(|said| said.escalated(fallback, Some(why))).collect())
    }

    /// Records what became of a message. While the store is out of reach it tries again until the lease ends: a message
    /// that was sent and not recorded would be sent twice.
    async fn record(&self, message: &ClaimedMessage, record: Record, lease_until: Timestamp) -> Result<Delivered> {
        let recorded = loop {
            let now = self.clock.now();
            match self.store.record(message, &record, now).await {
                Err(error) if error.is_transient() && now < lease_until => {
                    tracing::warn!(message = %message.id, %error, "cannot record a message yet");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                answer => break answer?,
            }
        };
        let id = message.id;
        let reminders = record.settled.iter().filter(|settled| settled.state == ReminderState::Sent).count();
        let mut did = Delivered::default();
        if !recorded {
            tracing::warn!(message = %id, "another process took this message over: it may arrive twice");
            did.lost = 1;
            return Ok(did);
        }
        match &record.delivery {
            Delivery::Sent(_) => {
                tracing::info!(message = %id, reminders, attempt = message.attempts + 1, "sent a message");
                did.sent = 1;
            }
            Delivery::Retry { at, counts, .. } => {
                tracing::info!(message = %id, retry_at = %at, counts, "a message will be tried again");
                did.retried = 1;
            }
            Delivery::Failed(_) => {
                let suppressed = record.suppress.is_some();
                tracing::warn!(message = %id, contact = %message.contact.id, suppressed, "gave a message up");
                did.failed = 1;
            }
            Delivery::Cancelled => {
                tracing::info!(message = %id, "a message had nothing left to say");
                did.cancelled = 1;
            }
        }
        Ok(did)
    }

    fn pause(&mut self, reply: &str, now: Timestamp) {
        let span = self.paused.as_ref().map_or(PAUSE.0, |paused| paused.next);
        let until = now + span;
        tracing::warn!(reply, retry_at = %until, "the mail server refuses everybody: delivery pauses");
        self.paused = Some(Paused { until, next: (span * 2).min(PAUSE.1) });
    }

    fn resume(&mut self) {
        if self.paused.take().is_some() {
            tracing::info!("the mail server answers again: delivery goes on");
        }
    }
}

/// A reminder that is still true.
struct Said<'a> {
    reminder: &'a ClaimedReminder,
    owner: Option<crate::token::OwnerId>,
}

impl Said<'_> {
    fn settled(&self, state: ReminderState, reason: Option<Reason>) -> Settled {
        Settled { token: self.reminder.token, claimed: self.reminder.claimed, state, reason }
    }

    /// The same for the fallback, and why it is told.
    fn escalated(&self, fallback: ContactId, why: Option<Reason>) -> NewReminder {
        NewReminder {
            token: self.reminder.token,
            generation: self.reminder.claimed.generation,
            lead: self.reminder.claimed.lead,
            contact: Some(fallback),
            expires_at: self.reminder.expires_at,
            state: ReminderState::Pending,
            reason: why,
            escalation: true,
        }
    }

    fn item(&self, facts: &Facts) -> Option<Item> {
        let (token, owner) = facts.tokens.get(&self.reminder.token)?.clone();
        let why = self.reminder.reason.unwrap_or(Reason::NoContact);
        let escalation = self.reminder.escalation.then(|| why.to_string());
        Some(Item { token, owner, lead: self.reminder.claimed.lead, escalation })
    }
}

/// What a message carries, sorted.
struct Judged<'a> {
    /// Still true, and for this contact.
    speaking: Vec<Said<'a>>,
    /// What became of the rest.
    settled: Vec<Settled>,
    /// Those of the rest that are still true, and for whoever is the fallback now.
    passed_on: Vec<Said<'a>>,
}

/// Sorts what a message carries into what is still true and what is not.
fn judge<'a>(message: &'a ClaimedMessage, facts: &Facts, now: Timestamp) -> Judged<'a> {
    let (mut speaking, mut settled, mut passed_on) = (Vec::new(), Vec::new(), Vec::new());
    for reminder in &message.reminders {
        let known = facts.tokens.get(&reminder.token);
        let owner = known.map(|(token, _)| token.owner);
        let said = Said { reminder, owner };
        if facts.broken.contains(&reminder.token) {
            settled.push(said.settled(ReminderState::Failed, Some(Reason::Unreadable)));
            continue;
        }
        let may_hear = match owner {
            Some(owner) => (reminder.escalation && facts.is_fallback) || facts.speaks_for.contains(&owner),
            None => true,
        };
        let verdict = recheck(reminder.claimed, known.map(|(token, _)| token), now);
        match verdict {
            Verdict::Speak if may_hear => speaking.push(said),
            Verdict::Speak => {
                settled.push(said.settled(ReminderState::Cancelled, Some(Reason::NoLongerContact)));
                passed_on.extend(reminder.escalation.then_some(said));
            }
            Verdict::Superseded(why) => settled.push(said.settled(ReminderState::Superseded, Some(why))),
            Verdict::Cancelled(why) => settled.push(said.settled(ReminderState::Cancelled, Some(why))),
        }
    }
    Judged { speaking, settled, passed_on }
}

/// A claimed message's lease while it is being sent.
struct Hold<'a, S, C> {
    store: &'a S,
    clock: &'a C,
    message: &'a ClaimedMessage,
    /// In seconds since 1970.
    until: AtomicI64,
}

impl<S: Store, C: Clock> Hold<'_, S, C> {
    fn until(&self) -> Timestamp {
        Timestamp::from_timestamp(self.until.load(Ordering::Relaxed), 0).unwrap_or_default()
    }

    fn left(&self) -> TimeDelta {
        self.until() - self.clock.now()
    }

    fn is_over(&self) -> bool {
        self.left() <= TimeDelta::zero()
    }

    async fn prolong(&self) -> bool {
        let until = self.clock.now() + LEASE;
        let Ok(renewed) = self.store.renew(self.message, until).await else { return false };
        // Whoever has it now does not wait for what was promised to us.
        let until = if renewed { until } else { Timestamp::UNIX_EPOCH };
        self.until.store(until.timestamp(), Ordering::Relaxed);
        renewed
    }

    async fn still_ours(&self) -> bool {
        self.left() > RENEW_WITHIN || self.prolong().await
    }
}
