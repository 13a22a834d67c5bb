//! `expire`: marks tokens whose deadline has passed, and writes their expired notices in the same transaction.
//!
//! Bookkeeping and events, not the gate: verification compares with the clock by itself. A crash between two steps
//! leaves whole batches; the next step starts from what is still active.

use super::{Outcome, Rules};
use crate::clock::Timestamp;
use crate::policy::{Lead, expired_notice};
use crate::store::jobs::Lease;
use crate::store::planning::{Candidate, Decided, Written};
use crate::store::{Result, Store};
use crate::token::OwnerId;

/// The job's name in the store and in logs.
pub const NAME: &str = "expire";

/// Expires a batch of tokens.
///
/// # Errors
/// When the store fails or the lease was lost; nothing of the batch is written then.
pub async fn step<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<Outcome<Written>> {
    let page = store.past_deadline(now, rules.batch).await?;
    if page.is_empty() {
        return Ok(Outcome { did: Written::default(), more: false });
    }
    let notice = |token: &Candidate| expired_notice(&rules.policy, token.deadline.expires_at, now, token.replaced);
    let mut owners: Vec<OwnerId> =
        page.iter().filter(|token| notice(token).is_some()).map(|token| token.owner).collect();
    owners.sort_unstable();
    owners.dedup();
    let contacts = store.reachable(&owners).await?;
    let reminders = page
        .iter()
        .filter_map(|token| notice(token).map(|decision| (token, decision)))
        .flat_map(|(token, decision)| {
            let contacts = contacts.get(&token.owner).map_or(&[][..], Vec::as_slice);
            rules.rows(token, Lead::EXPIRED, decision, contacts)
        })
        .collect();
    let decided = Decided { now, looked_at: &page, reminders, not_before: now + rules.hold };
    let did = store.expire(lease, decided).await?;
    Ok(Outcome { did, more: page.len() >= rules.batch as usize })
}

/// Makes a batch of tokens active again that a wrong clock expired before their deadline. On a sound clock this is one
/// probe of an index.
///
/// # Errors
/// When the store fails or the lease was lost.
pub async fn revive<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<Outcome<u64>> {
    let did = store.revive(lease, now, rules.batch).await?;
    Ok(Outcome { did, more: did >= u64::from(rules.batch) })
}
