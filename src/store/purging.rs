//! What is removed once it is old: ledger rows, messages, tokens, and what guards counted.
//!
//! One step is one transaction of so many rows at most, under the lease of the job. What something still needs stays: a reminder
//! that waits, a message that is not finished, an owner's primary token.

use std::future::Future;

use super::Result;
use super::jobs::Lease;
use crate::clock::Timestamp;

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

/// Removing what is old.
pub trait Purging {
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
