//! `purge`: removes what is older than its retention, in bounded batches.

use chrono::TimeDelta;

use super::{Outcome, guard};
use crate::clock::Timestamp;
use crate::store::jobs::Lease;
use crate::store::purging::{Cutoffs, Purged};
use crate::store::{Result, Store};

/// The job's name in the store and in logs.
pub const NAME: &str = "purge";

/// How many rows of each kind a step removes.
pub const BATCH: u32 = 1_000;

/// How long things are kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Ledger rows, after the deadline that they speak of.
    pub reminders: TimeDelta,
    /// Messages, after they were sent or given up.
    pub messages: TimeDelta,
    /// Tokens, after they ended.
    pub ended_tokens: TimeDelta,
}

impl Retention {
    /// Before when everything is old enough to go.
    pub fn cutoffs(self, now: Timestamp) -> Cutoffs {
        let before = |span: TimeDelta| now.checked_sub_signed(span).unwrap_or(Timestamp::UNIX_EPOCH);
        Cutoffs {
            reminders: before(self.reminders),
            messages: before(self.messages),
            ended_tokens: before(self.ended_tokens),
            guard_counts: before(guard::SPAN * 2),
        }
    }
}

/// Removes a batch of each kind.
///
/// # Errors
/// When the store fails or the lease was lost; nothing of the batch is removed then.
pub async fn step<S: Store>(store: &S, lease: &Lease, keep: Retention, now: Timestamp) -> Result<Outcome<Purged>> {
    let did = store.purge(lease, keep.cutoffs(now), now, BATCH).await?;
    let more = [did.reminders, did.messages, did.tokens].iter().any(|count| *count >= u64::from(BATCH));
    Ok(Outcome { did, more })
}
