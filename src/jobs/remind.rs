//! `remind`: writes the reminders that are owed before deadlines, each once.
//!
//! Each lead has a watermark, up to which it has been dealt with; a step reads the page that follows it, and writes what
//! was decided together with the moved watermark. Tokens that no watermark will come across carry a mark, and come
//! first; then those whose contacts were told of a deadline that no longer holds (`corrections`). A crash repeats at most the reading of one page.

pub(super) mod corrections;

use super::{Outcome, Rules, guard};
use crate::clock::Timestamp;
use crate::policies::fingerprint;
use crate::policy::{Lead, change_notice, due_reminders};
use crate::store::due::ToRemind;
use crate::store::jobs::Lease;
use crate::store::planning::{Candidate, Decided, NewReminder, Progress, Watermark, Written};
use crate::store::{Result, Store};
use crate::token::ContactId;

/// The job's name in the store and in logs.
pub const NAME: &str = "remind";

/// Plans a page of tokens: marked ones first, then those that cross a lead, widest lead first.
///
/// # Errors
/// When the store fails or the lease was lost; nothing of the page is written then.
pub async fn step<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<Outcome<Written>> {
    let leads = rules.leads();
    let due = store.to_remind(now).await?;
    let mut marked = if due.marked { store.unplanned(now, rules.batch).await? } else { Vec::new() };
    if !marked.is_empty() {
        rules.describe(store, &mut marked).await?;
        let did = write(store, lease, rules, now, &marked, Progress::Planned).await?;
        return Ok(Outcome { did, more: true });
    }
    if due.uncorrected {
        return corrections::step(store, lease, rules, now).await;
    }
    if due.has_others(&leads) {
        // Lead 0 is the watermark of `expire`.
        let kept: Vec<Lead> = leads.iter().copied().chain([Lead::EXPIRED]).collect();
        store.keep_watermarks(lease, &kept, now).await?;
    }
    for lead in &leads {
        let known = due.known(*lead, now);
        if known.is_some() && !due.crossed.contains(lead) {
            continue;
        }
        // A lead that is new, or whose watermark lies in the future because the clock went back, starts from all that
        // stands inside its window now: deadlines after this instant.
        let from = known.unwrap_or_else(|| Watermark::after(lead.due_at(now)));
        // One more than a page tells whether another follows. The last page always ends at this instant: if the clock is
        // wrong, the watermark must show it, or what was dealt with at the wrong time would count for good.
        let mut found = store.crossing(*lead, from, now, rules.batch.saturating_add(1)).await?;
        if found.is_empty() && known.is_some() {
            continue;
        }
        rules.describe(store, &mut found).await?;
        let (page, more) = match found.split_at_checked(rules.batch as usize) {
            Some((page, [_, ..])) => (page, page.last()),
            _ => (found.as_slice(), None),
        };
        let reached = more.map_or_else(
            || Watermark::after(now),
            |last| Watermark { instant: lead.due_at(last.deadline.expires_at), token: last.id.uuid() },
        );
        let did = write(store, lease, rules, now, page, Progress::Reached(*lead, reached)).await?;
        return Ok(Outcome { did, more: true });
    }
    Ok(Outcome { did: Written::default(), more: false })
}

/// Whether a pass would find something to do, given what the store says.
pub fn is_due(due: &ToRemind, rules: &Rules, now: Timestamp) -> bool {
    due.policies != fingerprint(&rules.policy, &rules.groups) || !due.is_nothing(&rules.leads(), now)
}

/// Notices that the policies are others than those that the last pass went by, whichever process made it: then the next steps
/// read every lead's whole window against the ledger, as if the leads were new. A lead's watermark says how far all tokens have
/// been dealt with, and a token that follows another policy may owe a reminder behind it. That is what marking each token would
/// come to, without writing a mark to any.
///
/// Daemons with different policies take turns in this, and each reads the windows again: costly, but nothing is lost when one of
/// them is stopped in the middle of a change.
///
/// # Errors
/// When the store fails or the lease was lost.
pub async fn adopt<S: Store>(store: &S, lease: &Lease, rules: &Rules, now: Timestamp) -> Result<bool> {
    let fingerprint = fingerprint(&rules.policy, &rules.groups);
    store.adopt_policies(lease, fingerprint.as_deref(), now).await
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
    progress: Progress,
) -> Result<Written> {
    let crossed = match progress {
        Progress::Planned => None,
        Progress::Reached(lead, _) => Some(lead),
    };
    let reminders = decide(store, rules, now, page, crossed, &[]).await?;
    let may_open = match reminders.len() {
        0 => None,
        wanted => rules.guard.may_open(store, wanted, now).await?,
    };
    let decided = Decided { now, looked_at: page, reminders, may_open };
    let written = store.plan(lease, decided, progress).await?;
    guard::report(&written);
    Ok(written)
}

/// What is to be written about tokens that were described: that have crossed this lead, or else are marked. `newcomers` take
/// mail, though the store does not have them yet.
pub(super) async fn decide<S: Store>(
    store: &S,
    rules: &Rules,
    now: Timestamp,
    page: &[Candidate],
    crossed: Option<Lead>,
    newcomers: &[ContactId],
) -> Result<Vec<NewReminder>> {
    // A page of one lead leaves wider ones alone, and the tokens whose policy does not have that lead.
    let due = |token: &Candidate| {
        let policy = rules.terms(token.traits.as_ref()).policy;
        let widest = match crossed {
            None => policy.leads().first().copied(),
            Some(lead) => Some(lead).filter(|lead| policy.leads().contains(lead)),
        };
        let mut due = widest.map_or_else(Vec::new, |widest| due_reminders(policy, token.deadline, now, widest));
        if let (None, Some(moved_from)) = (crossed, token.moved_from) {
            let notice = change_notice(policy, moved_from, token.deadline.expires_at, now, &due);
            due.extend(notice.map(|decision| (Lead::CHANGED, decision)));
        }
        due
    };
    let due: Vec<_> = page
        .iter()
        .filter(|token| rules.speaks_of(token.usage, now))
        .map(|token| (token, due(token)))
        .filter(|(_, due)| !due.is_empty())
        .collect();
    let tokens: Vec<_> = due.iter().map(|(token, _)| (token.owner, token.id)).collect();
    let recipients = rules.recipients(store, &tokens, newcomers, now).await?;
    let rows = due
        .iter()
        .flat_map(|(token, due)| due.iter().map(move |(lead, decision)| (*token, *lead, *decision)))
        .flat_map(|(token, lead, decision)| rules.rows(token, lead, decision, &recipients));
    Ok(rows.collect())
}
