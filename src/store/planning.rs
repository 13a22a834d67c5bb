//! What the planning jobs do: find tokens that are due, write what was decided about them, and purge what is old.
//!
//! Engine code that reads tokens stands behind this trait and nowhere else.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;

use chrono::TimeDelta;
use chrono_tz::Tz;
use uuid::Uuid;

use super::Result;
use super::accounts::ReminderState;
use super::jobs::Lease;
use super::outbox::MessageKind;
use super::row::At;
use crate::clock::Timestamp;
use crate::policies::Traits;
use crate::policy::{Deadline, Lead, Reason, Usage};
use crate::token::{Bucket, ContactId, Owner, OwnerId, Token, TokenId};

/// How far a lead has been dealt with: every token whose reminder fell due at an earlier instant, or at this one with
/// an id no greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Watermark {
    /// The instant at which reminders fall due.
    pub instant: Timestamp,
    /// The last token dealt with among those that share the instant.
    pub token: Uuid,
}

impl Watermark {
    /// All reminders that fall due at this instant are dealt with.
    pub fn after(instant: Timestamp) -> Self {
        Self { instant, token: Uuid::max() }
    }
}

/// A token that a pass looks at, with what its decision rests on.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Which token.
    pub id: TokenId,
    /// Whose it is.
    pub owner: OwnerId,
    /// Its deadline, and when that was set.
    pub deadline: Deadline,
    /// Which of its deadlines this is.
    pub generation: i32,
    /// Whether anybody still uses it.
    pub usage: Usage,
    /// The deadline before somebody else than the owner moved it.
    pub moved_from: Option<Timestamp>,
    /// What it is matched by, where its policy depends on that.
    pub traits: Option<Traits>,
}

/// A row for the ledger.
#[derive(Clone, Debug)]
pub struct NewReminder {
    /// Which token.
    pub token: TokenId,
    /// Which of its deadlines.
    pub generation: i32,
    /// How long before it.
    pub lead: Lead,
    /// To whom; `None` where the owner has no contact.
    pub contact: Option<ContactId>,
    /// The deadline that it speaks of.
    pub expires_at: Timestamp,
    /// What has become of it; `Pending` opens a message.
    pub state: ReminderState,
    /// Why it is not sent, or why it is escalated.
    pub reason: Option<Reason>,
    /// Whether it tells the fallback what an owner could not be told.
    pub escalation: bool,
    /// From when on its message may be sent; `None`: at once.
    pub not_before: Option<Timestamp>,
}

impl NewReminder {
    /// The contact's bucket, or the token's where there is no contact.
    pub fn bucket(&self) -> Bucket {
        self.contact.map_or_else(|| self.token.bucket(), ContactId::bucket)
    }

    /// The contact's id, or the nil id.
    pub fn contact_column(&self) -> Uuid {
        self.contact.map_or_else(Uuid::nil, ContactId::uuid)
    }
}

/// A contact that takes mail, and what its waits depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addressee {
    /// Overrides the owner's zone.
    pub time_zone: Option<Tz>,
    /// When it was last sent reminders, where that is remembered.
    pub mailed_at: Option<Timestamp>,
}

/// What a step decided, to be written in one transaction.
#[derive(Debug)]
pub struct Decided<'a> {
    /// The instant of the decision.
    pub now: Timestamp,
    /// The tokens that were looked at. What is decided about one that has changed since is not written.
    pub looked_at: &'a [Candidate],
    /// The rows for the ledger. Those that it has already stay as they are.
    pub reminders: Vec<NewReminder>,
    /// How many messages may be opened; what needs more is held. `None`: any number.
    pub may_open: Option<u64>,
}

/// How many reminders, by lead and by what has become of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reminded(BTreeMap<(Lead, ReminderState), u64>);

impl Reminded {
    /// Counts one more.
    pub fn add(&mut self, lead: Lead, state: ReminderState) {
        *self.0.entry((lead, state)).or_default() += 1;
    }

    /// Each lead and state with its number.
    pub fn iter(&self) -> impl Iterator<Item = (Lead, ReminderState, u64)> {
        self.0.iter().map(|((lead, state), count)| (*lead, *state, *count))
    }
}

impl std::ops::AddAssign for Reminded {
    fn add_assign(&mut self, other: Self) {
        for (key, count) in other.0 {
            *self.0.entry(key).or_default() += count;
        }
    }
}

/// What became of what a planning step decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Tokens that changed.
    pub tokens: u64,
    /// Reminders written to be sent.
    pub pending: u64,
    /// Reminders written as superseded, unreachable or stale.
    pub settled: u64,
    /// Messages that were opened.
    pub opened: u64,
    /// Messages that were held, or to which something was added.
    pub held: u64,
    /// Tokens past their deadline wait, because more would be marked expired than the guard allows in an hour.
    pub waits: bool,
    /// The reminders that were written.
    pub reminded: Reminded,
    /// How long after its deadline each token was marked as expired.
    pub lags: Vec<TimeDelta>,
}

