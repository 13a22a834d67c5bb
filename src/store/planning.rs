//! What the planning jobs do: find tokens that are due, write what was decided about them, and purge what is old.
//!
//! Engine code that reads tokens stands behind this trait and nowhere else.

use std::collections::{HashMap, HashSet};
use std::future::Future;

use uuid::Uuid;

use super::Result;
use super::accounts::ReminderState;
use super::jobs::Lease;
use crate::clock::Timestamp;
use crate::policy::{Deadline, Lead, Reason};
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
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Which token.
    pub id: TokenId,
    /// Whose it is.
    pub owner: OwnerId,
    /// Its deadline, and when that was set.
    pub deadline: Deadline,
    /// Which of its deadlines this is.
    pub generation: i32,
    /// Whether it has a successor.
    pub replaced: bool,
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
    /// No claim of the messages that are opened before this instant.
    pub not_before: Timestamp,
}

/// What became of what a planning step decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Tokens that changed.
    pub tokens: u64,
    /// Reminders written to be sent.
    pub pending: u64,
    /// Reminders written as superseded, unreachable or stale.
    pub settled: u64,
}

/// What `remind` moves on by what it writes.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// The tokens are planned: their marks are taken off.
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
    /// The owners of these tokens that the contact speaks for.
    pub speaks_for: HashSet<OwnerId>,
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

    /// The contacts of these owners that take mail.
    ///
    /// # Errors
    /// When the store fails.
    fn reachable(&self, owners: &[OwnerId]) -> impl Future<Output = Result<HashMap<OwnerId, Vec<ContactId>>>> + Send;

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
