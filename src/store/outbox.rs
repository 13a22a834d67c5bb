//! What delivery does: claim messages under a lease, renew it, and record what became of them.

use std::collections::HashSet;
use std::future::Future;

use uuid::Uuid;

use super::Result;
use super::accounts::ReminderState;
use super::planning::NewReminder;
use crate::clock::Timestamp;
use crate::policy::{Claimed, Reason};
use crate::token::{Bucket, Contact, ContactId, MessageId, TokenId, words};

/// What has become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MessageState {
    /// Never claimed; collects what becomes due.
    Open,
    /// Kept back by a guard.
    Held,
    /// Claimed, and leased to whoever sends it.
    Sending,
    /// To be tried again.
    Retry,
    /// A mail server took it.
    Sent,
    /// Given up.
    Failed,
    /// It had nothing left to say.
    Cancelled,
}

words!(MessageState {
    Open => "open",
    Held => "held",
    Sending => "sending",
    Retry => "retry",
    Sent => "sent",
    Failed => "failed",
    Cancelled => "cancelled",
});

/// What a message is for. Each kind collects in a message of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MessageKind {
    /// Reminders for a contact.
    Reminders,
    /// For the fallback: what others could not be told. One a day.
    Escalations,
    /// For the fallback: a guard keeps messages back.
    Held,
    /// For the fallback: a message that is kept back comes near its token's deadline.
    HeldUrgent,
    /// For the fallback: a guard keeps tokens from being marked expired.
    Expiry,
}

words!(MessageKind {
    Reminders => "reminders",
    Escalations => "escalations",
    Held => "held",
    HeldUrgent => "held_urgent",
    Expiry => "expiry",
});

impl MessageKind {
    /// Whether it carries reminders; else it is an alert.
    pub fn carries(self) -> bool {
        matches!(self, Self::Reminders | Self::Escalations)
    }
}

/// Where messages are due, and when the next one will be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// The buckets that have messages to claim.
    pub due: Vec<Bucket>,
    /// When the next message can be claimed that cannot be now.
    pub next: Option<Timestamp>,
}

/// A reminder that a claimed message carries.
#[derive(Clone, Copy, Debug)]
pub struct ClaimedReminder {
    /// Which token.
    pub token: TokenId,
    /// What the ledger says.
    pub claimed: Claimed,
    /// The deadline that it was written for.
    pub expires_at: Timestamp,
    /// Whether it tells the fallback what an owner could not be told.
    pub escalation: bool,
    /// Why it is escalated.
    pub reason: Option<Reason>,
}

impl ClaimedReminder {
    /// The same for the fallback, and why it is told.
    pub fn escalated(&self, fallback: ContactId, why: Option<Reason>) -> NewReminder {
        NewReminder {
            token: self.token,
            generation: self.claimed.generation,
            lead: self.claimed.lead,
            contact: Some(fallback),
            expires_at: self.expires_at,
            state: ReminderState::Pending,
            reason: why,
            escalation: true,
            not_before: None,
        }
    }
}

/// A message that this process may send until its lease ends.
#[derive(Clone, Debug)]
pub struct ClaimedMessage {
    /// Which message.
    pub id: MessageId,
    /// What it is for.
    pub kind: MessageKind,
    /// To whom.
    pub contact: Contact,
    /// The process.
    pub holder: Uuid,
    /// Counts the claims; fences what is recorded.
    pub epoch: i32,
    /// Until when.
    pub lease_until: Timestamp,
    /// How often it was tried before.
    pub attempts: i32,
    /// How often it was claimed by a process that never said what became of it.
    pub lost_claims: i32,
    /// When it was opened.
    pub created_at: Timestamp,
    /// When it was first claimed.
    pub first_claimed_at: Timestamp,
    /// What it carries.
    pub reminders: Vec<ClaimedReminder>,
}

/// What became of a claimed message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// A mail server took it; its reply.
    Sent(String),
    /// To be tried again.
    Retry {
        /// Not before this instant.
        at: Timestamp,
        /// The mail server's reply, or the error.
        reply: String,
        /// Whether it counts as an attempt: not when the server was out of reach.
        counts: bool,
        /// Whether nobody knows if it was delivered.
        unknown: bool,
    },
    /// Never tried: what it carries that is not settled goes with the message of its contact that collects, or with a new one.
    PutOff {
        /// Not before this instant.
        at: Timestamp,
    },
    /// Given up; the reply.
    Failed(String),
    /// It had nothing left to say.
    Cancelled,
}

/// What became of a reminder that a message carried.
#[derive(Clone, Copy, Debug)]
pub struct Settled {
    /// Which token.
    pub token: TokenId,
    /// Which deadline and lead.
    pub claimed: Claimed,
    /// What has become of it.
    pub state: ReminderState,
    /// Why it was not sent.
    pub reason: Option<Reason>,
}

/// What is recorded of a claimed message, in one transaction.
#[derive(Clone, Debug)]
pub struct Record {
    /// What became of the message.
    pub delivery: Delivery,
    /// What became of its reminders; those that are not named stay pending.
    pub settled: Vec<Settled>,
    /// What the fallback is told.
    pub escalations: Vec<NewReminder>,
}