/// What jobs did within a span of time, by the minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Messages that were opened.
    pub messages: u64,
    /// Tokens that were marked expired.
    pub expired: u64,
}

/// What a guard keeps back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// How many messages.
    pub messages: u64,
    /// When the first of them was.
    pub since: Timestamp,
    /// When the last of them was.
    pub latest: Timestamp,
    /// The next deadline that they speak of, where one lies ahead.
    pub next_deadline: Option<Timestamp>,
}

/// The least time between two digests of escalations.
const DIGEST_EVERY: TimeDelta = TimeDelta::days(1);

/// From when on a digest of escalations may be claimed, if the last one was first claimed then. One that lies in the
/// future was claimed by a wrong clock, and is not waited for.
pub(crate) fn next_digest(last: Option<Timestamp>, now: Timestamp, not_before: Timestamp) -> Timestamp {
    let next = last.filter(|last| *last <= now).map_or(not_before, |last| last + DIGEST_EVERY);
    next.max(not_before)
}

/// The minute that an instant belongs to.
pub(super) fn minute(at: Timestamp) -> Timestamp {
    at - TimeDelta::seconds(at.timestamp().rem_euclid(60))
}

/// The name under which expired tokens are counted; messages are under the name of the job that opened them.
pub(super) const EXPIRED: &str = "expired";

/// Counts what a job did in this minute.
pub(super) const COUNT: &str = "INSERT INTO guard_counts (bucket, name, minute, amount) VALUES (0, $1, $2, $3) \
     ON CONFLICT (bucket, minute, name) DO UPDATE SET amount = guard_counts.amount + excluded.amount";

/// What was counted within a span of minutes.
pub(super) const COUNTED: &str = "SELECT name, CAST(SUM(amount) AS BIGINT) FROM guard_counts \
     WHERE bucket = 0 AND minute > $1 AND minute <= $2 \
     GROUP BY name";

/// Forgets what was counted long ago.
pub(super) const FORGET_COUNTS: &str = "DELETE FROM guard_counts WHERE bucket = 0 AND minute < $1";

/// When the fallback's last digest was first claimed. Index messages_to_fallback.
pub(super) const LAST_DIGEST: &str = "SELECT MAX(claimed_at) FROM messages \
     WHERE bucket = $1 AND contact_id = $2 AND kind = 'escalations' AND kind <> 'reminders'";

/// What is held: how much, since when, and the next deadline. Index messages_held_deadline.
pub(super) const HELD: &str = "SELECT COUNT(*), MIN(created_at), MAX(created_at), \
            (SELECT MIN(not_before) FROM messages WHERE state = 'held' AND not_before > $1) \
     FROM messages WHERE state = 'held'";

/// Opens an alert, unless one of its kind was opened since. Index messages_to_fallback.
pub(super) const ALERT: &str = "INSERT INTO messages \
         (bucket, id, contact_id, kind, state, not_before, attempts, lease_epoch, created_at) \
     SELECT $1, $2, $3, $4, 'open', $5, 0, 0, $5 \
     WHERE NOT EXISTS ( \
         SELECT 1 FROM messages \
         WHERE bucket = $1 AND contact_id = $3 AND kind = $4 AND kind <> 'reminders' AND created_at >= $6 \
     ) \
     ON CONFLICT DO NOTHING";

impl Counted {
    /// Adds up what the rows of [`COUNTED`] say.
    pub(super) fn from_rows(rows: impl IntoIterator<Item = (String, i64)>) -> Self {
        let mut counted = Self::default();
        for (name, amount) in rows {
            let amount = u64::try_from(amount).unwrap_or_default();
            if name == EXPIRED {
                counted.expired += amount;
            } else {
                counted.messages += amount;
            }
        }
        counted
    }
}

/// The columns of [`HELD`].
pub(super) type HeldRow = (i64, Option<At>, Option<At>, Option<At>);

impl Held {
    /// From the row of [`HELD`]; `None` where nothing is held.
    pub(super) fn from_row(row: HeldRow) -> Option<Self> {
        let (messages, since, latest, next_deadline) = row;
        let messages = u64::try_from(messages).unwrap_or_default();
        let (since, latest) = (since?.0, latest?.0);
        Some(Self { messages, since, latest, next_deadline: next_deadline.map(|at| at.0) })
    }
}

/// What `remind` moves on by what it writes.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// The tokens are planned: their marks are taken off, but for those that have another description since.
    Planned,
    /// The lead has been dealt with up to here.
    Reached(Lead, Watermark),
}

