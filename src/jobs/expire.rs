//! `expire`: marks tokens whose deadline has passed, and writes their expired notices in the same transaction.
//!
//! Bookkeeping and events, not the gate: verification compares with the clock by itself. A crash between two steps
//! leaves whole batches; the next step starts from what is still active.
//!
//! Lead 0 has a watermark as the others do: expired tokens leave dead entries at the index's left edge, which a step that
//! began there would read again until they are vacuumed. Whoever writes a deadline that may lie behind the watermark marks
//! the token; marked ones come first.

use uuid::Uuid;

use super::{Outcome, Rules};
use crate::clock::Timestamp;
use crate::policy::{Lead, expired_notice};
use crate::store::jobs::Lease;
use crate::store::planning::{Candidate, Decided, Watermark, Written};
use crate::store::{Result, Store};
use crate::token::OwnerId;

/// The job's name in the store and in logs.
pub const NAME: &str = "expire";

/// Expires a batch of tokens.
///
/// # Errors
/// When the store fails or the lease was lost; nothing of the batch is written then.
pub async fn step<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<Outcome<Written>> {
    let marked = store.overdue(now, rules.batch).await?;
    if !marked.is_empty() {
        let did = write(store, lease, rules, now, &marked, None).await?;
        return Ok(Outcome { did, more: true });
    }
    let mut watermarks = store.watermarks().await?;
    let known = watermarks.remove(&Lead::EXPIRED);
    if known.is_some_and(|watermark| watermark.instant > now) {
        // A wrong clock set it. It goes now, or it would be believed once its time has come.
        let others: Vec<Lead> = watermarks.into_keys().collect();
        store.keep_watermarks(lease, &others, now).await?;
    }
    let known = known.filter(|watermark| watermark.instant <= now);
    let from = known.unwrap_or(Watermark { instant: Timestamp::UNIX_EPOCH, token: Uuid::nil() });
    let page = store.crossing(Lead::EXPIRED, from, now, rules.batch).await?;
    let Some(last) = page.last() else {
        return Ok(Outcome { did: Written::default(), more: false });
    };
    let reached = Watermark { instant: last.deadline.expires_at, token: last.id.uuid() };
    let did = write(store, lease, rules, now, &page, Some(reached)).await?;
    Ok(Outcome { did, more: page.len() >= rules.batch as usize })
}

async fn write<S: Store>(
    store: &S,
    lease: &Lease,
    rules: &Rules,
    now: Timestamp,
    page: &[Candidate],
    reached: Option<Watermark>,
) -> Result<Written> {
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
    let decided = Decided { now, looked_at: page, reminders, not_before: now + rules.hold };
    store.expire(lease, decided, reached).await
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