/// The messages that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Collect what becomes due, or are about to be claimed.
    pub open: u64,
    /// Kept back by a guard.
    pub held: u64,
    /// Claimed.
    pub sending: u64,
    /// To be tried again.
    pub retry: u64,
    /// Since when the oldest of them waits: one that collects, since it may go, which may lie ahead.
    pub oldest: Option<Timestamp>,
}

/// How many messages there are in a state.
pub type MessageCount = (MessageState, u64);

/// The outbox.
pub trait Outbox {
    /// Where messages are due.
    ///
    /// # Errors
    /// When the store fails.
    fn queue(&self, now: Timestamp) -> impl Future<Output = Result<Queue>> + Send;

    /// Claims due messages of these buckets, `limit` at most: those that are open or in retry, and those whose lease ended.
    /// One that is claimed for the first time takes all that is pending for its contact and of its kind; a later claim adds
    /// nothing. Where [`Store::SPANS_BUCKETS`](super::Store::SPANS_BUCKETS) is false, only the first bucket is looked at.
    ///
    /// # Errors
    /// When the store fails, with nothing claimed.
    fn claim(
        &self,
        buckets: &[Bucket],
        holder: Uuid,
        now: Timestamp,
        lease_until: Timestamp,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<ClaimedMessage>>> + Send;

    /// Prolongs the lease on a message; `false` when it was lost.
    ///
    /// # Errors
    /// When the store fails: then the lease cannot be relied on either.
    fn renew(&self, message: &ClaimedMessage, lease_until: Timestamp) -> impl Future<Output = Result<bool>> + Send;

    /// Records what became of messages, in one transaction; for each `false`, with nothing written of it, when its lease
    /// was lost. Where [`Store::SPANS_BUCKETS`](super::Store::SPANS_BUCKETS) is false, they are of one bucket.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn record(
        &self,
        outcomes: &[(&ClaimedMessage, &Record)],
        now: Timestamp,
    ) -> impl Future<Output = Result<Vec<bool>>> + Send;

    /// The contact of a claimed message takes no mail from now on, because of this reply. Nothing is written when the
    /// lease was lost.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn suppress(
        &self,
        message: &ClaimedMessage,
        reply: &str,
        now: Timestamp,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Since when the oldest message waits; one that collects, since it may go, which may lie ahead. Looks at all that wait: not for
    /// the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn oldest_waiting(&self) -> impl Future<Output = Result<Option<Timestamp>>> + Send;

    /// How many messages can be claimed now, `most` at most.
    ///
    /// # Errors
    /// When the store fails.
    fn mails_due(&self, now: Timestamp, most: u32) -> impl Future<Output = Result<u32>> + Send;

    /// When a mail server last took a message.
    ///
    /// # Errors
    /// When the store fails.
    fn last_sent(&self) -> impl Future<Output = Result<Option<Timestamp>>> + Send;

    /// How many messages there are, by state. Counts them all: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn message_counts(&self) -> impl Future<Output = Result<Vec<MessageCount>>> + Send;
}

/// The earliest message of each bucket: 256 probes of the index `messages_queue`.
pub(super) const QUEUE: &str = "WITH RECURSIVE buckets (bucket) AS ( \
         SELECT 0 UNION ALL SELECT bucket + 1 FROM buckets WHERE bucket < 255 \
     ) \
     SELECT b.bucket, ( \
         SELECT MIN(m.not_before) \
         FROM messages m \
         WHERE m.bucket = b.bucket AND m.state IN ('open', 'retry', 'sending') \
     ) AS earliest \
     FROM buckets b";

/// Prolongs a lease that is still this process's.
pub(super) const RENEW: &str = "UPDATE messages SET not_before = $5 \
     WHERE bucket = $1 AND id = $2 AND state = 'sending' AND lease_holder = $3 AND lease_epoch = $4";

/// A contact takes no mail from now on, says who holds the lease on a message to it.
pub(super) const SUPPRESS: &str = "UPDATE contacts SET suppressed_at = $3, suppressed_why = $4 \
     WHERE bucket = $1 AND id = $2 AND suppressed_at IS NULL \
       AND EXISTS ( \
           SELECT 1 FROM messages m \
           WHERE m.bucket = $1 AND m.id = $5 AND m.state = 'sending' AND m.lease_holder = $6 AND m.lease_epoch = $7 \
       )";

/// Gives up a message that cannot be read.
pub(super) const GIVE_UP_MESSAGE: &str = "UPDATE messages SET state = 'failed', last_reply = $3, finished_at = $4 \
     WHERE bucket = $1 AND id = $2";

/// Gives up what a message that cannot be read carries.
pub(super) const GIVE_UP_REMINDERS: &str = "UPDATE reminders SET state = 'failed', settled_at = $3 \
     WHERE bucket = $1 AND message_id = $2 AND state = 'pending'";

/// Who hears of what owners could not be told. Index owners_key.
pub(super) const FALLBACK: &str = "SELECT c.contact_id \
     FROM owners o \
     JOIN owner_contacts c ON c.bucket = o.bucket AND c.owner_id = o.id \
     WHERE o.bucket = $1 AND o.key = $2";