/// What is old enough to go.
#[derive(Clone, Copy, Debug)]
pub struct Cutoffs {
    /// Ledger rows whose deadline lies before this.
    pub reminders: Timestamp,
    /// Messages that were finished before this.
    pub messages: Timestamp,
    /// Tokens that ended before this.
    pub ended_tokens: Timestamp,
    /// What the guards counted before this.
    pub guard_counts: Timestamp,
}

/// How many rows a purge step removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Ledger rows.
    pub reminders: u64,
    /// Messages.
    pub messages: u64,
    /// Tokens.
    pub tokens: u64,
}

/// What is true of the tokens that a contact is to be told of, read at the moment of sending.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The tokens that there still are, with their owners.
    pub tokens: HashMap<TokenId, (Token, Owner)>,
    /// The tokens that there are, but that cannot be read, or whose owner cannot.
    pub broken: HashSet<TokenId>,
    /// Those that the contact may hear of: it speaks for their owner, or watches them.
    pub heard: HashSet<TokenId>,
    /// Whether the contact is the fallback.
    pub is_fallback: bool,
}

/// Finding what is due, and writing what was decided.
pub trait Planning {
    /// Active tokens that are marked unplanned and whose deadline has passed, earliest first.
    ///
    /// # Errors
    /// When the store fails.
    fn overdue(&self, now: Timestamp, limit: u32) -> impl Future<Output = Result<Vec<Candidate>>> + Send;

    /// Marks tokens expired and writes their notices, and up to where that dealt with lead 0. Tokens that changed since
    /// they were read stay as they are.
    ///
    /// # Errors
    /// [`Error::LostLease`](super::Error::LostLease), with nothing written.
    fn expire(
        &self,
        lease: &Lease,
        decided: Decided<'_>,
        reached: Option<Watermark>,
    ) -> impl Future<Output = Result<Written>> + Send;

    /// Makes tokens active again that a wrong clock expired before their deadline, `limit` at most. Each counts a new
    /// generation: what was written about it is no longer true, and its reminders are owed anew.
    ///
    /// # Errors
    /// [`Error::LostLease`](super::Error::LostLease), with nothing written.
    fn revive(&self, lease: &Lease, now: Timestamp, limit: u32) -> impl Future<Output = Result<u64>> + Send;

    /// Active tokens that are marked unplanned and whose deadline lies ahead, earliest first.
    ///
    /// # Errors
    /// When the store fails.
    fn unplanned(&self, now: Timestamp, limit: u32) -> impl Future<Output = Result<Vec<Candidate>>> + Send;

