//! What the planning jobs do: find tokens that are due, and write what was decided about them.
//!
//! A decision and what it moves on are one transaction, in which the lease of the job is held and what the decision rests on is
//! compared once more: a token that has changed since keeps its marks, and nothing is written about it. In a crash nothing or
//! all of it is there. Pages come from partial indexes in one order, so that a pass reads each token once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;

use chrono::TimeDelta;
use uuid::Uuid;

use super::Result;
use super::accounts::ReminderState;
use super::jobs::Lease;
use crate::clock::Timestamp;
use crate::policies::Traits;
use crate::policy::{Deadline, Lead, Reason, Usage};
use crate::token::{Bucket, ContactId, OwnerId, TokenId};

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

/// Those reminders that speak of these tokens.
pub(super) fn only_of(tokens: &[(Uuid,)], reminders: Vec<NewReminder>) -> Vec<NewReminder> {
    let tokens: HashSet<Uuid> = tokens.iter().map(|(id,)| *id).collect();
    reminders.into_iter().filter(|reminder| tokens.contains(&reminder.token.uuid())).collect()
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

impl std::ops::AddAssign for Written {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.pending += other.pending;
        self.settled += other.settled;
        self.opened += other.opened;
        self.held += other.held;
        self.waits |= other.waits;
        self.reminded += other.reminded;
        self.lags.extend(other.lags);
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

    /// How far each lead has been dealt with.
    ///
    /// # Errors
    /// When the store fails.
    fn watermarks(&self) -> impl Future<Output = Result<HashMap<Lead, Watermark>>> + Send;

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

/// Writes up to where a lead has been dealt with.
pub(super) const MOVE_WATERMARK: &str = "INSERT INTO watermarks (bucket, lead, instant, token_id) VALUES (0, $1, $2, $3) \
     ON CONFLICT (bucket, lead) DO UPDATE \
     SET instant = excluded.instant, token_id = excluded.token_id";
