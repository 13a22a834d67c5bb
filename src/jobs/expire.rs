//! `expire`: marks tokens whose deadline has passed, and writes their expired notices in the same transaction.
//!
//! Bookkeeping and events, not the gate: verification compares with the clock by itself. A crash between two steps
//! leaves whole batches; the next step starts from what is still active.
//!
//! Lead 0 has a watermark as the others do: expired tokens leave dead entries at the index's left edge, which a step that
//! began there would read again until they are vacuumed. Whoever writes a deadline that may lie behind the watermark marks
//! the token; marked ones come first.

use uuid::Uuid;

use super::{Outcome, Rules, guard};
use crate::clock::Timestamp;
use crate::policy::{Decision, Lead, expired_notice};
use crate::store::jobs::Lease;
use crate::store::planning::{Candidate, Decided, NewReminder, Watermark, Written};
use crate::store::{Result, Store};
use crate::token::ContactId;

/// The job's name in the store and in logs.
pub const NAME: &str = "expire";

/// Expires a batch of tokens.
///
/// # Errors
/// When the store fails or the lease was lost; nothing of the batch is written then.
pub async fn step<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<Outcome<Written>> {
    let due = store.to_expire(now).await?;
    let mut marked = if due.marked { store.overdue(now, rules.batch).await? } else { Vec::new() };
    if !marked.is_empty() {
        if allow(store, rules, now, &mut marked).await? {
            let did = write(store, lease, rules, now, &mut marked, None).await?;
            return Ok(Outcome { did, more: true });
        }
        return waits(store, lease, rules, now, &mut marked, None).await;
    }
    if due.is_ahead(now) {
        // A wrong clock set it. It goes now, or it would be believed once its time has come.
        let mut watermarks = store.watermarks().await?;
        watermarks.remove(&Lead::EXPIRED);
        let others: Vec<Lead> = watermarks.into_keys().collect();
        store.keep_watermarks(lease, &others, now).await?;
    }
    let known = due.known(now);
    if known.is_some() && !due.crossed {
        return Ok(Outcome { did: Written::default(), more: false });
    }
    let from = known.unwrap_or(Watermark { instant: Timestamp::UNIX_EPOCH, token: Uuid::nil() });
    let mut page = store.crossing(Lead::EXPIRED, from, now, rules.batch).await?;
    let more = page.len() >= rules.batch as usize;
    let allowed = page.is_empty() || allow(store, rules, now, &mut page).await?;
    let reached = page.last().map(|last| Watermark { instant: last.deadline.expires_at, token: last.id.uuid() });
    if !allowed {
        return waits(store, lease, rules, now, &mut page, reached).await;
    }
    // Where there was no watermark, there is one now, whatever was found: or the next pass would begin at the left edge again.
    let did = write(store, lease, rules, now, &mut page, Some(reached.unwrap_or(Watermark::after(now)))).await?;
    Ok(Outcome { did, more })
}

/// Cuts a page down to what the guard allows; `false` where it had to be.
async fn allow<S: Store>(store: &S, rules: &Rules, now: Timestamp, page: &mut Vec<Candidate>) -> Result<bool> {
    let most = rules.guard.may_expire(store, page.len(), now).await?;
    let most = most.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
    let allowed = page.len() <= most;
    page.truncate(most);
    Ok(allowed)
}

/// Expires what the guard allows of a page; the rest waits until the hour has passed.
async fn waits<S: Store>(
    store: &S,
    lease: &Lease,
    rules: &Rules,
    now: Timestamp,
    allowed: &mut [Candidate],
    reached: Option<Watermark>,
) -> Result<Outcome<Written>> {
    let mut did = Written::default();
    if !allowed.is_empty() {
        did = write(store, lease, rules, now, allowed, reached).await?;
    }
    did.waits = true;
    guard::expiry_waits(store, rules, now).await?;
    Ok(Outcome { did, more: false })
}

async fn write<S: Store>(
    store: &S,
    lease: &Lease,
    rules: &Rules,
    now: Timestamp,
    page: &mut [Candidate],
    reached: Option<Watermark>,
) -> Result<Written> {
    let reminders = decide(store, rules, now, page, &[]).await?;
    let page: &[Candidate] = page;
    let may_open = match reminders.len() {
        0 => None,
        wanted => rules.guard.may_open(store, wanted, now).await?,
    };
    let decided = Decided { now, looked_at: page, reminders, may_open };
    let mut written = store.expire(lease, decided, reached).await?;
    // Where an edit came in between, fewer were marked than are on the page, and the numbers are those of its neighbours.
    let marked = usize::try_from(written.tokens).unwrap_or(usize::MAX);
    written.lags = page.iter().take(marked).map(|token| now - token.deadline.expires_at).collect();
    guard::report(&written);
    Ok(written)
}

/// What is to be written about tokens that have reached their deadline. `newcomers` take mail, though the store does not have
/// them yet.
pub(super) async fn decide<S: Store>(
    store: &S,
    rules: &Rules,
    now: Timestamp,
    page: &mut [Candidate],
    newcomers: &[ContactId],
) -> Result<Vec<NewReminder>> {
    rules.describe(store, page).await?;
    let page: &[Candidate] = page;
    let notice = |token: &Candidate| {
        let notice = expired_notice(&rules.policy, token.deadline.expires_at, now);
        notice.filter(|_| rules.speaks_of(token.usage, now))
    };
    let noticed: Vec<(&Candidate, Decision)> =
        page.iter().filter_map(|token| notice(token).map(|decision| (token, decision))).collect();
    let tokens: Vec<_> = noticed.iter().map(|(token, _)| (token.owner, token.id)).collect();
    let recipients = rules.recipients(store, &tokens, newcomers, now).await?;
    Ok(noticed.iter().flat_map(|(token, decision)| rules.rows(token, Lead::EXPIRED, *decision, &recipients)).collect())
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