    /// Active tokens whose reminder at this lead (at lead 0: whose deadline) fell due after the watermark and at or before
    /// `now`, in the order of watermarks.
    ///
    /// # Errors
    /// When the store fails.
    fn crossing(
        &self,
        lead: Lead,
        from: Watermark,
        now: Timestamp,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<Candidate>>> + Send;

    /// The earliest deadline after `now` of an active token.
    ///
    /// # Errors
    /// When the store fails.
    fn next_deadline(&self, now: Timestamp) -> impl Future<Output = Result<Option<Timestamp>>> + Send;

    /// Who speaks for these owners, whether or not they take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn speakers(&self, owners: &[OwnerId]) -> impl Future<Output = Result<HashMap<OwnerId, Vec<ContactId>>>> + Send;

    /// Who is told of these tokens besides those who speak for their owners, whether or not they take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn watchers(&self, tokens: &[TokenId]) -> impl Future<Output = Result<HashMap<TokenId, Vec<ContactId>>>> + Send;

    /// Those of these contacts that take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn addressees(&self, contacts: &[ContactId]) -> impl Future<Output = Result<HashMap<ContactId, Addressee>>> + Send;

    /// The zones of these owners. One that cannot be read is left out.
    ///
    /// # Errors
    /// When the store fails.
    fn zones(&self, owners: &[OwnerId]) -> impl Future<Output = Result<HashMap<OwnerId, Tz>>> + Send;

    /// The contacts of these owners that take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn reachable(&self, owners: &[OwnerId]) -> impl Future<Output = Result<HashMap<OwnerId, Vec<ContactId>>>> + Send
    where
        Self: Sync,
    {
        async move {
            let mut reachable = self.speakers(owners).await?;
            let mut contacts: Vec<ContactId> = reachable.values().flatten().copied().collect();
            contacts.sort_unstable();
            contacts.dedup();
            let taking = self.addressees(&contacts).await?;
            reachable.retain(|_, contacts| {
                contacts.retain(|contact| taking.contains_key(contact));
                !contacts.is_empty()
            });
            Ok(reachable)
        }
    }

    /// Remembers that these contacts, all of one bucket, are sent reminders now, but for those that were sent some after `since`:
    /// the answer says when.
    ///
    /// # Errors
    /// When the store fails.
    fn mailed_before(
        &self,
        contacts: &[ContactId],
        since: Timestamp,
        now: Timestamp,
    ) -> impl Future<Output = Result<HashMap<ContactId, Timestamp>>> + Send;

    /// Remembers that these contacts, all of one bucket, are sent reminders now.
    ///
    /// # Errors
    /// When the store fails.
    fn mailed(&self, contacts: &[ContactId], now: Timestamp) -> impl Future<Output = Result<()>> + Send;

    /// Writes reminders and what has been dealt with by that.
    ///
    /// # Errors
    /// [`Error::LostLease`](super::Error::LostLease), with nothing written.
    fn plan(
        &self,
        lease: &Lease,
        decided: Decided<'_>,
        progress: Progress,
    ) -> impl Future<Output = Result<Written>> + Send;

    /// What jobs did in the minutes after `since`, up to the one of `now`.
    ///
    /// # Errors
    /// When the store fails.
    fn counted(&self, since: Timestamp, now: Timestamp) -> impl Future<Output = Result<Counted>> + Send;

    /// How many contacts there are. Counts them: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn contact_count(&self) -> impl Future<Output = Result<u64>> + Send;

    /// What is held; `None` where nothing is.
    ///
    /// # Errors
    /// When the store fails.
    fn held(&self, now: Timestamp) -> impl Future<Output = Result<Option<Held>>> + Send;

    /// How many active tokens are past their deadline.
    ///
    /// # Errors
    /// When the store fails.
    fn overdue_count(&self, now: Timestamp) -> impl Future<Output = Result<u64>> + Send;

    /// Opens an alert for a contact, unless one of this kind was opened since then. Returns whether it did.
    ///
    /// # Errors
    /// When the store fails.
    fn alert(
        &self,
        contact: ContactId,
        kind: MessageKind,
        unless_since: Timestamp,
        now: Timestamp,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// How far each lead has been dealt with.
    ///
    /// # Errors
    /// When the store fails.
    fn watermarks(&self) -> impl Future<Output = Result<HashMap<Lead, Watermark>>> + Send;

    /// What policies match these tokens by.
    ///
    /// # Errors
    /// When the store fails.
    fn traits(&self, tokens: &[TokenId]) -> impl Future<Output = Result<HashMap<TokenId, Traits>>> + Send;

    /// Remembers by which policies a job plans. Where they are others than before, forgets the watermarks of all leads but lead
    /// 0, in the same transaction, and says so.
    ///
    /// # Errors
    /// [`Error::LostLease`](super::Error::LostLease), with nothing written.
    fn adopt_policies(
        &self,
        lease: &Lease,
        fingerprint: Option<&str>,
        now: Timestamp,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Forgets the watermarks of all leads but these, lead 0 included.
    ///
    /// # Errors
    /// [`Error::LostLease`](super::Error::LostLease), with nothing written.
    fn keep_watermarks(&self, lease: &Lease, leads: &[Lead], now: Timestamp)
    -> impl Future<Output = Result<()>> + Send;

    /// What is true now of what messages are about to say: of each token that a contact is to be told of. A contact
    /// of which no token exists any more is not in the answer.
    ///
    /// # Errors
    /// When the store fails.
    fn facts(&self, asked: &[(ContactId, TokenId)]) -> impl Future<Output = Result<HashMap<ContactId, Facts>>> + Send;

    /// Removes what is old, `limit` rows of each kind at most. A primary token without successor stays, as do rows that
    /// something still needs.
    ///
    /// # Errors
    /// [`Error::LostLease`](super::Error::LostLease), with nothing removed.
    fn purge(
        &self,
        lease: &Lease,
        cutoffs: Cutoffs,
        now: Timestamp,
        limit: u32,
    ) -> impl Future<Output = Result<Purged>> + Send;
}

/// By which policies a job plans.
pub(super) const POLICIES: &str = "SELECT policies FROM jobs WHERE bucket = 0 AND name = $1";

/// Remembers by which policies a job plans, where they are others.
pub(super) const ADOPT: &str = "UPDATE jobs SET policies = $2 \
     WHERE bucket = 0 AND name = $1 AND policies IS DISTINCT FROM $2";

/// Makes every lead but lead 0 a new one.
pub(super) const FORGET_WATERMARKS: &str = "DELETE FROM watermarks WHERE bucket = 0 AND lead <> 0";

/// The earliest deadline after an instant: one probe of the index `tokens_deadline`.
pub(super) const NEXT_DEADLINE: &str =
    "SELECT MIN(expires_at) FROM tokens WHERE status = 'active' AND expires_at IS NOT NULL AND expires_at > $1";
