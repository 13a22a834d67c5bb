//! `remind`: writes the reminders that are owed before deadlines, each once.
//!
//! Each lead has a watermark, up to which it has been dealt with; a step reads the page that follows it, and writes what
//! was decided together with the moved watermark. Tokens that no watermark will come across carry a mark, and come
//! first. A crash repeats at most the reading of one page.

use super::{Outcome, Rules, guard};
use crate::clock::Timestamp;
use crate::policy::{Lead, due_reminders};
use crate::store::jobs::Lease;
use crate::store::planning::{Candidate, Decided, NewReminder, Progress, Watermark, Written};
use crate::store::{Result, Store};
use crate::token::OwnerId;

/// The job's name in the store and in logs.
pub const NAME: &str = "remind";

/// Plans a page of tokens: marked ones first, then those that cross a lead, widest lead first.
///
/// # Errors
/// When the store fails or the lease was lost; nothing of the page is written then.
pub async fn step<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<Outcome<Written>> {
    let widest = rules.policy.leads().first().copied();
    let marked = store.unplanned(now, rules.batch).await?;
    if !marked.is_empty() {
        let did = write(store, lease, rules, now, &marked, widest.unwrap_or(Lead::EXPIRED), Progress::Planned).await?;
        return Ok(Outcome { did, more: true });
    }
    let watermarks = store.watermarks().await?;
    // Lead 0 is the watermark of `expire`.
    let kept: Vec<Lead> = rules.policy.leads().iter().copied().chain([Lead::EXPIRED]).collect();
    if watermarks.keys().any(|lead| !kept.contains(lead)) {
        store.keep_watermarks(lease, &kept, now).await?;
    }
    for lead in rules.policy.leads() {
        let known = watermarks.get(lead).filter(|watermark| watermark.instant <= now);
        // A lead that is new, or whose watermark lies in the future because the clock went back, starts from all that
        // stands inside its window now: deadlines after this instant.
        let from = known.copied().unwrap_or_else(|| Watermark::after(lead.due_at(now)));
        // One more than a page tells whether another follows. The last page always ends at this instant: if the clock is
        // wrong, the watermark must show it, or what was dealt with at the wrong time would count for good.
        let found = store.crossing(*lead, from, now, rules.batch.saturating_add(1)).await?;
        if found.is_empty() && known.is_some() {
            continue;
        }
        let (page, more) = match found.split_at_checked(rules.batch as usize) {
            Some((page, [_, ..])) => (page, page.last()),
            _ => (found.as_slice(), None),
        };
        let reached = more.map_or_else(
            || Watermark::after(now),
            |last| Watermark { instant: lead.due_at(last.deadline.expires_at), token: last.id.uuid() },
        );
        let did = write(store, lease, rules, now, page, *lead, Progress::Reached(*lead, reached)).await?;
        return Ok(Outcome { did, more: true });
    }
    Ok(Outcome { did: Written::default(), more: false })
}

/// Makes the next steps read every lead's whole window against the ledger, and `expire` look for whatever is active past
/// its deadline. That heals what watermarks cannot see: rows
/// written by hand, restored backups, and a clock that leapt ahead and came back while no daemon ran.
///
/// # Errors
/// When the store fails or the lease was lost.
pub async fn reconcile<S: Store>(store: &S, lease: &Lease, now: Timestamp) -> Result<()> {
    store.keep_watermarks(lease, &[], now).await
}

async fn write<S: Store>(
    store: &S,
    lease: &Lease,
    rules: &Rules,
    now: Timestamp,
    page: &[Candidate],
    widest: Lead,
    progress: Progress,
) -> Result<Written> {
    let due: Vec<_> = page
        .iter()
        .filter(|token| !token.replaced)
        .map(|token| (token, due_reminders(&rules.policy, token.deadline, now, widest)))
        .filter(|(_, due)| !due.is_empty())
        .collect();
    let mut owners: Vec<OwnerId> = due.iter().map(|(token, _)| token.owner).collect();
    owners.sort_unstable();
    owners.dedup();
    let contacts = if owners.is_empty() { Default::default() } else { store.reachable(&owners).await? };
    let reminders: Vec<NewReminder> = due
        .into_iter()
        .flat_map(|(token, due)| {
            let contacts = contacts.get(&token.owner).map_or(&[][..], Vec::as_slice);
            due.into_iter().flat_map(move |(lead, decision)| rules.rows(token, lead, decision, contacts))
        })
        .collect();
    let may_open = match reminders.len() {
        0 => None,
        wanted => rules.guard.may_open(store, wanted, now).await?,
    };
    let decided = Decided { now, looked_at: page, reminders, not_before: now + rules.hold, may_open };
    let written = store.plan(lease, decided, progress).await?;
    guard::report(&written);
    Ok(written)
}