/// Since when the oldest message waits: one that collects, since it may go.
pub(super) const OLDEST_WAITING: &str = "SELECT MIN(CASE WHEN state = 'open' THEN not_before ELSE created_at END) \
     FROM messages WHERE state IN ('open', 'held', 'retry', 'sending')";

/// The messages that can be claimed sooner or later, by state: all of the index `messages_queue`, and nothing else.
pub(super) const WAITING: &str = "SELECT state, COUNT(*), MIN(CASE WHEN state = 'open' THEN not_before ELSE created_at END) \
     FROM messages \
     WHERE bucket BETWEEN 0 AND 255 AND state IN ('open', 'retry', 'sending') \
     GROUP BY state";

/// How many messages can be claimed now, up to a limit: a part of the index `messages_queue`, which has those that wait.
pub(super) const MAILS_DUE: &str = "SELECT COUNT(*) FROM ( \
         SELECT 1 AS due FROM messages \
         WHERE state IN ('open', 'retry', 'sending') AND not_before <= $1 \
         LIMIT $2 \
     ) AS some";

/// When a mail server last took a message: the end of the index `messages_finished`.
pub(super) const LAST_SENT: &str = "SELECT finished_at FROM messages \
     WHERE state = 'sent' AND finished_at IS NOT NULL \
     ORDER BY finished_at DESC \
     LIMIT 1";

/// How many messages there are, by state.
pub(super) const MESSAGE_COUNTS: &str = "SELECT state, COUNT(*) FROM messages GROUP BY state ORDER BY state";

impl Waiting {
    /// Adds up what the rows of [`WAITING`] say.
    pub(super) fn from_rows(rows: impl IntoIterator<Item = (String, i64, Option<Timestamp>)>) -> Self {
        let mut waiting = Self::default();
        for (state, count, oldest) in rows {
            let count = count.unsigned_abs();
            match state.parse() {
                Ok(MessageState::Open) => waiting.open = count,
                Ok(MessageState::Sending) => waiting.sending = count,
                Ok(MessageState::Retry) => waiting.retry = count,
                _ => continue,
            }
            waiting.oldest = [waiting.oldest, oldest].into_iter().flatten().min();
        }
        waiting
    }
}

impl Queue {
    /// Sorts the earliest instants of the buckets into what is due and what comes next.
    pub(super) fn from_earliest(earliest: impl Iterator<Item = (i64, Timestamp)>, now: Timestamp) -> Self {
        let mut queue = Self::default();
        for (bucket, at) in earliest {
            let Ok(bucket) = u8::try_from(bucket) else { continue };
            if at <= now {
                queue.due.push(Bucket::from_number(bucket));
            } else {
                queue.next = Some(queue.next.map_or(at, |next| next.min(at)));
            }
        }
        queue
    }
}

/// Takes what is not settled of a message that was put off from it.
pub(super) const DETACH: &str = "UPDATE reminders SET message_id = NULL WHERE bucket = $1 AND message_id = $2 AND contact_id = $3 AND state = 'pending'";

/// The messages that were put off, by contact, and until when.
pub(super) fn put_off<'a>(
    outcomes: &'a [(&'a ClaimedMessage, &'a Record)],
    recorded: &HashSet<Uuid>,
) -> Vec<(&'a ClaimedMessage, Timestamp)> {
    let ours = outcomes.iter().filter(|(message, _)| recorded.contains(&message.id.uuid()));
    let until = |record: &Record| if let Delivery::PutOff { at } = record.delivery { Some(at) } else { None };
    ours.filter_map(|(message, record)| Some((*message, until(record)?))).collect()
}

impl Delivery {
    /// The state that a message goes to.
    pub(super) fn state(&self) -> MessageState {
        match self {
            Self::Sent(_) => MessageState::Sent,
            Self::Retry { .. } => MessageState::Retry,
            Self::Failed(_) => MessageState::Failed,
            Self::PutOff { .. } | Self::Cancelled => MessageState::Cancelled,
        }
    }

    /// The reply to keep.
    pub(super) fn reply(&self) -> Option<&str> {
        match self {
            Self::Sent(reply) | Self::Failed(reply) | Self::Retry { reply, .. } => Some(reply),
            Self::PutOff { .. } => Some("left to a later message: the contact was sent another just now"),
            Self::Cancelled => None,
        }
    }

    /// How many attempts it adds.
    pub(super) fn attempts(&self) -> i32 {
        i32::from(!matches!(self, Self::PutOff { .. } | Self::Cancelled | Self::Retry { counts: false, .. }))
    }

    /// How many unknown outcomes it adds.
    pub(super) fn unknown_outcomes(&self) -> i32 {
        i32::from(matches!(self, Self::Retry { unknown: true, .. }))
    }

    /// When the message may be claimed again, and when it was finished.
    pub(super) fn instants(&self, now: Timestamp) -> (Timestamp, Option<Timestamp>) {
        match self {
            Self::Retry { at, .. } => (*at, None),
            _ => (now, Some(now)),
        }
    }
}
