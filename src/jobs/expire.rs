//! `expire`: marks tokens whose deadline has passed, and writes their expired notices in the same transaction.
//!
//! Bookkeeping and events, not the gate: verification compares with the clock by itself. A crash between two steps
//! leaves whole batches; the next step starts from what is still active.
//!
//! Lead 0 has a watermark as the others do: expired tokens leave dead entries at the index's left edge, which a step that
//! began there would read again until they are vacuumed. Whoever writes a deadline that may lie behind the watermark marks
//! the token; marked ones come first.

use std::collections::HashSet;

use uuid::Uuid;

use super::{Outcome, Rules, guard};
use crate::clock::Timestamp;
use crate::policy::{Decision, Lead, expired_notice};
use crate::store::jobs::Lease;
use crate::store::planning::{Candidate, Decided, NewReminder, Watermark, Written};
use crate::store::{Result, Store};
use crate::token::{ContactId, TokenId};

/// The job's name in the store and in logs.
pub const NAME: &str = "expire";

/// How many pages a step goes through at most: while one is written, the next is read.
const PAGES: u32 = 4;

/// Tokens that have reached their deadline, and what is to be written about them.
struct Page {
    tokens: Vec<Candidate>,
    reminders: Vec<NewReminder>,
}

impl Page {
    async fn new<S: Store>(store: &S, rules: &Rules, now: Timestamp, mut tokens: Vec<Candidate>) -> Result<Self> {
        let reminders = decide(store, rules, now, &mut tokens, &[]).await?;
        Ok(Self { tokens, reminders })
    }

    /// The page that follows; empty where nothing does.
    async fn after<S: Store>(store: &S, rules: &Rules, now: Timestamp, from: Watermark) -> Result<Self> {
        let tokens = store.crossing(Lead::EXPIRED, from, now, rules.batch).await?;
        Self::new(store, rules, now, tokens).await
    }

    fn end(&self) -> Option<Watermark> {
        self.tokens.last().map(|last| Watermark { instant: last.deadline.expires_at, token: last.id.uuid() })
    }

    /// Cuts it down to what the guard allows; `false` where it had to be.
    async fn allow<S: Store>(&mut self, store: &S, rules: &Rules, now: Timestamp) -> Result<bool> {
        if self.tokens.is_empty() {
            return Ok(true);
        }
        let most = rules.guard.may_expire(store, self.tokens.len(), now).await?;
        let most = most.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
        let allowed = self.tokens.len() <= most;
        if !allowed {
            self.tokens.truncate(most);
            let kept: HashSet<TokenId> = self.tokens.iter().map(|token| token.id).collect();
            self.reminders.retain(|reminder| kept.contains(&reminder.token));
        }
        Ok(allowed)
    }
}

/// Expires tokens: a page of those that are marked, or else some pages of the others.
///
/// # Errors
/// When the store fails or the lease was lost, with nothing written. Where pages were written before, they are told, and what is
/// wrong stops the next step.
pub async fn step<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<Outcome<Written>> {
    let mut did = Written::default();
    match pages(store, lease, rules, now, &mut did).await {
        Ok(more) => Ok(Outcome { did, more }),
        Err(error) if did == Written::default() => Err(error),
        // What lasts is met again by the next step.
        Err(_) => Ok(Outcome { did, more: true }),
    }
}

/// Returns whether more is due.
async fn pages<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp, did: &mut Written) -> Result<bool> {
    let due = store.to_expire(now).await?;
    let marked = if due.marked { store.overdue(now, rules.batch).await? } else { Vec::new() };
    if !marked.is_empty() {
        let mut page = Page::new(store, rules, now, marked).await?;
        if !page.allow(store, rules, now).await? {
            *did += write_allowed(store, lease, rules, now, page, None).await?;
            return Ok(false);
        }
        *did += write(store, lease, rules, now, page, None).await?;
        return Ok(true);
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
        return Ok(false);
    }
    let from = known.unwrap_or(Watermark { instant: Timestamp::UNIX_EPOCH, token: Uuid::nil() });
    let mut page = Page::after(store, rules, now, from).await?;
    for others in (0..PAGES).rev() {
        let more = page.tokens.len() >= rules.batch as usize;
        if !page.allow(store, rules, now).await? {
            let reached = page.end();
            *did += write_allowed(store, lease, rules, now, page, reached).await?;
            return Ok(false);
        }
        // Where there was no watermark, there is one now, whatever was found: or the next pass would begin at the left edge
        // again.
        let reached = page.end().unwrap_or(Watermark::after(now));
        let next = async {
            if more && others > 0 { Page::after(store, rules, now, reached).await.map(Some) } else { Ok(None) }
        };
        let (written, next) = tokio::join!(write(store, lease, rules, now, page, Some(reached)), next);
        *did += written?;
        let Some(next) = next? else { return Ok(more) };
        page = next;
        tokio::time::sleep(S::GAP).await;
    }
    Ok(true)
}

/// Expires what the guard allows of a page; the rest waits until the hour has passed.
async fn write_allowed<S: Store>(
    store: &S,
    lease: &Lease,
    rules: &Rules,
    now: Timestamp,
    page: Page,
    reached: Option<Watermark>,
) -> Result<Written> {
    let mut did = Written::default();
    if !page.tokens.is_empty() {
        did = write(store, lease, rules, now, page, reached).await?;
    }
    did.waits = true;
    guard::expiry_waits(store, rules, now).await?;
    Ok(did)
}

async fn write<S: Store>(
    store: &S,
    lease: &Lease,
    rules: &Rules,
    now: Timestamp,
    page: Page,
    reached: Option<Watermark>,
) -> Result<Written> {
    let Page { tokens, reminders } = page;
    let may_open = match reminders.len() {
        0 => None,
        wanted => rules.guard.may_open(store, wanted, now).await?,
    };
    let decided = Decided { now, looked_at: &tokens, reminders, may_open };
    let mut written = store.expire(lease, decided, reached).await?;
    // Where an edit came in between, fewer were marked than are on the page, and the numbers are those of its neighbours.
    let marked = usize::try_from(written.tokens).unwrap_or(usize::MAX);
    written.lags = tokens.iter().take(marked).map(|token| now - token.deadline.expires_at).collect();
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
